"""Window attention on the CPU: loops compiled by numba that keep a few queries' logits in the cache and none in memory.

PyTorch's own fast attention gives no gradient to a bias on a CPU, and falls back to plain operations that write, read
and keep the logits of all windows: 32 MiB each time, in every layer, for two 64×64 pictures. Here the backward pass
computes them again, from the logarithm of each query's sum that the forward pass leaves. A window's pixels are read
and written where they are in the picture.

Four queries at a time meet vectors of sixteen keys or channels. Tiles have zeros behind the last query, key and
channel; keys that do not exist get the bias `_NEVER`. The table of biases is turned around, so that those of a query
and one row of keys lie one after the other.

Tasks are the same whatever the number of threads, and the gradient of the table is summed in a fixed order: results are
equal to the bit on any number of threads, and a sample's do not depend on its batch.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mambair_ds.kernels.cpu import exp2, jit, jit_inline, run_tasks
from mambair_ds.kernels.vectors import LANES, largest, load, spread, store, total
from mambair_ds.kernels.window_attention.operator import make_operator

_ZERO = np.float32(0)
_LOG2E = np.float32(1.4426950408889634)
_MASK = np.float32(-100 * 1.4426950408889634)
_NEVER = np.float32(-1e30)


@jit
def _places(window, height, width, size, shift):  # type: ignore[no-untyped-def]
    """Of the pixels of a window: their places in the batch, and their regions (see the reference)."""
    count = height // size * (width // size)
    sample, top, left = window // count, window % count // (width // size) * size, window % (width // size) * size
    places, regions = np.empty(size * size, np.int64), np.empty(size * size, np.int32)
    for row in range(size):
        y = top + row
        start = (sample * height + (y + shift) % height) * width
        for column in range(size):
            x = left + column
            regions[row * size + column] = 2 * (y >= height - shift) + (x >= width - shift)
            places[row * size + column] = start + (x + shift) % width
    return places, regions


@jit
def _up(number):  # type: ignore[no-untyped-def]
    return (number + LANES - 1) // LANES * LANES


@jit
def _load(x, places, first, width):  # type: ignore[no-untyped-def]
    """x[places, first : first + width] with zeros up to multiples of `LANES`."""
    tile = np.zeros((_up(len(places)), _up(width)), np.float32)
    for i in range(len(places)):
        for d in range(width):
            tile[i, d] = x[places[i], first + d]
    return tile


@jit
def _turn(tile, width):  # type: ignore[no-untyped-def]
    """The first `width` columns as rows."""
    turned = np.empty((width, len(tile)), np.float32)
    for i in range(len(tile)):
        for d in range(width):
            turned[d, i] = tile[i, d]
    return turned


@jit_inline
def _multiply(sums, left, i, right, j):  # type: ignore[no-untyped-def]
    """Four vectors: sums + left[i : i + 4] @ right[:, j : j + LANES]."""
    a, b, c, e = sums
    for d in range(len(right)):
        vector = load(right, (d, j))
        a += vector * left[i, d]
        b += vector * left[i + 1, d]
        c += vector * left[i + 2, d]
        e += vector * left[i + 3, d]
    return a, b, c, e


@jit_inline
def _add_outer(sums, rows, i, vectors, j):  # type: ignore[no-untyped-def]
    """sums[:, j : j + LANES] += rows[i : i + 4]ᵀ @ vectors."""
    for d in range(len(sums)):
        vector = vectors[0] * rows[i, d] + load(sums, (d, j))
        vector += vectors[1] * rows[i + 1, d]
        vector += vectors[2] * rows[i + 2, d]
        store(sums, (d, j), vector + vectors[3] * rows[i + 3, d])


@jit_inline
def _load_four(tile, i, j):  # type: ignore[no-untyped-def]
    return load(tile, (i, j)), load(tile, (i + 1, j)), load(tile, (i + 2, j)), load(tile, (i + 3, j))


@jit_inline
def _store_four(tile, i, j, vectors):  # type: ignore[no-untyped-def]
    store(tile, (i, j), vectors[0])
    store(tile, (i + 1, j), vectors[1])
    store(tile, (i + 2, j), vectors[2])
    store(tile, (i + 3, j), vectors[3])


@jit
def _masks(keys, width):  # type: ignore[no-untyped-def]
    """(4, width): what the logits of a query of each region get for `keys`, the keys' regions, and for none at all."""
    masks = np.full((4, width), _NEVER)
    for region in range(4):
        for j in range(len(keys)):
            masks[region, j] = _ZERO if keys[j] == region else _MASK
    return masks


