"""The selective scan on the CPU: loops compiled by numba, vectorised over channels, with a backward pass of their own.

A task is one sample and `WIDTH` channels. It walks the sequence in chunks of `CHUNK` positions, whose inputs it copies
into small zero-padded tiles, so that every inner loop runs over exactly `WIDTH` contiguous floats and becomes a few
SIMD instructions. The backward pass walks the chunks from the last to the first and recomputes each one's states from
the state at its start.

Tasks are the same whatever the number of threads and samples, and what several of them share (the gradients of A, B, C,
D and delta_bias) is summed in a fixed order: results are equal to the bit on any number of threads, and a sample's do
not depend on its batch.
"""

# mypy: disable-error-code="no-untyped-def"

import functools

import numpy as np
import torch
from torch import Tensor

from mambair_ds.kernels.cpu import exp2, jit, jit_reassociating, run_tasks
from mambair_ds.kernels.selective_scan.operator import make_operator
from mambair_ds.kernels.selective_scan.reference import put_rows, take_rows

WIDTH = 32
CHUNK = 32

_LN2, _LOG2E = np.float32(0.6931471805599453), np.float32(1.4426950408889634)
_ONE, _TWO = np.float32(1), np.float32(2)


@jit
def softplus(x):
    """log(1 + e^x) and its derivative; log(1 + z) = 2 artanh(z / (2 + z)), accurate for small z too."""
    z = exp2(-abs(x) * _LOG2E)
    r = z / (_TWO + z)
    w = r * r
    p = np.float32(0.24409403628) * w + np.float32(0.21394267374)
    p = p * w + np.float32(0.28620623406)
    p = p * w + np.float32(0.39998694812)
    p = p * w + np.float32(0.66666679253)
    p = p * w + _TWO
    inverse = _ONE / (_ONE + z)
    return max(x, np.float32(0)) + r * p, (inverse if x >= np.float32(0) else z * inverse)


@jit
def _load_chunk(u, delta, bias, order, use_softplus, batch, first, start, stop, tile_u, tile_dt, tile_slope):
    """Copy a chunk's inputs into tiles and apply bias and softplus; `tile_slope` becomes the derivative of the step."""
    width = min(WIDTH, u.shape[2] - first)
    for t in range(start, stop):
        token = order[batch, t]
        for d in range(width):
            tile_u[t - start, d] = u[batch, token, first + d]
            tile_dt[t - start, d] = delta[batch, token, first + d] + bias[first + d]
        if use_softplus:
            for d in range(WIDTH):
                tile_dt[t - start, d], tile_slope[t - start, d] = softplus(tile_dt[t - start, d])


@jit
def _load_rates(A, first):
    """The block's A as (N, WIDTH), in units of log 2."""
    tile = np.zeros((A.shape[1], WIDTH), np.float32)
    for d in range(min(WIDTH, A.shape[0] - first)):
        for s in range(A.shape[1]):
            tile[s, d] = A[first + d, s] * _LOG2E
    return tile


