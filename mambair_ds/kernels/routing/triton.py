"""Routing on GPUs.

The counting sort has two kernels: how many tokens of each class a block has; and, from the counts of all blocks, where
a block's tokens of each class begin. One warp then goes through the block in groups of as many tokens as it has lanes:
a token adds how many of its class come before it in its group, and the group's counts move the beginnings on.
"""

# mypy: disable-error-code="assignment, misc, no-untyped-def"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.gpu import dot
from mambair_ds.kernels.philox.triton import gumbel, gumbel_exponent, words
from mambair_ds.kernels.routing.operator import Draw, make_operators

BLOCK = 256
"""Tokens a program of the counting sort has."""
GROUP = 32
"""Tokens of a block that are compared with one another, one a lane."""
CHUNK = 8
"""Blocks whose counts are loaded at once."""
TOKENS = 256
"""Tokens a program of the prompt's gradient has."""
WARPS = 4

LOG2E = tl.constexpr(1.4426950408889634)
EQUAL = tl.constexpr(2.0**-24)
"""Sums of score and noise this near, in units of log 2, have exponentials that round to one number."""


NONE, GIVEN, DRAWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Where a kernel's noise comes from: nowhere, memory, its own counters."""


@triton.jit
def _fours(pointer, rows, columns, inside, classes: tl.constexpr, WHOLE: tl.constexpr, other: tl.constexpr):
    """Of each row and column, four neighboring classes' numbers, as four tensors."""
    j = tl.arange(0, 4)
    t = 4 * columns[:, None] + j[None, :]
    place = rows[:, None, None] * classes + t[None]
    mask = inside[:, None, None] & (t < classes)[None]
    if WHOLE:  # the same for all four: one load
        mask = tl.broadcast_to((inside[:, None] & (4 * columns < classes)[None, :])[:, :, None], place.shape)
    x = tl.load(pointer + place, mask=mask, other=other).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (rows.shape[0], columns.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _noisy(
    scores, noise, seed, stream, position, first, rows, columns, inside,
    classes: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """(score + noise) log2 e of four neighboring classes; `first` is the sample's first row. Drawn noise has in
    common what the softmax does not see, and is left out."""
    WHOLE: tl.constexpr = classes % 4 == 0
    x0, x1, x2, x3 = _fours(scores, rows, columns, inside, classes, WHOLE, float("-inf"))
    x0, x1, x2, x3 = x0 * LOG2E, x1 * LOG2E, x2 * LOG2E, x3 * LOG2E
    if NOISE == GIVEN:
        g0, g1, g2, g3 = _fours(noise, rows, columns, inside, classes, WHOLE, 0.0)
        x0, x1, x2, x3 = x0 + g0 * LOG2E, x1 + g1 * LOG2E, x2 + g2 * LOG2E, x3 + g3 * LOG2E
    if NOISE == DRAWN:
        block = ((rows - first) * (classes // 4))[:, None] + columns[None, :]
        w0, w1, w2, w3 = words(
            block.to(tl.uint32), stream.to(tl.uint32), position.to(tl.uint32), (position >> 32).to(tl.uint32), seed
        )
        x0, x1 = x0 - gumbel_exponent(w0), x1 - gumbel_exponent(w1)
        x2, x3 = x2 - gumbel_exponent(w2), x3 - gumbel_exponent(w3)
    return x0, x1, x2, x3


@triton.jit(do_not_specialize=["seed", "stream"])
def choose_rows(
    scores, noise, positions, seed, stream, index, length,
    classes: tl.constexpr, NOISE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The first class of the greatest sum of score and noise, or as good as that: `index` (B, n)."""
    sample = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + sample).to(tl.uint64) if NOISE == DRAWN else sample.to(tl.uint64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < length
    first = sample * length
    TURNS: tl.constexpr = COLUMNS // LANES
    x = ()
    best = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    for turn in tl.static_range(TURNS):
        columns = turn * LANES + tl.arange(0, LANES)
        x = x + _noisy(
            scores, noise, seed.to(tl.uint64), stream, position, first, first + i, columns, inside, classes, NOISE
        )
        for j in tl.static_range(4):
            best = tl.maximum(best, x[4 * turn + j])
    least = (tl.max(best, 1) - EQUAL)[:, None]
    at = tl.full((ROWS, LANES), classes - 1, tl.int32)
    for k in tl.static_range(4 * TURNS):  # from a lane's last class to its first
        t = 4 * ((TURNS - 1 - k // 4) * LANES + tl.arange(0, LANES)) + 3 - k % 4
        at = tl.where(x[4 * TURNS - 1 - k] >= least, t[None, :], at)
    at = tl.min(at, 1)
    tl.store(index + first + i, at.to(tl.int64), mask=inside)


@triton.jit
def count_classes(index, counts, length, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens of each class a block has: `counts`, (B, blocks, CLASSES) int32."""
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    classes_of = tl.load(index + sample * length + i, mask=i < length, other=0).to(tl.int32)
    counted = tl.histogram(classes_of, CLASSES, mask=i < length)
    place = sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + place * CLASSES + tl.arange(0, CLASSES), counted)


@triton.jit
def place_tokens(
    index, counts, order, inverse, length, blocks,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The order of tokens by class and its inverse, (B, n), from every block's counts."""
    sample = tl.program_id(1).to(tl.int64)
    t = tl.arange(0, CLASSES)
    before = tl.zeros((CLASSES,), tl.int32)
    total = tl.zeros((CLASSES,), tl.int32)
    for chunk in range(0, blocks, CHUNK):
        block = (chunk + tl.arange(0, CHUNK))[:, None]
        counted = tl.load(counts + (sample * blocks + block) * CLASSES + t[None, :], mask=block < blocks, other=0)
        total += tl.sum(counted, 0)
        before += tl.sum(tl.where(block < tl.program_id(0), counted, 0), 0)
    start = tl.cumsum(total, 0) - total + before
    k = tl.arange(0, GROUP)
    for group in tl.static_range(BLOCK // GROUP):
        i = tl.program_id(0) * BLOCK + group * GROUP + k
        inside = i < length
        classes_of = tl.load(index + sample * length + i, mask=inside, other=0).to(tl.int32)
        earlier = (classes_of[:, None] == classes_of[None, :]) & (k[:, None] < k[None, :])
        place = tl.gather(start, classes_of, 0) + tl.sum(earlier.to(tl.int32), 0)
        tl.store(inverse + sample * length + i, place.to(tl.int64), mask=inside)
        tl.store(order + sample * length + place, i.to(tl.int64), mask=inside)
        start += tl.histogram(classes_of, CLASSES, mask=inside)


@triton.jit(do_not_specialize=["seed", "stream"])
def differentiate_prompt(
    grad, scores, noise, positions, seed, stream, table, index, grad_scores, part_table, length,
    classes: tl.constexpr, N: tl.constexpr, NOISE: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores, and TOKENS tokens' part of the table's: `part_table`, (B, parts, classes, N).

    FULL: the length is a multiple of ROWS.
    """
    sample = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + sample).to(tl.uint64) if NOISE == DRAWN else sample.to(tl.uint64)
    TURNS: tl.constexpr = COLUMNS // LANES
    s, t = tl.arange(0, STATES), tl.arange(0, 4 * COLUMNS)
    prompts = ()
    for k in tl.static_range(4 * TURNS):
        place = (4 * (k // 4 * LANES + tl.arange(0, LANES)) + k % 4)[None, :]
        in_table = (place < classes) & (s < N)[:, None]
        prompts = prompts + (tl.load(table + place * N + s[:, None], mask=in_table, other=0.0),)
    sums = tl.zeros((STATES, 4 * COLUMNS), tl.float32)
    start = tl.program_id(0) * TOKENS
    for first in range(start, tl.minimum(start + TOKENS, length), ROWS):
        i = first + tl.arange(0, ROWS)
        rows = sample * length + i
        inside = tl.full((ROWS,), True, tl.int1) if FULL else i < length
        x = ()
        largest = tl.full((ROWS, LANES), float("-inf"), tl.float32)
        for turn in tl.static_range(TURNS):
            columns = turn * LANES + tl.arange(0, LANES)
            x = x + _noisy(
                scores, noise, seed.to(tl.uint64), stream, position, sample * length, rows, columns, inside,
                classes, NOISE,
            )  # fmt: skip
            for j in tl.static_range(4):
                largest = tl.maximum(largest, x[4 * turn + j])
        largest = tl.where(inside, tl.max(largest, 1), 0.0)[:, None]
        g = tl.load(grad + rows[:, None] * N + s[None, :], mask=inside[:, None] & (s < N)[None, :], other=0.0)
        e, q = (), ()
        total = tl.zeros((ROWS, LANES), tl.float32)
        mean = tl.zeros((ROWS, LANES), tl.float32)
        for k in tl.static_range(4 * TURNS):
            e = e + (tl.exp2(x[k] - largest),)
            q = q + (dot(g, prompts[k], None, "tf32x3"),)  # narrow numbers have exact products
            total += e[k]
            mean += e[k] * q[k]
        scale = 1.0 / tl.where(inside, tl.sum(total, 1), 1.0)
        mean = (scale * scale * tl.sum(mean, 1))[:, None]
        scale = scale[:, None]
        for turn in tl.static_range(TURNS):
            out = ()
            for j in tl.static_range(4):
                out = out + (e[4 * turn + j] * (q[4 * turn + j] * scale - mean),)
            out = tl.reshape(tl.join(tl.join(out[0], out[2]), tl.join(out[1], out[3])), (ROWS, 4 * LANES))
            those = 4 * LANES * turn + tl.arange(0, 4 * LANES)[None, :]
            mask = inside[:, None] & (those < classes)
            tl.store(grad_scores + rows[:, None] * classes + those, out.to(grad_scores.dtype.element_ty), mask=mask)
        classes_of = tl.load(index + rows, mask=inside, other=0).to(tl.int32)  # behind the end g is 0
        one_hot = tl.where(classes_of[:, None] == t[None, :], 1.0, 0.0).to(g.dtype)
        sums += dot(tl.trans(g), one_hot, None, "tf32x3")
    part = sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(
        part_table + (part * classes + t[None, :]) * N + s[:, None],
        sums,
        mask=(t < classes)[None, :] & (s < N)[:, None],
    )


def choose(scores: Tensor, draw: Draw) -> Tensor:
    """See `make_operators`."""
    batch, length, classes = scores.shape
    index = torch.empty(batch, length, dtype=torch.int64, device=scores.device)
    arguments, kind = _noise(scores, draw)
    tile = choice_tile(classes)
    with torch.cuda.device_of(scores):
        choose_rows[triton.cdiv(length, tile["ROWS"]), batch](
            scores, *arguments, index, length, classes=classes, NOISE=kind, **tile, num_warps=WARPS
        )  # fmt: skip
    return index


def order(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """See `make_operators`."""
    batch, length = index.shape
    blocks = triton.cdiv(length, BLOCK)
    padded = triton.next_power_of_2(classes)
    counts = torch.empty(batch, blocks, padded, dtype=torch.int32, device=index.device)
    places, inverse = torch.empty_like(index), torch.empty_like(index)
    with torch.cuda.device_of(index):
        count_classes[blocks, batch](index, counts, length, CLASSES=padded, BLOCK=BLOCK, num_warps=WARPS)
        place_tokens[blocks, batch](
            index, counts, places, inverse, length, blocks,
            CLASSES=padded, BLOCK=BLOCK, GROUP=GROUP, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip
    return places, inverse


def differentiate(grad: Tensor, scores: Tensor, table: Tensor, index: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """See `make_operators`."""
    batch, length, classes = scores.shape
    states = table.shape[1]
    parts = triton.cdiv(length, TOKENS)
    grad_scores = torch.empty_like(scores)
    part_table = torch.empty(batch, parts, *table.shape, device=scores.device)
    arguments, kind = _noise(scores, draw)
    tile = prompt_tile(classes)
    with torch.cuda.device_of(scores):
        differentiate_prompt[parts, batch](
            grad, scores, *arguments, table, index, grad_scores, part_table, length,
            classes=classes, N=states, NOISE=kind, STATES=max(16, triton.next_power_of_2(states)), TOKENS=TOKENS,
            FULL=length % tile["ROWS"] == 0, **tile,
        )  # fmt: skip
    return grad_scores, part_table.sum((0, 1))


def choice_tile(classes: int) -> dict[str, int]:
    """The shape of `choose_rows`' tile: 16 scores a lane of four warps."""
    columns = max(4, _columns(classes))
    return {"COLUMNS": columns, "LANES": columns // 4, "ROWS": 512 // columns}


def prompt_tile(classes: int) -> dict[str, int]:
    """The shape of `differentiate_prompt`'s tile: 32 scores a lane, in as few rows as `tl.dot` takes."""
    columns = max(16, _columns(classes))
    return {"COLUMNS": columns, "LANES": columns // 2, "ROWS": 16, "num_warps": columns // 16}


def _columns(classes: int) -> int:
    """Fours of classes, rounded up to a power of two."""
    return triton.next_power_of_2(triton.cdiv(classes, 4))


def _noise(scores: Tensor, draw: Draw) -> tuple[tuple[Tensor, Tensor, int, int], int]:
    """The kernels' arguments `noise`, `positions`, `seed` and `stream`, and their NOISE."""
    noise, positions, seed, stream = draw
    _, length, classes = scores.shape
    if positions is not None and classes % 4 != 0:  # a row does not begin with a counter: the noise is written out
        noise, positions = gumbel(seed, positions, stream, length * classes), None
    if positions is not None:
        return (scores, positions, seed, stream), DRAWN.value
    return (scores if noise is None else noise, scores, 0, 0), (NONE if noise is None else GIVEN).value


choose_class, class_order, class_prompt = make_operators("triton", choose, order, differentiate)
