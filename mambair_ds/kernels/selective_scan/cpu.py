"""The selective scan on the CPU: loops compiled by numba over sixteen channels at a time, with a backward pass.

A task is one sample and `LANES` channels; zeros make up a multiple of these. The forward pass keeps the states at the
start of each chunk of `CHUNK` positions. The backward pass walks the chunks from the last to the first and recomputes
each one's states, which fit the first cache. Rows are asked for a chunk ahead: the order may jump anywhere.

Tasks are the same whatever the number of threads and samples, and what several of them share (the gradients of A, B, C,
D and delta_bias) is summed in a fixed order: results are equal to the bit on any number of threads, and a sample's do
not depend on its batch.
"""

# mypy: disable-error-code="no-untyped-def"

import functools

import numpy as np
import torch
from torch import Tensor

from mambair_ds.kernels.cpu import exp2, jit, run_tasks, to_lanes
from mambair_ds.kernels.selective_scan.operator import make_operator
from mambair_ds.kernels.selective_scan.reference import put_rows, take_rows
from mambair_ds.kernels.vectors import LANES, load, prefetch, spread, store, totals

CHUNK = 16

_LN2, _LOG2E = np.float32(0.6931471805599453), np.float32(1.4426950408889634)
_ZERO, _TWO = np.float32(0), np.float32(2)


@jit
def _softplus(x):
    """log(1 + e^x); log(1 + z) = 2 artanh(z / (2 + z)), accurate for small z too."""
    z = exp2(min(x, _ZERO - x) * _LOG2E)
    r = z / (_TWO + z)
    w = r * r
    p = np.float32(0.24409403628) * w + np.float32(0.21394267374)
    p = p * w + np.float32(0.28620623406)
    p = p * w + np.float32(0.39998694812)
    p = p * w + np.float32(0.66666679253)
    p = p * w + _TWO
    return max(x, _ZERO) + r * p


