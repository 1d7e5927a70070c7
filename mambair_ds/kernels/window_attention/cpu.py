"""Window attention on the CPU: loops compiled by numba that keep a few queries' logits in the cache and none in memory.

PyTorch's own fast attention gives no gradient to a bias on a CPU, and falls back to plain operations that write, read
and keep the logits of all windows: 32 MiB each time, in every layer, for two 64×64 pictures. Here the backward pass
computes them again, from the logarithm of each query's sum that the forward pass leaves. A window's pixels are read
and written where they are in the picture.

Every inner loop over a product runs over the keys of a window, for two rows and four channels or queries at once: eight
multiply-adds for six numbers that it reads. Tiles have zeros behind the last query and channel to make up the fours.
The bias table is turned around, so that the biases of a query and one row of keys lie one after the other.

Tasks are the same whatever the number of threads, and the gradient of the table is summed in a fixed order: results are
equal to the bit on any number of threads, and a sample's do not depend on its batch.
"""

import numpy as np
import torch
from torch import Tensor

from mambair_ds.kernels.cpu import exp2, jit, jit_reassociating, run_tasks
from mambair_ds.kernels.window_attention.operator import make_operator

_LOG2E = np.float32(1.4426950408889634)
_MASK = np.float32(-100 * 1.4426950408889634)


@jit
def _places(window, height, width, size, shift):  # type: ignore[no-untyped-def]
    """Of the pixels of a window: their places in the batch, and their regions (see the reference)."""
    count = height // size * (width // size)
    sample, top, left = window // count, window % count // (width // size) * size, window % (width // size) * size
    places, regions = np.empty(size * size, np.int64), np.empty(size * size, np.int32)
    for i in range(size * size):
        row, column = top + i // size, left + i % size
        regions[i] = 2 * (row >= height - shift) + (column >= width - shift)
        places[i] = (sample * height + (row + shift) % height) * width + (column + shift) % width
    return places, regions


