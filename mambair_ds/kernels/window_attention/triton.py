"""Window attention on GPUs: the logits of a window live in registers, and nothing is rolled, cut or padded in memory.

A program reads queries, keys and values of one head straight from the picture, at the coordinates that its window has
in the rolled picture; heads are padded with zeros to a power of two on their way into registers. The bias is looked up
in the head's table, of 961 numbers for windows of 16, for each logit; they go where the product of queries and keys is
summed.

- `attend`: a program has a window and a head, and takes some queries after the other with all their keys.
- `differentiate_inputs`: a program has a window and a head, and takes all keys with some queries after the other.
- `differentiate_bias`: a program has some queries and keys of a head, and takes one window after the other. It has the
  sum over windows of the logits' gradient, which is that of the bias, in registers.
- `sum_diagonals`: adds up what belongs to the same relative position.

There are no atomics: every sum has a fixed order, so two runs agree to the bit. The backward kernels are compiled for
the picture's size, of which a training has one, so that their addresses are mostly constants.
"""

# mypy: disable-error-code="assignment, no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.gpu import dot
from mambair_ds.kernels.window_attention.operator import make_operator

GROUPS = 16  # into which the windows are divided, and each of which has its own sum of the bias' gradient
TILES = {
    2: {
        "attend": (4, {"QUERIES": 64}),
        "differentiate_inputs": (8, {"QUERIES": 64}),
        "differentiate_bias": (8, {"QUERIES": 128, "KEYS": 128}),
    },
    4: {
        "attend": (4, {"QUERIES": 16}),
        "differentiate_inputs": (8, {"QUERIES": 16}),
        "differentiate_bias": (8, {"QUERIES": 128, "KEYS": 64}),
    },
}
"""By the bytes of an element: a kernel's warps, and how many queries, and keys where it is not all of a window, a
program has at a time. In bfloat16 these fill the registers of compute capabilities 8.0 to 10.0 without spilling."""

