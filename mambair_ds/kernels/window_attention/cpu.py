"""Window attention on the CPU: loops compiled by numba that keep a few queries' logits in the cache and none in memory.

PyTorch's own fast attention gives no gradient to a bias, and falls back to plain operations that write, read and keep
the logits of all windows: 32 MiB each time, in every layer, for two 64×64 pictures. Here the backward pass computes
them again, from the logarithm of each query's sum that the forward pass leaves.

Every inner loop runs over the keys of a window, for two rows and four channels or queries at once: eight multiply-adds
for six numbers that it reads. Tiles have zeros behind the last query and channel to make up the fours.

Tasks are the same whatever the number of threads, and the gradient of the bias is summed in a fixed order: results are
equal to the bit on any number of threads, and a sample's do not depend on its batch.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambair_ds.kernels.cpu import exp2, jit, jit_reassociating, run_tasks

GROUP = 8  # windows of one kind whose bias gradient one task sums

_LOG2E = np.float32(1.4426950408889634)


@jit
def _load(x, window, part, head):  # type: ignore[no-untyped-def]
    """x[window, :, part, head] with zeros up to multiples of 4."""
    tokens, width = x.shape[1], x.shape[4]
    tile = np.zeros(((tokens + 3) // 4 * 4, (width + 3) // 4 * 4), np.float32)
    for i in range(tokens):
        for d in range(width):
            tile[i, d] = x[window, i, part, head, d]
    return tile


@jit
def _transpose(tile, tokens):  # type: ignore[no-untyped-def]
    return np.ascontiguousarray(tile[:tokens].T)


@jit
def _add(rows, r, coefficients, i, d, matrix, m):  # type: ignore[no-untyped-def]
    """rows[r : r + 2] += coefficients[i : i + 2, d : d + 4] @ matrix[m : m + 4]."""
    a0, a1, a2, a3 = coefficients[i, d], coefficients[i, d + 1], coefficients[i, d + 2], coefficients[i, d + 3]
    i += 1
    b0, b1, b2, b3 = coefficients[i, d], coefficients[i, d + 1], coefficients[i, d + 2], coefficients[i, d + 3]
    for j in range(matrix.shape[1]):
        m0, m1, m2, m3 = matrix[m, j], matrix[m + 1, j], matrix[m + 2, j], matrix[m + 3, j]
        rows[r, j] += a0 * m0 + a1 * m1 + a2 * m2 + a3 * m3
        rows[r + 1, j] += b0 * m0 + b1 * m1 + b2 * m2 + b3 * m3


@jit_reassociating
def _dot(rows, r, matrix, d, out):  # type: ignore[no-untyped-def]
    """out[:2, d : d + 4] = rows[r : r + 2] @ matrix[d : d + 4].T"""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for j in range(rows.shape[1]):
        m0, m1, m2, m3 = matrix[d, j], matrix[d + 1, j], matrix[d + 2, j], matrix[d + 3, j]
        a, b = rows[r, j], rows[r + 1, j]
        a0 += a * m0
        a1 += a * m1
        a2 += a * m2
        a3 += a * m3
        b0 += b * m0
        b1 += b * m1
        b2 += b * m2
        b3 += b * m3
    out[0, d], out[0, d + 1], out[0, d + 2], out[0, d + 3] = a0, a1, a2, a3
    out[1, d], out[1, d + 1], out[1, d + 2], out[1, d + 3] = b0, b1, b2, b3


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
    """rows[r : r + 2] = the logits of queries i and i + 1, in units of log 2."""
    for n in range(2):
        row = min(i + n, bias.shape[2] - 1)
        for j in range(rows.shape[1]):
            rows[r + n, j] = bias[kind, head, row, j] * _LOG2E
    for d in range(0, q.shape[1], 4):
        _add(rows, r, q, i, d, k_t, d)


@jit
def _forward(task, qkv, bias, kinds, out, lse):  # type: ignore[no-untyped-def]
    tokens, heads, width = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    window, head = task // heads, task % heads
    q = _load(qkv, window, 0, head) * (_LOG2E / np.float32(np.sqrt(width)))
    k_t = _transpose(_load(qkv, window, 1, head), tokens)
    v_t = _transpose(_load(qkv, window, 2, head), tokens)
    weights = np.empty((2, tokens), np.float32)
    y, maxima = np.empty((2, len(v_t)), np.float32), np.empty(2, np.float32)
    for first in range(0, tokens, 2):
        _logits(weights, 0, bias, kinds[window], head, q, first, k_t)
        for r in range(2):
            largest = _max(weights, r)
            for j in range(tokens):
                weights[r, j] = exp2(weights[r, j] - largest)
            maxima[r] = largest
        for d in range(0, width, 4):
            _dot(weights, 0, v_t, d, y)
        for r in range(min(2, tokens - first)):
            total = _sum(weights, r)
            lse[window, head, first + r] = maxima[r] + np.log2(total)
            for d in range(width):
                out[window, first + r, 0, head, d] = y[r, d] / total


@jit
def _backward(task, grad_out, qkv, bias, kinds, out, lse, order, groups, grad_qkv, part_bias):  # type: ignore[no-untyped-def]
    tokens, heads, width = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    group, head = task // heads, task % heads
    scale = np.float32(1) / np.float32(np.sqrt(width))
    weights = np.zeros((4, tokens), np.float32)
    grad_logits = np.zeros((4, tokens), np.float32)
    for window in order[groups[group] : groups[group + 1]]:
        q = _load(qkv, window, 0, head) * (_LOG2E * scale)
        grad = _load(grad_out, window, 0, head)
        k_t = _transpose(_load(qkv, window, 1, head), tokens)
        v_t = _transpose(_load(qkv, window, 2, head), tokens)
        q_t, grad_t = _transpose(q, len(q)), _transpose(grad, len(grad))
        grad_q = np.empty((2, len(k_t)), np.float32)
        grad_k, grad_v = np.zeros(k_t.shape, np.float32), np.zeros(v_t.shape, np.float32)
        for first in range(0, tokens, 4):
            for pair in range(0, 4, 2):
                if first + pair < tokens:
                    _logits(weights, pair, bias, kinds[window], head, q, first + pair, k_t)
                for r in range(pair, min(pair + 2, tokens - first)):
                    i = first + r
                    log_sum, delta = lse[window, head, i], np.float32(0)
                    for d in range(width):
                        delta += grad[i, d] * out[window, i, 0, head, d]
                    for j in range(tokens):
                        weights[r, j] = exp2(weights[r, j] - log_sum)
                        grad_logits[r, j] = -delta
                for d in range(0, len(v_t), 4):
                    _add(grad_logits, pair, grad, first + pair, d, v_t, d)
                for r in range(pair, min(pair + 2, tokens - first)):
                    for j in range(tokens):
                        grad_logits[r, j] *= weights[r, j]
                        part_bias[group, head, first + r, j] += grad_logits[r, j]
                for d in range(0, width, 4):
                    _dot(grad_logits, pair, k_t, d, grad_q)
                for r in range(pair, min(pair + 2, tokens - first)):
                    for d in range(width):
                        grad_qkv[window, first + r, 0, head, d] = grad_q[r - pair, d] * scale
            for d in range(0, width, 2):  # rows behind the last query meet zeros in q and grad
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