@jit
def _load(x, places, first, width):  # type: ignore[no-untyped-def]
    """x[places, first : first + width] with zeros up to multiples of 4."""
    tile = np.zeros(((len(places) + 3) // 4 * 4, (width + 3) // 4 * 4), np.float32)
    for i in range(len(places)):
        for d in range(width):
            tile[i, d] = x[places[i], first + d]
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
def _logits(rows, r, turned, regions, seam, q, i, k_t):  # type: ignore[no-untyped-def]
    """rows[r : r + 2] = the logits of queries i and i + 1, in units of log 2, where these exist."""
    size = (len(turned) + 1) // 2
    for n in range(min(2, len(regions) - i)):
        down, across = (i + n) // size, (i + n) % size
        for row in range(size):
            for column in range(size):
                bias = turned[row - down + size - 1, column - across + size - 1]
                rows[r + n, row * size + column] = bias * _LOG2E
        if seam:
            for j in range(len(regions)):
                rows[r + n, j] += _MASK if regions[j] != regions[i + n] else np.float32(0)
    for d in range(0, q.shape[1], 4):
        _add(rows, r, q, i, d, k_t, d)


@jit
def _add_to_table(turned, rows, r, i):  # type: ignore[no-untyped-def]
    """Add row r of the logits' gradient, that of query i, to the turned table's gradient."""
    size = (len(turned) + 1) // 2
    down, across = i // size, i % size
    for row in range(size):
        for column in range(size):
            turned[row - down + size - 1, column - across + size - 1] += rows[r, row * size + column]


@jit
def _forward(task, qkv, turned, height, width, size, shift, out, lse):  # type: ignore[no-untyped-def]
    heads, dim = len(turned), out.shape[1] // len(turned)
    window, head = task // heads, task % heads
    places, regions = _places(window, height, width, size, shift)
    tokens, seam = size * size, np.any(regions != regions[0])
    q = _load(qkv, places, head * dim, dim) * (_LOG2E / np.float32(np.sqrt(dim)))
    k_t = _transpose(_load(qkv, places, (heads + head) * dim, dim), tokens)
    v_t = _transpose(_load(qkv, places, (2 * heads + head) * dim, dim), tokens)
    weights = np.zeros((2, tokens), np.float32)
    y, maxima = np.empty((2, len(v_t)), np.float32), np.empty(2, np.float32)
    for first in range(0, tokens, 2):
        _logits(weights, 0, turned[head], regions, seam, q, first, k_t)
        for r in range(2):
            largest = _max(weights, r)
            for j in range(tokens):
                weights[r, j] = exp2(weights[r, j] - largest)
            maxima[r] = largest
        for d in range(0, dim, 4):
            _dot(weights, 0, v_t, d, y)
        for r in range(min(2, tokens - first)):
            total, place = _sum(weights, r), places[first + r]
            lse[place, head] = maxima[r] + np.log2(total)
            for d in range(dim):
                out[place, head * dim + d] = y[r, d] / total


@jit
def _backward(task, grad_out, out, lse, qkv, turned, height, width, size, shift, grad_qkv, part_turned):  # type: ignore[no-untyped-def]
    heads, dim = len(turned), out.shape[1] // len(turned)
    window, head = task // heads, task % heads
    places, regions = _places(window, height, width, size, shift)
    tokens, seam = size * size, np.any(regions != regions[0])
    scale = np.float32(1) / np.float32(np.sqrt(dim))
    weights = np.zeros((4, tokens), np.float32)
    grad_logits = np.zeros((4, tokens), np.float32)
    q = _load(qkv, places, head * dim, dim) * (_LOG2E * scale)
    grad = _load(grad_out, places, head * dim, dim)
    k_t = _transpose(_load(qkv, places, (heads + head) * dim, dim), tokens)
    v_t = _transpose(_load(qkv, places, (2 * heads + head) * dim, dim), tokens)
    q_t, grad_t = _transpose(q, len(q)), _transpose(grad, len(grad))
    grad_q = np.empty((2, len(k_t)), np.float32)
    grad_k, grad_v = np.zeros(k_t.shape, np.float32), np.zeros(v_t.shape, np.float32)
    for first in range(0, tokens, 4):
        for pair in range(0, 4, 2):
            if first + pair < tokens:
                _logits(weights, pair, turned[head], regions, seam, q, first + pair, k_t)
            for r in range(pair, min(pair + 2, tokens - first)):
                place, i = places[first + r], first + r
                log_sum, delta = lse[place, head], np.float32(0)
                for d in range(dim):
                    delta += grad[i, d] * out[place, head * dim + d]
                for j in range(tokens):
                    weights[r, j] = exp2(weights[r, j] - log_sum)
                    grad_logits[r, j] = -delta
            for d in range(0, len(v_t), 4):
                _add(grad_logits, pair, grad, first + pair, d, v_t, d)
            for r in range(pair, min(pair + 2, tokens - first)):
                for j in range(tokens):
                    grad_logits[r, j] *= weights[r, j]
                _add_to_table(part_turned[window, head], grad_logits, r, first + r)
            for d in range(0, dim, 4):
                _dot(grad_logits, pair, k_t, d, grad_q)
            for r in range(pair, min(pair + 2, tokens - first)):
                for d in range(dim):
                    grad_qkv[places[first + r], head * dim + d] = grad_q[r - pair, d] * scale
        for d in range(0, dim, 2):  # rows behind the last query meet zeros in q and grad
            _add(grad_k, d, q_t, d, first, grad_logits, 0)
            _add(grad_v, d, grad_t, d, first, weights, 0)
    for j in range(tokens):
        for d in range(dim):  # q carries the scale, and the base of 2
            grad_qkv[places[j], (heads + head) * dim + d] = grad_k[d, j] / _LOG2E
            grad_qkv[places[j], (2 * heads + head) * dim + d] = grad_v[d, j]


def _rows(x: Tensor) -> np.ndarray:
    return x.detach().float().flatten(0, 2).numpy()


def _turn(table: Tensor, window_size: int) -> np.ndarray:
    """(heads, 2w - 1, 2w - 1), in which both differences are from query to key."""
    side = 2 * window_size - 1
    return table.detach().float().T.flip(1).reshape(-1, side, side).contiguous().numpy()


def forward(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    """See `make_operator`."""
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty((batch, height, width, channels // 3), dtype=torch.float32)
    lse = qkv.new_empty((batch, height, width, num_heads), dtype=torch.float32)
    tasks = qkv[..., 0].numel() // window_size**2 * num_heads
    sizes = (height, width, window_size, shift)
    run_tasks(_forward, tasks, _rows(qkv), _turn(table, window_size), *sizes, _rows(out), _rows(lse))
    return out.to(qkv.dtype), lse


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int
) -> tuple[Tensor, Tensor]:
    """See `make_operator`."""
    height, width = qkv.shape[1:3]
    windows = qkv[..., 0].numel() // window_size**2
    turned = _turn(table, window_size)
    part_turned = np.zeros((windows, *turned.shape), np.float32)
    grad_qkv = torch.empty_like(qkv, dtype=torch.float32)
    sizes = (height, width, window_size, shift)
    tensors = (_rows(x) for x in (grad, out, lse, qkv))
    run_tasks(_backward, windows * num_heads, *tensors, turned, *sizes, _rows(grad_qkv), part_turned)
    grad_table = torch.from_numpy(part_turned.sum(0)).flatten(1).flip(1).T
    return grad_qkv.to(qkv.dtype), grad_table.to(table.dtype).contiguous()


_operator = make_operator("window_attention_cpu", forward, backward)


def window_attention(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> Tensor:
    """See `mambair_ds.kernels.window_attention.window_attention`."""
    return _operator(qkv, table, num_heads, window_size, shift)[0]