@jit_inline
def _load_biases(tile, turned, masks, masked, regions, head, size, first):  # type: ignore[no-untyped-def]
    """tile[:4] = what is added to the logits of queries first to first + 3."""
    for r in range(min(4, len(regions) - first)):
        down, across = (first + r) // size, (first + r) % size
        for row in range(size):
            for column in range(0, size, LANES):  # what is too much is overwritten by the next row
                bias = load(turned, (head, row - down + size - 1, column - across + size - 1))
                store(tile, (r, row * size + column), bias)
        if masked:
            for j in range(0, masks.shape[1], LANES):
                store(tile, (r, j), load(tile, (r, j)) + load(masks, (regions[first + r], j)))


@jit_inline
def _add_to_table(turned, window, head, tile, r, size, i):  # type: ignore[no-untyped-def]
    """Add row r of the logits' gradient, that of query i, to the turned table's gradient."""
    down, across = i // size, i % size
    for row in range(size):
        # An unsigned index is not one that counts from the end, so that the loop is vectorized.
        at, before, j = np.uint64(row - down + size - 1), np.uint64(size - 1 - across), np.uint64(row * size)
        for column in range(np.uint64(size)):
            turned[window, head, at, before + column] += tile[r, j + column]


@jit
def _forward(task, qkv, turned, height, width, size, shift, out, lse):  # type: ignore[no-untyped-def]
    heads, dim = len(turned), out.shape[1] // len(turned)
    window, head = task // heads, task % heads
    places, regions = _places(window, height, width, size, shift)
    tokens = size * size
    q = _load(qkv, places, head * dim, dim) * (_LOG2E / np.float32(np.sqrt(dim)))
    k_t = _turn(_load(qkv, places, (heads + head) * dim, dim), dim)
    v = _load(qkv, places, (2 * heads + head) * dim, dim)
    masks, masked = _masks(regions, len(v)), len(v) > tokens or np.any(regions != regions[0])
    weights = np.zeros((4, len(v) + LANES), np.float32)
    y = np.empty((4, v.shape[1]), np.float32)
    highest, sums = np.empty(4, np.float32), np.empty(4, np.float32)
    for first in range(0, tokens, 4):
        _load_biases(weights, turned, masks, masked, regions, head, size, first)
        a = b = c = e = spread(_NEVER)
        for j in range(0, len(v), LANES):
            logits = _multiply(_load_four(weights, 0, j), q, first, k_t, j)
            _store_four(weights, 0, j, logits)
            a, b, c, e = max(logits[0], a), max(logits[1], b), max(logits[2], c), max(logits[3], e)
        highest[0], highest[1], highest[2], highest[3] = largest(a), largest(b), largest(c), largest(e)
        for r in range(4):
            vector = spread(_ZERO)
            for j in range(0, len(v), LANES):
                weight = exp2(load(weights, (r, j)) - highest[r])
                store(weights, (r, j), weight)
                vector += weight
            sums[r] = total(vector)
        zero = spread(_ZERO)
        for d in range(0, v.shape[1], LANES):
            _store_four(y, 0, d, _multiply((zero, zero, zero, zero), weights, 0, v, d))
        for r in range(min(4, tokens - first)):
            place, rate = places[first + r], np.float32(1) / sums[r]
            lse[place, head] = highest[r] + np.log2(sums[r])
            for d in range(dim):
                out[place, head * dim + d] = y[r, d] * rate


