"""Window attention on the CPU: loops compiled by numba that keep a few queries' logits in the cache and none in memory.

PyTorch's own fast attention gives no gradient to a bias, and falls back to plain operations that write, read and keep
the logits of all windows: 32 MiB each time, in every layer, for two 64×64 pictures. Here the backward pass computes
them again, from the logarithm of each query's sum that the forward pass leaves.

The loops over channels and over queries go eight at a time (four where they sum over keys), with zeros behind the last,
so that every inner loop runs over the keys of a window and does several multiply-adds for each number it reads.

Tasks are the same whatever the number of threads, and the gradient of the bias is summed in a fixed order: results are
equal to the bit on any number of threads, and a sample's do not depend on its batch.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambair_ds.kernels.cpu import jit, jit_reassociating, run_tasks
from mambair_ds.kernels.selective_scan.cpu import exp2

STEP = 8
GROUP = 8  # windows of one kind whose bias gradient one task sums

_LOG2E = np.float32(1.4426950408889634)


@jit
def _load(x, window, part, head):  # type: ignore[no-untyped-def]
    """x[window, :, part, head] with zeros up to multiples of STEP."""
    tokens, width = x.shape[1], x.shape[4]
    tile = np.zeros(((tokens + STEP - 1) // STEP * STEP, (width + STEP - 1) // STEP * STEP), np.float32)
    for i in range(tokens):
        for d in range(width):
            tile[i, d] = x[window, i, part, head, d]
    return tile


@jit
def _transpose(tile, tokens):  # type: ignore[no-untyped-def]
    return np.ascontiguousarray(tile[:tokens].T)


@jit
def _add(rows, r, coefficients, i, d, matrix, m):  # type: ignore[no-untyped-def]
    """rows[r] += coefficients[i, d : d + STEP] @ matrix[m : m + STEP]."""
    c0, c1, c2, c3 = coefficients[i, d], coefficients[i, d + 1], coefficients[i, d + 2], coefficients[i, d + 3]
    c4, c5, c6, c7 = coefficients[i, d + 4], coefficients[i, d + 5], coefficients[i, d + 6], coefficients[i, d + 7]
    for j in range(matrix.shape[1]):
        rows[r, j] += (
            c0 * matrix[m, j] + c1 * matrix[m + 1, j] + c2 * matrix[m + 2, j] + c3 * matrix[m + 3, j]
            + c4 * matrix[m + 4, j] + c5 * matrix[m + 5, j] + c6 * matrix[m + 6, j] + c7 * matrix[m + 7, j]
        )  # fmt: skip


@jit_reassociating
def _dot(rows, r, matrix, d):  # type: ignore[no-untyped-def]
    """matrix[d : d + 4] @ rows[r]."""
    a0 = a1 = a2 = a3 = np.float32(0)
    for j in range(rows.shape[1]):
        p = rows[r, j]
        a0 += p * matrix[d, j]
        a1 += p * matrix[d + 1, j]
        a2 += p * matrix[d + 2, j]
        a3 += p * matrix[d + 3, j]
    return a0, a1, a2, a3


@jit_reassociating
def _sum(rows, r):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(rows.shape[1]):
        total += rows[r, j]
    return total


@jit
def _max(rows, r):  # type: ignore[no-untyped-def]
    largest = rows[r, 0]
    for j in range(rows.shape[1]):
        largest = max(largest, rows[r, j])
    return largest


@jit
def _logits(rows, r, bias, kind, head, q, i, k_t):  # type: ignore[no-untyped-def]
    """rows[r] = the logits of query i, in units of log 2."""
    for j in range(rows.shape[1]):
        rows[r, j] = bias[kind, head, i, j] * _LOG2E
    for d in range(0, q.shape[1], STEP):
        _add(rows, r, q, i, d, k_t, d)


@jit
def _forward(task, qkv, bias, kinds, out, lse):  # type: ignore[no-untyped-def]
    tokens, heads, width = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    window, head = task // heads, task % heads
    q = _load(qkv, window, 0, head) * (_LOG2E / np.float32(np.sqrt(width)))
    k_t = _transpose(_load(qkv, window, 1, head), tokens)
    v_t = _transpose(_load(qkv, window, 2, head), tokens)
    weights = np.empty((1, tokens), np.float32)
    y = np.empty(len(v_t), np.float32)
    for i in range(tokens):
        _logits(weights, 0, bias, kinds[window], head, q, i, k_t)
        largest = _max(weights, 0)
        for j in range(tokens):
            weights[0, j] = exp2(weights[0, j] - largest)
        total = _sum(weights, 0)
        lse[window, head, i] = largest + np.log2(total)
        for d in range(0, width, 4):
            y[d], y[d + 1], y[d + 2], y[d + 3] = _dot(weights, 0, v_t, d)
        for d in range(width):
            out[window, i, 0, head, d] = y[d] / total


@jit
def _backward(task, grad_out, qkv, bias, kinds, out, lse, order, groups, grad_qkv, part_bias):  # type: ignore[no-untyped-def]
    tokens, heads, width = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    group, head = task // heads, task % heads
    scale = np.float32(1) / np.float32(np.sqrt(width))
    weights = np.zeros((STEP, tokens), np.float32)
    grad_logits = np.zeros((STEP, tokens), np.float32)
    for window in order[groups[group] : groups[group + 1]]:
        q = _load(qkv, window, 0, head) * (_LOG2E * scale)
        grad = _load(grad_out, window, 0, head)
        k_t = _transpose(_load(qkv, window, 1, head), tokens)
        v_t = _transpose(_load(qkv, window, 2, head), tokens)
        q_t, grad_t = _transpose(q, len(q)), _transpose(grad, len(grad))
        grad_q = np.empty(len(k_t), np.float32)
        grad_k, grad_v = np.zeros(k_t.shape, np.float32), np.zeros(v_t.shape, np.float32)
        for first in range(0, tokens, STEP):
            for r in range(min(STEP, tokens - first)):
                i = first + r
                delta = np.float32(0)
                for d in range(width):
                    delta += grad[i, d] * out[window, i, 0, head, d]
                _logits(weights, r, bias, kinds[window], head, q, i, k_t)
                for j in range(tokens):
                    weights[r, j] = exp2(weights[r, j] - lse[window, head, i])
                    grad_logits[r, j] = -delta
                for d in range(0, len(v_t), STEP):
                    _add(grad_logits, r, grad, i, d, v_t, d)
                for j in range(tokens):
                    grad_logits[r, j] *= weights[r, j]
                    part_bias[group, head, i, j] += grad_logits[r, j]
                for d in range(0, width, 4):
                    grad_q[d], grad_q[d + 1], grad_q[d + 2], grad_q[d + 3] = _dot(grad_logits, r, k_t, d)
                for d in range(width):
                    grad_qkv[window, i, 0, head, d] = grad_q[d] * scale
            for d in range(width):  # rows behind the last query meet zeros in q and grad
                _add(grad_k, d, q_t, d, first, grad_logits, 0)
                _add(grad_v, d, grad_t, d, first, weights, 0)
        for j in range(tokens):
            for d in range(width):
                grad_qkv[window, j, 1, head, d] = grad_k[d, j] / _LOG2E  # q carries the scale, and the base of 2
                grad_qkv[window, j, 2, head, d] = grad_v[d, j]


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, kinds: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        windows, tokens, _, heads, width = qkv.shape
        out = qkv.new_empty(windows, tokens, 1, heads, width)
        lse = qkv.new_empty(windows, heads, tokens)
        tensors = (qkv, bias, kinds, out, lse)
        run_tasks(_forward, windows * heads, *(tensor.numpy() for tensor in tensors))
        ctx.save_for_backward(*tensors)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        qkv, bias, kinds, out, lse = ctx.saved_tensors
        heads, tokens = bias.shape[1:3]
        order = torch.argsort(kinds, stable=True)
        groups, group_kinds = [0], list[int]()
        for kind, count in zip(*(x.tolist() for x in kinds.unique(return_counts=True)), strict=True):
            first = groups[-1]
            groups += [min(stop, first + count) for stop in range(first + GROUP, first + count + GROUP, GROUP)]
            group_kinds += [kind] * (len(groups) - 1 - len(group_kinds))
        grad_qkv = torch.empty_like(qkv)
        part_bias = qkv.new_zeros(len(group_kinds), heads, tokens, tokens)
        grad_out = grad_out.contiguous().view(out.shape)
        tensors = (grad_out, qkv, bias, kinds, out, lse, order, torch.tensor(groups), grad_qkv, part_bias)
        run_tasks(_backward, len(group_kinds) * heads, *(tensor.numpy() for tensor in tensors))
        grad_bias = torch.zeros_like(bias)
        for kind, part in zip(group_kinds, part_bias, strict=True):
            grad_bias[kind] += part
        return grad_qkv, grad_bias, None


def window_attention(qkv: Tensor, bias: Tensor, kind: Tensor) -> Tensor:
    """See `mambair_ds.kernels.window_attention.window_attention`; computes in float32."""
    with torch.autocast("cpu", enabled=False):
        kinds = kind.repeat(len(qkv) // len(kind))
        return _WindowAttention.apply(qkv.float().contiguous(), bias.float().contiguous(), kinds).to(qkv.dtype)
