"""Window attention on GPUs: the logits of a window live in registers, and nothing is rolled, cut or padded in memory.

A program reads queries, keys and values of one head straight from the picture, at the coordinates that its window has
in the rolled picture; heads are padded with zeros to a power of two on their way into registers. The bias is looked up
in the head's table, of 961 numbers for windows of 16, for each logit; they go where the product of queries and keys is
summed.

- `attend`: a program has a window and a head, and takes some queries after the other with all their keys.
- `differentiate_queries`: a program has some queries of a head, and takes one window after the other with all their
  keys. That gives the gradient of the queries, and in registers the sum over windows of the logits' gradient, which is
  that of the bias.
- `differentiate_keys`: a program has a window, a head and some keys, and takes some queries after the other.
- `sum_diagonals`: adds up what belongs to the same relative position.

There are no atomics: every sum has a fixed order, so two runs agree to the bit.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.window_attention.operator import make_operator

GROUPS = 16  # into which the windows are divided, and each of which has its own sum of the bias' gradient
WARPS = {"attend": 4, "differentiate_queries": 8, "differentiate_keys": 8, "sum_diagonals": 1}

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _window(window, height, width, WINDOW: tl.constexpr):
    """The sample of this window of all, and its first row and column."""
    across = width // WINDOW
    count = height // WINDOW * across
    place = window % count
    return (window // count).to(tl.int64), place // across * WINDOW, place % across * WINDOW


@triton.jit
def _tokens(first, top, left, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr):
    """Of COUNT pixels of a window: their places in the picture, regions (see the reference), and places in the table.

    The bias of query and key has the difference of their places in the table as its place there.
    """
    token = first + tl.arange(0, COUNT)
    row, column = token // WINDOW, token % WINDOW
    entry = row * (2 * WINDOW - 1) + column
    row += top
    column += left
    region = (row >= height - SHIFT).to(tl.int32) * 2 + (column >= width - SHIFT).to(tl.int32)
    if SHIFT:
        row = tl.where(row >= height - SHIFT, row + SHIFT - height, row + SHIFT)
        column = tl.where(column >= width - SHIFT, column + SHIFT - width, column + SHIFT)
    return row * width + column, region, entry


@triton.jit
def _load(x, place, stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows of x, `stride` elements apart, with zeros behind their DIM numbers."""
    d = tl.arange(0, PADDED)
    return tl.load(x + place[:, None] * stride + d[None], mask=(d < DIM)[None], other=0.0)


@triton.jit
def _store(x, place, stride, value, DIM: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    pointers = x + place[:, None] * stride + d[None]
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(d < DIM)[None])


INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which multiplies bfloat16 as integers


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _logits(
    a, b, entry, region_a, region_b, seam, table, SCALE: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr
):
    """The logits of rows a and columns b, divided by `SCALE`; the table has been, too."""
    logits = _dot(a, tl.trans(b), tl.load(table + entry), PRECISION)
    if SHIFT and seam:
        logits = tl.where(region_a[:, None] == region_b[None], logits, logits - 100.0 / SCALE)
    return logits