@jit
def _backward(task, grad_out, out, lse, qkv, turned, height, width, size, shift, grad_qkv, part_turned):  # type: ignore[no-untyped-def]
    heads, dim = len(turned), out.shape[1] // len(turned)
    window, head = task // heads, task % heads
    places, regions = _places(window, height, width, size, shift)
    tokens = size * size
    scale = np.float32(1) / np.float32(np.sqrt(dim))
    q = _load(qkv, places, head * dim, dim) * (_LOG2E * scale)
    grad = _load(grad_out, places, head * dim, dim)
    k, v = _load(qkv, places, (heads + head) * dim, dim), _load(qkv, places, (2 * heads + head) * dim, dim)
    k_t, v_t = _turn(k, dim), _turn(v, dim)
    grad_k, grad_v = np.zeros(k_t.shape, np.float32), np.zeros(k_t.shape, np.float32)
    sums, deltas = np.zeros(len(q), np.float32), np.zeros(len(q), np.float32)
    for i in range(tokens):
        sums[i] = lse[places[i], head]
        for d in range(dim):
            deltas[i] -= grad[i, d] * out[places[i], head * dim + d]
    masks, masked = _masks(regions, len(k)), len(k) > tokens or np.any(regions != regions[0])
    weights = np.zeros((4, len(k) + LANES), np.float32)
    grad_logits, grad_q = np.empty((4, len(k)), np.float32), np.empty((4, k.shape[1]), np.float32)
    for first in range(0, tokens, 4):
        _load_biases(weights, turned, masks, masked, regions, head, size, first)
        for j in range(0, len(k), LANES):
            a, b, c, e = _multiply(_load_four(weights, 0, j), q, first, k_t, j)
            a, b = exp2(a - sums[first]), exp2(b - sums[first + 1])
            c, e = exp2(c - sums[first + 2]), exp2(e - sums[first + 3])
            # Rows behind the last query meet zeros in the gradient, and in q.
            _add_outer(grad_v, grad, first, (a, b, c, e), j)
            inner = (
                spread(deltas[first]),
                spread(deltas[first + 1]),
                spread(deltas[first + 2]),
                spread(deltas[first + 3]),
            )
            inner = _multiply(inner, grad, first, v_t, j)
            a, b, c, e = a * inner[0], b * inner[1], c * inner[2], e * inner[3]
            _add_outer(grad_k, q, first, (a, b, c, e), j)
            _store_four(grad_logits, 0, j, (a, b, c, e))
        for r in range(min(4, tokens - first)):
            _add_to_table(part_turned, window, head, grad_logits, r, size, first + r)
        zero = spread(_ZERO)
        for d in range(0, k.shape[1], LANES):
            _store_four(grad_q, 0, d, _multiply((zero, zero, zero, zero), grad_logits, 0, k, d))
        for r in range(min(4, tokens - first)):
            for d in range(dim):
                grad_qkv[places[first + r], head * dim + d] = grad_q[r, d] * scale
    for j in range(tokens):
        for d in range(dim):  # q carries the scale, and the base of 2
            grad_qkv[places[j], (heads + head) * dim + d] = grad_k[d, j] / _LOG2E
            grad_qkv[places[j], (2 * heads + head) * dim + d] = grad_v[d, j]


def _rows(x: Tensor) -> np.ndarray:
    return x.detach().float().flatten(0, 2).numpy()


def _turned(table: Tensor, window_size: int) -> np.ndarray:
    """(heads, 2w - 1, 2w - 1 and more) in units of log 2, in which both differences are from query to key."""
    side = 2 * window_size - 1
    turned = table.detach().float().T.flip(1).reshape(-1, side, side) * float(_LOG2E)
    return pad(turned, (0, LANES)).numpy()


def forward(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    """See `make_operator`."""
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty((batch, height, width, channels // 3), dtype=torch.float32)
    lse = qkv.new_empty((batch, height, width, num_heads), dtype=torch.float32)
    tasks = qkv[..., 0].numel() // window_size**2 * num_heads
    sizes = (height, width, window_size, shift)
    run_tasks(_forward, tasks, _rows(qkv), _turned(table, window_size), *sizes, _rows(out), _rows(lse))
    return out.to(qkv.dtype), lse


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int
) -> tuple[Tensor, Tensor]:
    """See `make_operator`."""
    height, width = qkv.shape[1:3]
    windows = qkv[..., 0].numel() // window_size**2
    turned = _turned(table, window_size)
    part_turned = np.zeros((windows, num_heads, 2 * window_size - 1, 2 * window_size - 1), np.float32)
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