STAGES = 1  # pipelined loads would cost the registers that other programs hide their latency with

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _window(window, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Of this window of all: the first pixel of its picture, and within that its first pixel, how much further those
    of its lower and its right half are than without the roll, and which of the two crossed the border."""
    across = width // WINDOW
    count = height // WINDOW * across
    row, column = window % count // across, window % count % across
    origin = (row * WINDOW + SHIFT) * width + column * WINDOW + SHIFT
    below = (SHIFT > 0) & (row == height // WINDOW - 1)
    beside = (SHIFT > 0) & (column == across - 1)
    down, right = tl.where(below, -height * width, 0), tl.where(beside, -width, 0)
    return (window // count).to(tl.int64) * (height * width), (
        origin,
        down,
        right,
        below.to(tl.int32) * 2,
        beside.to(tl.int32),
    )


@triton.jit
def _tokens(first, place, width, WINDOW: tl.constexpr, COUNT: tl.constexpr):
    """Of COUNT pixels of a window: their places in the picture, regions (see the reference), and places in the table.

    The bias of query and key has the difference of their places in the table as its place there.
    """
    origin, down, right, below, beside = place
    token = first + tl.arange(0, COUNT)
    row, column = token // WINDOW, token % WINDOW
    lower, righter = row >= WINDOW // 2, column >= WINDOW // 2
    pixel = origin + row * width + column + tl.where(lower, down, 0) + tl.where(righter, right, 0)
    return pixel, tl.where(lower, below, 0) + tl.where(righter, beside, 0), row * (2 * WINDOW - 1) + column


@triton.jit
def _head(head, DIM: tl.constexpr, ODD: tl.constexpr):
    """A head's first channel, or the one before it if that is odd, and how many channels that is before it."""
    return head // 2 * (2 * DIM) + head % 2 * (DIM - ODD), head % 2 * ODD


@triton.jit
def _load(x, place, stride, DIM: tl.constexpr, PADDED: tl.constexpr, ODD: tl.constexpr):
    """Rows of x, `stride` elements apart, from a channel that `_head` names: DIM numbers, if ODD one more that is
    another head's, and zeros."""
    d = tl.arange(0, PADDED)
    return tl.load(x + (place[:, None] * stride + d[None]), mask=(d < DIM + ODD)[None], other=0.0)


@triton.jit
def _load_only(x, place, stride, skip, DIM: tl.constexpr, PADDED: tl.constexpr, ODD: tl.constexpr):
    """The same with zeros in place of another head's number."""
    d = tl.arange(0, PADDED)[None]
    tile = _load(x, place, stride, DIM, PADDED, ODD)
    return tl.where((d >= skip) & (d < skip + DIM), tile, 0.0) if ODD else tile


@triton.jit
def _store(x, place, stride, skip, value, DIM: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    pointers = x + (place[:, None] * stride + d[None])
    tl.store(pointers, value.to(x.dtype.element_ty), mask=((d >= skip) & (d < skip + DIM))[None])


@triton.jit
def _load_table(table, head, WINDOW: tl.constexpr):
    """The bias of every relative position."""
    SIDE: tl.constexpr = 2 * WINDOW - 1
    entry = tl.arange(0, 4 * WINDOW * WINDOW)
    return tl.load(table + head * (SIDE * SIDE) + entry, mask=entry < SIDE * SIDE, other=0.0)


@triton.jit
def _logits(
    a, b, place_in_table, region_a, region_b, where, table,
    WINDOW: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits of rows a and columns b, divided by `SCALE`; the table has been, too."""
    ROWS: tl.constexpr = a.shape[0]
    COLUMNS: tl.constexpr = b.shape[0]
    CENTER: tl.constexpr = 2 * WINDOW * (WINDOW - 1)
    bias = tl.gather(table, tl.reshape(place_in_table + CENTER, (ROWS * COLUMNS,)), 0)
    logits = dot(a, tl.trans(b), tl.reshape(bias, (ROWS, COLUMNS)), PRECISION)
    if SHIFT and where[3] + where[4] > 0:
        logits = tl.where(region_a[:, None] == region_b[None], logits, logits - 100.0 / SCALE)
    return logits


@triton.jit
def attend(
    qkv, table, out, lse, height, width,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ODD: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, QUERIES: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, H, W, C) and lse (B, H, W, heads) of qkv (B, H, W, 3·C) and table (heads, (2w - 1)²) over SCALE."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    UNIT: tl.constexpr = SCALE * LOG2E
    head = tl.program_id(0) % HEADS
    channel, skip = _head(head, DIM, ODD)
    pixel, where = _window(tl.program_id(0) // HEADS, height, width, WINDOW, SHIFT)
    qkv += pixel * STRIDE + channel
    out += pixel * (HEADS * DIM) + channel
    lse += pixel * HEADS + head
    place_k, region_k, entry_k = _tokens(0, where, width, WINDOW, TOKENS)
    k = _load(qkv + HEADS * DIM, place_k, STRIDE, DIM, PADDED, ODD)
    v = _load(qkv + 2 * HEADS * DIM, place_k, STRIDE, DIM, PADDED, ODD)
    for first in range(0, TOKENS, QUERIES):
        place, region, entry = _tokens(first, where, width, WINDOW, QUERIES)
        q = _load_only(qkv, place, STRIDE, skip, DIM, PADDED, ODD)
        biases = _load_table(table, head, WINDOW)  # in the loop, where it is used: registers are short
        place_in_table = entry[:, None] - entry_k[None]
        logits = _logits(q, k, place_in_table, region, region_k, where, biases, WINDOW, SCALE, SHIFT, PRECISION)
        largest = tl.max(logits, 1) * UNIT
        weights = tl.exp2(logits * UNIT - largest[:, None])
        total = tl.sum(weights, 1)
        y = dot(weights.to(v.dtype), v, None, PRECISION) * (1 / total)[:, None]
        _store(out, place, HEADS * DIM, skip, y, DIM, PADDED)
        tl.store(lse + place * HEADS, largest + tl.log2(total))


@triton.jit
def differentiate_inputs(
    grad, out, lse, qkv, table, grad_qkv, delta, height: tl.constexpr, width: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ODD: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, QUERIES: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of qkv, and delta (B, H, W, heads), each query's product of result and gradient."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    head = tl.program_id(0) % HEADS
    channel, skip = _head(head, DIM, ODD)
    pixel, where = _window(tl.program_id(0) // HEADS, height, width, WINDOW, SHIFT)
    qkv += pixel * STRIDE + channel
    grad_qkv += pixel * STRIDE + channel
    grad += pixel * (HEADS * DIM) + channel
    out += pixel * (HEADS * DIM) + channel
    lse += pixel * HEADS + head
    delta += pixel * HEADS + head
    place_k, region_k, entry_k = _tokens(0, where, width, WINDOW, TOKENS)
    k = _load(qkv + HEADS * DIM, place_k, STRIDE, DIM, PADDED, ODD)
    v = _load(qkv + 2 * HEADS * DIM, place_k, STRIDE, DIM, PADDED, ODD)
    grad_k = tl.zeros((TOKENS, PADDED), tl.float32)
    grad_v = tl.zeros((TOKENS, PADDED), tl.float32)
    for first in range(0, TOKENS, QUERIES):
        place, region, entry = _tokens(first, where, width, WINDOW, QUERIES)
        q = _load_only(qkv, place, STRIDE, skip, DIM, PADDED, ODD)
        g = _load_only(grad, place, HEADS * DIM, skip, DIM, PADDED, ODD)
        y = _load(out, place, HEADS * DIM, DIM, PADDED, ODD)
        product = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
        tl.store(delta + place * HEADS, product)
        log = tl.load(lse + place * HEADS)
        biases = _load_table(table, head, WINDOW)  # in the loop, where it is used: registers are short
        place_in_table = entry[None] - entry_k[:, None]
        logits = _logits(k, q, place_in_table, region_k, region, where, biases, WINDOW, SCALE, SHIFT, PRECISION)
        weights = tl.exp2(logits * (SCALE * LOG2E) - log[None])
        grad_v = dot(weights.to(g.dtype), g, grad_v, PRECISION)
        grad_logits = (weights * (dot(v, tl.trans(g), None, PRECISION) - product[None])).to(q.dtype)
        grad_q = dot(tl.trans(grad_logits), k, None, PRECISION) * SCALE
        grad_k = dot(grad_logits, q, grad_k, PRECISION)
        _store(grad_qkv, place, STRIDE, skip, grad_q, DIM, PADDED)
    # The grid has one row. The compiler does not know that, and computes these places again instead of keeping them.
    place_k, _, _ = _tokens(tl.program_id(1), where, width, WINDOW, TOKENS)
    _store(grad_qkv + HEADS * DIM, place_k, STRIDE, skip, grad_k * SCALE, DIM, PADDED)
    _store(grad_qkv + 2 * HEADS * DIM, place_k, STRIDE, skip, grad_v, DIM, PADDED)


@triton.jit
def differentiate_bias(
    grad, lse, delta, qkv, table, part, windows, groups, height: tl.constexpr, width: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ODD: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each group of windows the sum of the gradients of their logits, (groups, heads, w², w²)."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    head = tl.program_id(0) % HEADS
    channel, skip = _head(head, DIM, ODD)
    tile = tl.program_id(0) // HEADS % ((TOKENS // QUERIES) * (TOKENS // KEYS))
    group = tl.program_id(0) // (HEADS * (TOKENS // QUERIES) * (TOKENS // KEYS))
    first = tile // (TOKENS // KEYS) * QUERIES
    first_key = tile % (TOKENS // KEYS) * KEYS
    total = tl.zeros((QUERIES, KEYS), tl.float32)
    for window in range(group, windows, groups):
        zero = tl.minimum(window, 0)  # the compiler, which does not know, keeps no biases in registers
        pixel, where = _window(window, height, width, WINDOW, SHIFT)
        x = qkv + pixel * STRIDE + channel
        place, region, entry = _tokens(first, where, width, WINDOW, QUERIES)
        place_k, region_k, entry_k = _tokens(first_key, where, width, WINDOW, KEYS)
        q = _load_only(x, place, STRIDE, skip, DIM, PADDED, ODD)
        k = _load(x + HEADS * DIM, place_k, STRIDE, DIM, PADDED, ODD)
        g = _load_only(grad + pixel * (HEADS * DIM) + channel, place, HEADS * DIM, skip, DIM, PADDED, ODD)
        numbers = pixel * HEADS + head + place * HEADS
        log, product = tl.load(lse + numbers), tl.load(delta + numbers)
        biases = _load_table(table + zero, head, WINDOW)
        place_in_table = entry[:, None] - entry_k[None]
        logits = _logits(q, k, place_in_table, region, region_k, where, biases, WINDOW, SCALE, SHIFT, PRECISION)
        weights = tl.exp2(logits * (SCALE * LOG2E) - log[:, None])
        v = _load(x + 2 * HEADS * DIM, place_k, STRIDE, DIM, PADDED, ODD)
        total += weights * (dot(g, tl.trans(v), None, PRECISION) - product[:, None])
    row = (group * HEADS + head) * TOKENS + first + tl.arange(0, QUERIES)
    column = first_key + tl.arange(0, KEYS)
    tl.store(part + row[:, None] * TOKENS + column[None], total)


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
        "HEADS": heads, "DIM": dim, "PADDED": max(16, triton.next_power_of_2(dim)), "ODD": dim % 2 * (heads % 2 == 0),
        "WINDOW": window, "SHIFT": shift, "SCALE": dim**-0.5, "PRECISION": "tf32x3",
    }  # fmt: skip
    return shared | {name: min(size, tokens) for name, size in TILES[dtype.itemsize][kernel][1].items()}


def options(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """How a kernel but `sum_diagonals` is compiled."""
    return {"num_warps": TILES[dtype.itemsize][kernel][0], "num_stages": STAGES}


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
    scaled = _table(table, channels // num_heads)
    with torch.cuda.device_of(qkv):
        attend[(_windows(qkv, window_size) * num_heads,)](
            qkv, scaled, out, lse, *pixels[1:], **settings, **options("attend", qkv.dtype)
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
        name = "differentiate_inputs"
        settings = constants(name, channels, num_heads, window_size, shift, qkv.dtype) | options(name, qkv.dtype)
        differentiate_inputs[(windows * num_heads,)](grad, out, lse, qkv, scaled, grad_qkv, delta, *sizes, **settings)
        name = "differentiate_bias"
        settings = constants(name, channels, num_heads, window_size, shift, qkv.dtype) | options(name, qkv.dtype)
        tiles = tokens // settings["QUERIES"] * (tokens // settings["KEYS"])
        differentiate_bias[(groups * num_heads * tiles,)](
            grad, lse, delta, qkv, scaled, part, windows, groups, *sizes, **settings
        )
        grad_table = lse.new_empty(num_heads, (2 * window_size - 1) ** 2)
        sum_diagonals[(num_heads * (2 * window_size - 1),)](
            part.sum(0), grad_table, WINDOW=window_size, HEADS=num_heads, num_warps=1
        )
    return grad_qkv, grad_table.T.to(table.dtype).contiguous()


_operator = make_operator("window_attention_triton", forward, backward)


def window_attention(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> Tensor:
    """See `mambair_ds.kernels.window_attention.window_attention`."""
    return _operator(qkv, table, num_heads, window_size, shift)[0]