@jit
def _forward(task, u, delta, rates, B, C, D, bias, order, use_softplus, y, states):
    length, size = u.shape[1], rates.shape[0]
    blocks = u.shape[2] // LANES
    batch, first = task // blocks, task % blocks * LANES
    shift, direct = load(bias, first), load(D, first)
    state, rate = np.zeros((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    for s in range(size):
        store(rate, (s, 0), load(rates, (s, first)))
    for t in range(length):
        if t % CHUNK == 0:
            for s in range(size):
                store(states, (batch, t // CHUNK, s, first), load(state, (s, 0)))
        token, ahead = order[batch, t], order[batch, min(t + CHUNK, length - 1)]
        prefetch(u, (batch, ahead, first))
        prefetch(delta, (batch, ahead, first))
        prefetch(y, (batch, ahead, first))
        x, dt = load(u, (batch, token, first)), load(delta, (batch, token, first)) + shift
        if use_softplus:
            dt = _softplus(dt)
        drive, out = dt * x, direct * x
        for s in range(size):
            h = exp2(dt * load(rate, (s, 0))) * load(state, (s, 0)) + drive * B[batch, t, s]
            store(state, (s, 0), h)
            out += h * C[batch, t, s]
        store(y, (batch, token, first), out)


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
    inputs = _to_arrays(u, delta, A, B, C, D, delta_bias, prompt, order)
    padded = inputs[0].shape[2]
    y = torch.empty(batch, length, padded)
    states = torch.empty(batch, -(-length // CHUNK), A.shape[1], padded)
    run_tasks(_forward, batch * padded // LANES, *inputs, delta_softplus, y.numpy(), states.numpy())
    return y[..., :channels].to(u.dtype).contiguous(), states[..., :channels].contiguous()


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
    """What both kernels read. B and C, few numbers a token, come in sequence order, with the prompt in C.

    A is (N, D) and in units of log 2.
    """
    B, C = take_rows(B.float(), order), take_rows(C.float(), order)
    C = C if prompt is None else C + prompt
    order = torch.arange(u.shape[1]).expand(u.shape[:2]) if order is None else order
    padded = (to_lanes(x) for x in (u, delta, A.T * float(_LOG2E)))
    return [*padded, _to_numpy(B), _to_numpy(C), to_lanes(D), to_lanes(bias), _to_numpy(order)]


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


@jit
def _backward(
    task, grad_y, states, u, delta, rates, B, C, D, bias, order, use_softplus,
    grad_u, grad_delta, grad_rates, grad_BC, grad_D, grad_bias,
):  # fmt: skip
    length, size = u.shape[1], rates.shape[0]
    blocks = u.shape[2] // LANES
    batch, block = task // blocks, task % blocks
    first = block * LANES
    shift, direct = load(bias, first), load(D, first)
    rate = np.empty((size, LANES), np.float32)
    steps, raw = np.empty((CHUNK, LANES), np.float32), np.empty((CHUNK, LANES), np.float32)
    history = np.empty((CHUNK + 1, size, LANES), np.float32)  # the state before the chunk, then after each position
    decays = np.empty((CHUNK, size, LANES), np.float32)
    g_state, g_rate = np.zeros((size, LANES), np.float32), np.zeros((size, LANES), np.float32)
    g_BC = np.zeros((grad_BC.shape[3], LANES), np.float32)  # to be summed over channels
    g_direct, g_shift = spread(_ZERO), spread(_ZERO)
    for s in range(size):
        store(rate, (s, 0), load(rates, (s, first)))
    for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
        start = chunk * CHUNK
        stop = min(start + CHUNK, length)
        for s in range(size):
            store(history, (0, s, 0), load(states, (batch, chunk, s, first)))
        for t in range(max(start - CHUNK, 0), start):
            token = order[batch, t]
            prefetch(u, (batch, token, first))
            prefetch(delta, (batch, token, first))
            prefetch(grad_y, (batch, token, first))
            prefetch(grad_u, (batch, token, first))
            prefetch(grad_delta, (batch, token, first))
        for k in range(stop - start):
            token = order[batch, start + k]
            dt = load(delta, (batch, token, first)) + shift
            store(raw, (k, 0), dt)
            if use_softplus:
                dt = _softplus(dt)
            store(steps, (k, 0), dt)
            drive = dt * load(u, (batch, token, first))
            for s in range(size):
                decay = exp2(dt * load(rate, (s, 0)))
                store(decays, (k, s, 0), decay)
                store(history, (k + 1, s, 0), decay * load(history, (k, s, 0)) + drive * B[batch, start + k, s])
        for k in range(stop - start - 1, -1, -1):
            t = start + k
            token = order[batch, t]
            dt, x, g_y = load(steps, (k, 0)), load(u, (batch, token, first)), load(grad_y, (batch, token, first))
            drive = dt * x
            g_dt, g_drive = spread(_ZERO), spread(_ZERO)
            for s in range(size):
                g = load(g_state, (s, 0)) + g_y * C[batch, t, s]
                store(g_BC, (s, 0), g * drive)
                store(g_BC, (size + s, 0), g_y * load(history, (k + 1, s, 0)))
                g_drive += g * B[batch, t, s]
                g = g * load(decays, (k, s, 0))
                store(g_state, (s, 0), g)
                g = g * load(history, (k, s, 0))  # now of the exponent Δ·A
                g_dt += g * load(rate, (s, 0))
                store(g_rate, (s, 0), load(g_rate, (s, 0)) + g * dt)
            for s in range(0, g_BC.shape[0], LANES):
                store(grad_BC, (block, batch, t, s), totals(g_BC, s))
            g = g_dt * _LN2 + g_drive * x
            if use_softplus:  # the derivative of Δ = log(1 + e^x) is e^(x - Δ)
                g = g * exp2((load(raw, (k, 0)) - dt) * _LOG2E)
            store(grad_delta, (batch, token, first), g)
            store(grad_u, (batch, token, first), g_drive * dt + g_y * direct)
            g_shift += g
            g_direct += g_y * x
    store(grad_D, (batch, first), g_direct)
    store(grad_bias, (batch, first), g_shift)
    for s in range(size):
        store(grad_rates, (batch, s, first), load(g_rate, (s, 0)))


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
    (batch, length, channels), size = u.shape, A.shape[1]
    inputs = [to_lanes(grad_y), to_lanes(states), *_to_arrays(u, delta, A, B, C, D, delta_bias, prompt, order)]
    padded = inputs[0].shape[2]
    blocks = padded // LANES
    grad_u, grad_delta = torch.empty(batch, length, padded), torch.empty(batch, length, padded)
    grad_rates, grad_D, grad_bias = (torch.empty(batch, *some, padded) for some in ((size,), (), ()))
    grad_BC = torch.empty(blocks, batch, length, -(-2 * size // LANES) * LANES)
    outputs = [x.numpy() for x in (grad_u, grad_delta, grad_rates, grad_BC, grad_D, grad_bias)]
    run_tasks(_backward, batch * blocks, *inputs, delta_softplus, *outputs)
    # One after the other: torch's own sum may choose its order by shape and number of threads.
    grad_rates, grad_BC, grad_D, grad_bias = (
        functools.reduce(torch.add, x) for x in (grad_rates, grad_BC, grad_D, grad_bias)
    )
    grad_prompt, grad_BC = grad_BC[..., size : 2 * size], put_rows(grad_BC, order)
    return [
        grad_u[..., :channels].to(u.dtype).contiguous(),
        grad_delta[..., :channels].to(delta.dtype).contiguous(),
        grad_rates[:, :channels].T.contiguous(),
        grad_BC[..., :size].to(B.dtype).contiguous(),
        grad_BC[..., size : 2 * size].to(C.dtype).contiguous(),
        grad_D[:channels].clone(),
        grad_bias[:channels].clone(),
        *([] if prompt is None else [grad_prompt.to(prompt.dtype).contiguous()]),
    ]


_operator = make_operator("selective_scan_cpu", forward, backward, CHUNK, lambda _: torch.float32)


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