@triton.jit
def attend(
    qkv, table, out, lse, height, width,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    QUERIES: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, H, W, C) and lse (B, H, W, heads) of qkv (B, H, W, 3·C) and table (heads, (2w - 1)²) over SCALE."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    CENTER: tl.constexpr = 2 * WINDOW * (WINDOW - 1)
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    UNIT: tl.constexpr = SCALE * LOG2E
    head = tl.program_id(0) % HEADS
    sample, top, left = _window(tl.program_id(0) // HEADS, height, width, WINDOW)
    seam = (top + WINDOW == height) | (left + WINDOW == width)
    qkv += sample * height * width * STRIDE + head * DIM
    out += sample * height * width * (HEADS * DIM) + head * DIM
    lse += sample * height * width * HEADS + head
    table += head * ((2 * WINDOW - 1) * (2 * WINDOW - 1)) + CENTER
    place_k, region_k, entry_k = _tokens(0, top, left, height, width, WINDOW, SHIFT, TOKENS)
    k = _load(qkv + HEADS * DIM, place_k, STRIDE, DIM, PADDED)
    v = _load(qkv + 2 * HEADS * DIM, place_k, STRIDE, DIM, PADDED)
    for first in range(0, TOKENS, QUERIES):
        place, region, entry = _tokens(first, top, left, height, width, WINDOW, SHIFT, QUERIES)
        q = _load(qkv, place, STRIDE, DIM, PADDED)
        logits = _logits(q, k, entry[:, None] - entry_k[None], region, region_k, seam, table, SCALE, SHIFT, PRECISION)
        largest = tl.max(logits, 1) * UNIT
        weights = tl.exp2(logits * UNIT - largest[:, None])
        total = tl.sum(weights, 1)
        y = _dot(weights.to(v.dtype), v, None, PRECISION) / total[:, None]
        _store(out, place, HEADS * DIM, y, DIM, PADDED)
        tl.store(lse + place * HEADS, largest + tl.log2(total))


@triton.jit
def differentiate_queries(
    grad, out, lse, qkv, table, grad_qkv, delta, part, windows, groups, height, width,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, each query's product of result and gradient (B, H, W, heads), and of each group of windows
    the sum of the logits' gradients, (groups, heads, w², w²)."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    CENTER: tl.constexpr = 2 * WINDOW * (WINDOW - 1)
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    BLOCKS: tl.constexpr = TOKENS // QUERIES
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS % BLOCKS * QUERIES
    group = tl.program_id(0) // (HEADS * BLOCKS)
    table += head * ((2 * WINDOW - 1) * (2 * WINDOW - 1)) + CENTER
    sums = ()
    for _ in tl.static_range(TOKENS // KEYS):
        sums = sums + (tl.zeros((QUERIES, KEYS), tl.float32),)
    for window in range(group, windows, groups):
        sample, top, left = _window(window, height, width, WINDOW)
        seam = (top + WINDOW == height) | (left + WINDOW == width)
        x = qkv + sample * height * width * STRIDE + head * DIM
        offset = sample * height * width * (HEADS * DIM) + head * DIM
        place, region, entry = _tokens(first, top, left, height, width, WINDOW, SHIFT, QUERIES)
        numbers = sample * height * width * HEADS + head + place * HEADS
        q = _load(x, place, STRIDE, DIM, PADDED)
        g = _load(grad + offset, place, HEADS * DIM, DIM, PADDED)
        y = _load(out + offset, place, HEADS * DIM, DIM, PADDED)
        product = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
        tl.store(delta + numbers, product)
        logarithm = tl.load(lse + numbers)
        grad_q = tl.zeros((QUERIES, PADDED), tl.float32)
        new_sums = ()
        for i in tl.static_range(TOKENS // KEYS):
            place_k, region_k, entry_k = _tokens(i * KEYS, top, left, height, width, WINDOW, SHIFT, KEYS)
            k = _load(x + HEADS * DIM, place_k, STRIDE, DIM, PADDED)
            v = _load(x + 2 * HEADS * DIM, place_k, STRIDE, DIM, PADDED)
            logits = _logits(
                q, k, entry[:, None] - entry_k[None], region, region_k, seam, table, SCALE, SHIFT, PRECISION
            )
            weights = tl.exp2(logits * (SCALE * LOG2E) - logarithm[:, None])
            grad_logits = weights * (_dot(g, tl.trans(v), None, PRECISION) - product[:, None])
            new_sums = new_sums + (sums[i] + grad_logits,)
            grad_q = _dot(grad_logits.to(k.dtype), k, grad_q, PRECISION)
        sums = new_sums
        _store(grad_qkv + sample * height * width * STRIDE + head * DIM, place, STRIDE, grad_q * SCALE, DIM, PADDED)
    row = (group * HEADS + head) * TOKENS + first + tl.arange(0, QUERIES)
    for i in tl.static_range(TOKENS // KEYS):
        column = i * KEYS + tl.arange(0, KEYS)
        tl.store(part + row[:, None] * TOKENS + column[None], sums[i])


@triton.jit
def differentiate_keys(
    grad, lse, delta, qkv, table, grad_qkv, height, width,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    CENTER: tl.constexpr = 2 * WINDOW * (WINDOW - 1)
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    BLOCKS: tl.constexpr = TOKENS // KEYS
    head = tl.program_id(0) % HEADS
    first_key = tl.program_id(0) // HEADS % BLOCKS * KEYS
    sample, top, left = _window(tl.program_id(0) // (HEADS * BLOCKS), height, width, WINDOW)
    seam = (top + WINDOW == height) | (left + WINDOW == width)
    qkv += sample * height * width * STRIDE + head * DIM
    grad_qkv += sample * height * width * STRIDE + head * DIM
    grad += sample * height * width * (HEADS * DIM) + head * DIM
    lse += sample * height * width * HEADS + head
    delta += sample * height * width * HEADS + head
    table += head * ((2 * WINDOW - 1) * (2 * WINDOW - 1)) + CENTER
    place_k, region_k, entry_k = _tokens(first_key, top, left, height, width, WINDOW, SHIFT, KEYS)
    k = _load(qkv + HEADS * DIM, place_k, STRIDE, DIM, PADDED)
    v = _load(qkv + 2 * HEADS * DIM, place_k, STRIDE, DIM, PADDED)
    grad_k = tl.zeros((KEYS, PADDED), tl.float32)
    grad_v = tl.zeros((KEYS, PADDED), tl.float32)
    for first in range(0, TOKENS, QUERIES):
        place, region, entry = _tokens(first, top, left, height, width, WINDOW, SHIFT, QUERIES)
        q = _load(qkv, place, STRIDE, DIM, PADDED)
        g = _load(grad, place, HEADS * DIM, DIM, PADDED)
        logits = _logits(k, q, entry[None] - entry_k[:, None], region_k, region, seam, table, SCALE, SHIFT, PRECISION)
        weights = tl.exp2(logits * (SCALE * LOG2E) - tl.load(lse + place * HEADS)[None])
        grad_v = _dot(weights.to(g.dtype), g, grad_v, PRECISION)
        grad_logits = weights * (_dot(v, tl.trans(g), None, PRECISION) - tl.load(delta + place * HEADS)[None])
        grad_k = _dot(grad_logits.to(q.dtype), q, grad_k, PRECISION)
    _store(grad_qkv + HEADS * DIM, place_k, STRIDE, grad_k * SCALE, DIM, PADDED)
    _store(grad_qkv + 2 * HEADS * DIM, place_k, STRIDE, grad_v, DIM, PADDED)


@triton.jit
def sum_diagonals(grad_bias, grad_table, WINDOW: tl.constexpr, HEADS: tl.constexpr):
    """(heads, w², w²) to (heads, (2w - 1)²); a program has a head and a difference of rows."""
    SIDE: tl.constexpr = 2 * WINDOW - 1
    head = tl.program_id(0) // SIDE
    down = tl.program_id(0) % SIDE - (WINDOW - 1)
    column = tl.arange(0, WINDOW)[:, None]
    across = tl.arange(0, 2 * WINDOW)[None] - (WINDOW - 1)
    valid = (column - across >= 0) & (column - across < WINDOW)
    total = tl.zeros((2 * WINDOW,), tl.float32)
    for row in range(tl.maximum(down, 0), WINDOW + tl.minimum(down, 0)):
        place = ((head * WINDOW + row) * WINDOW + column) * (WINDOW * WINDOW) + (row - down) * WINDOW + column - across
        total += tl.sum(tl.load(grad_bias + place, mask=valid, other=0.0), 0)
    d = tl.arange(0, 2 * WINDOW)
    tl.store(grad_table + tl.program_id(0) * SIDE + d, total, mask=d < SIDE)


def constants(kernel: str, channels: int, heads: int, window: int, shift: int, dtype: torch.dtype) -> dict[str, Any]:
    """The `tl.constexpr` arguments of a kernel but `sum_diagonals`, for `channels` of a result."""
    dim, tokens = channels // heads, window**2
    shared = {
        "HEADS": heads, "DIM": dim, "PADDED": max(16, triton.next_power_of_2(dim)), "WINDOW": window, "SHIFT": shift,
        "SCALE": dim**-0.5, "PRECISION": "tf32x3",
    }  # fmt: skip
    blocks = BLOCKS[dtype == torch.float32][kernel]
    return shared | {name: min(size, tokens) for name, size in blocks.items()}


BLOCKS = {
    False: {
        "attend": {"QUERIES": 64},
        "differentiate_queries": {"QUERIES": 64, "KEYS": 128},
        "differentiate_keys": {"QUERIES": 64, "KEYS": 128},
    },
    True: {
        "attend": {"QUERIES": 64},
        "differentiate_queries": {"QUERIES": 64, "KEYS": 128},
        "differentiate_keys": {"QUERIES": 32, "KEYS": 128},
    },
}


def _windows(x: Tensor, window: int) -> int:
    return x.shape[0] * (x.shape[1] // window) * (x.shape[2] // window)


def _table(table: Tensor, dim: int) -> Tensor:
    """A head's numbers together, in the unit of the products of queries and keys."""
    return table.float().T.mul(dim**0.5).contiguous()


def forward(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    """See `make_operator`."""
    *pixels, channels = qkv.shape
    channels //= 3
    out = qkv.new_empty((*pixels, channels))
    lse = qkv.new_empty((*pixels, num_heads), dtype=torch.float32)
    settings = constants("attend", channels, num_heads, window_size, shift, qkv.dtype)
    with torch.cuda.device_of(qkv):
        attend[(_windows(qkv, window_size) * num_heads,)](
            qkv, _table(table, channels // num_heads), out, lse, *pixels[1:], **settings, num_warps=WARPS["attend"]
        )
    return out, lse


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int
) -> tuple[Tensor, Tensor]:
    """See `make_operator`."""
    channels, sizes, tokens = out.shape[-1], qkv.shape[1:3], window_size**2
    windows = _windows(qkv, window_size)
    groups = min(GROUPS, windows)
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    part = lse.new_empty(groups, num_heads, tokens, tokens)
    scaled = _table(table, channels // num_heads)
    with torch.cuda.device_of(qkv):
        settings = constants("differentiate_queries", channels, num_heads, window_size, shift, qkv.dtype)
        differentiate_queries[(groups * num_heads * (tokens // settings["QUERIES"]),)](
            grad, out, lse, qkv, scaled, grad_qkv, delta, part, windows, groups, *sizes, **settings,
            num_warps=WARPS["differentiate_queries"],
        )  # fmt: skip
        settings = constants("differentiate_keys", channels, num_heads, window_size, shift, qkv.dtype)
        differentiate_keys[(windows * num_heads * (tokens // settings["KEYS"]),)](
            grad, lse, delta, qkv, scaled, grad_qkv, *sizes, **settings, num_warps=WARPS["differentiate_keys"]
        )
        grad_table = lse.new_empty(num_heads, (2 * window_size - 1) ** 2)
        sum_diagonals[(num_heads * (2 * window_size - 1),)](
            part.sum(0), grad_table, WINDOW=window_size, HEADS=num_heads, num_warps=WARPS["sum_diagonals"]
        )
    return grad_qkv, grad_table.T.to(table.dtype).contiguous()


_operator = make_operator("window_attention_triton", forward, backward)


def window_attention(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> Tensor:
    """See `mambair_ds.kernels.window_attention.window_attention`."""
    return _operator(qkv, table, num_heads, window_size, shift)[0]