@jit
def _forward(task, u, delta, A, B, C, D, bias, order, use_softplus, y, states):
    length, channels = u.shape[1:]
    blocks = (channels + WIDTH - 1) // WIDTH
    batch, first = task // blocks, task % blocks * WIDTH
    width = min(WIDTH, channels - first)
    rates = _load_rates(A, first)
    tile_u = np.zeros((CHUNK, WIDTH), np.float32)
    tile_dt = np.zeros((CHUNK, WIDTH), np.float32)
    tile_slope = np.ones((CHUNK, WIDTH), np.float32)
    state = np.zeros((A.shape[1], WIDTH), np.float32)
    out = np.zeros(WIDTH, np.float32)
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        for s in range(A.shape[1]):
            for d in range(width):
                states[batch, start // CHUNK, s, first + d] = state[s, d]
        _load_chunk(u, delta, bias, order, use_softplus, batch, first, start, stop, tile_u, tile_dt, tile_slope)
        for t in range(start, stop):
            row_u, row_dt = tile_u[t - start], tile_dt[t - start]
            for d in range(width):
                out[d] = D[first + d] * row_u[d]
            for s in range(A.shape[1]):
                b, c = B[batch, t, s], C[batch, t, s]
                for d in range(WIDTH):
                    h = exp2(row_dt[d] * rates[s, d]) * state[s, d] + row_dt[d] * row_u[d] * b
                    state[s, d] = h
                    out[d] += c * h
            token = order[batch, t]
            for d in range(width):
                y[batch, token, first + d] = out[d]


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    prompt: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The forward pass; see `make_operator`."""
    batch, length, channels = u.shape
    y = torch.empty(u.shape)
    states = torch.empty(batch, -(-length // CHUNK), A.shape[1], channels)
    inputs = _to_arrays(u, delta, A, B, C, D, delta_bias, prompt, order)
    run_tasks(_forward, batch * -(-channels // WIDTH), *inputs, delta_softplus, y.numpy(), states.numpy())
    return y.to(u.dtype), states


def _to_arrays(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    prompt: Tensor | None,
    order: Tensor | None,
) -> list[np.ndarray]:
    """What both kernels read. B and C, few numbers a token, come in sequence order, with the prompt in C."""
    B, C = take_rows(B.float(), order), take_rows(C.float(), order)
    C = C if prompt is None else C + prompt
    order = torch.arange(u.shape[1]).expand(u.shape[:2]) if order is None else order
    return [*(_to_numpy(x.float()) for x in (u, delta, A, B, C, D, bias)), _to_numpy(order)]


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


@jit_reassociating
def _backward(
    task, grad_y, states, u, delta, A, B, C, D, bias, order, use_softplus,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
):  # fmt: skip
    length, channels = u.shape[1:]
    size = A.shape[1]
    blocks = (channels + WIDTH - 1) // WIDTH
    batch, block = task // blocks, task % blocks
    first = block * WIDTH
    width = min(WIDTH, channels - first)
    rates = _load_rates(A, first)
    tile_u = np.zeros((CHUNK, WIDTH), np.float32)
    tile_dt = np.zeros((CHUNK, WIDTH), np.float32)
    tile_slope = np.ones((CHUNK, WIDTH), np.float32)
    history = np.zeros((CHUNK + 1, size, WIDTH), np.float32)  # the state before the chunk, then after each position
    decays = np.zeros((CHUNK, size, WIDTH), np.float32)
    g_state = np.zeros((size, WIDTH), np.float32)
    g_rates = np.zeros((size, WIDTH), np.float32)
    g_y = np.zeros(WIDTH, np.float32)
    g_input = np.zeros(WIDTH, np.float32)  # of Δ_t·u_t
    g_dt = np.zeros(WIDTH, np.float32)
    for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
        start = chunk * CHUNK
        stop = min(start + CHUNK, length)
        for s in range(size):
            for d in range(width):
                history[0, s, d] = states[batch, chunk, s, first + d]
        _load_chunk(u, delta, bias, order, use_softplus, batch, first, start, stop, tile_u, tile_dt, tile_slope)
        for k in range(stop - start):
            row_u, row_dt = tile_u[k], tile_dt[k]
            for s in range(size):
                b = B[batch, start + k, s]
                for d in range(WIDTH):
                    decay = exp2(row_dt[d] * rates[s, d])
                    decays[k, s, d] = decay
                    history[k + 1, s, d] = decay * history[k, s, d] + row_dt[d] * row_u[d] * b
        for k in range(stop - start - 1, -1, -1):
            t = start + k
            token = order[batch, t]
            row_u, row_dt = tile_u[k], tile_dt[k]
            for d in range(width):
                g_y[d] = grad_y[batch, token, first + d]
                g_input[d] = g_dt[d] = 0
            for s in range(size):
                b, c = B[batch, t, s], C[batch, t, s]
                g_b = g_c = np.float32(0)
                for d in range(WIDTH):
                    g = g_state[s, d] + c * g_y[d]
                    g_b += g * (row_dt[d] * row_u[d])
                    g_c += g_y[d] * history[k + 1, s, d]
                    g_input[d] += g * b
                    g *= decays[k, s, d]
                    g_state[s, d] = g
                    g *= history[k, s, d]  # now of the exponent Δ·A
                    g_dt[d] += g * rates[s, d]
                    g_rates[s, d] += g * row_dt[d]
                grad_B[block, batch, t, s] = g_b
                grad_C[block, batch, t, s] = g_c
            for d in range(width):
                g = (g_dt[d] * _LN2 + g_input[d] * row_u[d]) * tile_slope[k, d]
                grad_delta[batch, token, first + d] = g
                grad_bias[batch, first + d] += g
                grad_u[batch, token, first + d] = g_input[d] * row_dt[d] + g_y[d] * D[first + d]
                grad_D[batch, first + d] += g_y[d] * row_u[d]
    for d in range(width):
        for s in range(size):
            grad_A[batch, first + d, s] = g_rates[s, d]


def backward(
    grad_y: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    prompt: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The backward pass; see `make_operator`."""
    batch, _, channels = u.shape
    blocks = -(-channels // WIDTH)
    grad_u, grad_delta = torch.empty(u.shape), torch.empty(u.shape)
    grad_A, grad_D, grad_bias = (torch.zeros(batch, *x.shape) for x in (A, D, delta_bias))
    grad_B, grad_C = torch.empty(blocks, *B.shape), torch.empty(blocks, *B.shape)
    inputs = [
        _to_numpy(grad_y.float()),
        _to_numpy(states),
        *_to_arrays(u, delta, A, B, C, D, delta_bias, prompt, order),
    ]
    outputs = [x.numpy() for x in (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)]
    run_tasks(_backward, batch * blocks, *inputs, delta_softplus, *outputs)
    # One after the other: torch's own sum may choose its order by shape and number of threads.
    grad_A, grad_B, grad_C, grad_D, grad_bias = (
        functools.reduce(torch.add, x) for x in (grad_A, grad_B, grad_C, grad_D, grad_bias)
    )
    return [
        grad_u.to(u.dtype),
        grad_delta.to(delta.dtype),
        grad_A,
        put_rows(grad_B, order).to(B.dtype),
        put_rows(grad_C, order).to(C.dtype),
        grad_D,
        grad_bias,
        *([] if prompt is None else [grad_C.to(prompt.dtype)]),
    ]


_operator = make_operator("selective_scan_cpu", forward, backward, CHUNK)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    prompt: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """See `mambair_ds.kernels.selective_scan.selective_scan`."""
    return _operator(u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus)[0]
