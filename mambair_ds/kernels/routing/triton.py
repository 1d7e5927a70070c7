"""Routing on GPUs.

The counting sort has two kernels: how many tokens of each class a block has; and, from the counts of all blocks, where
the tokens of each class begin, to which a token adds how many of its class come before it in its block. The prompt's
gradient goes to the logits token by token, and to the table in partial sums for `TOKENS` tokens, added up in a fixed
order: there are no float atomics, so two runs agree to the bit.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.routing.operator import make_operators

ROWS = 16
"""Tokens whose logits lie in a program's registers at once."""
BLOCK = 128
"""Tokens a program of the counting sort has."""
TOKENS = 128
"""Tokens a program of the prompt's gradient has, a multiple of `ROWS`."""
WARPS = 4
PROMPT_WARPS = 8  # with 4, `differentiate_prompt` has no register to spare

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_logits(logits, rows, count, classes, CLASSES: tl.constexpr):
    t = tl.arange(0, CLASSES)
    mask = (rows < count)[:, None] & (t < classes)[None, :]
    return tl.load(logits + rows[:, None] * classes + t[None, :], mask=mask, other=float("-inf")), t, mask


@triton.jit
def choose_rows(logits, index, count, classes, CLASSES: tl.constexpr, ROWS: tl.constexpr):
    """The first class of greatest probability, `index` (count,), of `logits` (count, classes)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x, t, mask = _load_logits(logits, rows, count, classes, CLASSES)
    x = tl.where((rows < count)[:, None], x, 0.0)
    e = tl.exp(x - tl.max(x, 1)[:, None])
    p = tl.div_rn(e, tl.broadcast_to(tl.sum(e, 1)[:, None], e.shape))
    first = tl.min(tl.where(mask & (p == tl.max(p, 1)[:, None]), t[None, :], classes - 1), 1)
    tl.store(index + rows, first.to(tl.int64), mask=rows < count)


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
def place_tokens(index, counts, order, inverse, length, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """The order of tokens by class and its inverse, (B, n), from every block's counts."""
    sample = tl.program_id(1).to(tl.int64)
    t = tl.arange(0, CLASSES)
    before = tl.zeros((CLASSES,), tl.int32)
    total = tl.zeros((CLASSES,), tl.int32)
    for block in range(0, tl.num_programs(0)):
        counted = tl.load(counts + (sample * tl.num_programs(0) + block) * CLASSES + t)
        before += tl.where(block < tl.program_id(0), counted, 0)
        total += counted
    start = tl.cumsum(total, 0) - total + before
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < length
    classes_of = tl.load(index + sample * length + i, mask=inside, other=0).to(tl.int32)
    earlier = (classes_of[:, None] == classes_of[None, :]) & (i[:, None] > i[None, :])
    place = tl.gather(start, classes_of, 0) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(inverse + sample * length + i, place.to(tl.int64), mask=inside)
    tl.store(order + sample * length + place, i.to(tl.int64), mask=inside)


@triton.jit
def differentiate_prompt(
    grad, logits, table, index, grad_logits, part_table, length, classes,
    N: tl.constexpr, STATES: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, and TOKENS tokens' part of the table's: `part_table`, (B, parts, classes, N)."""
    sample = tl.program_id(1).to(tl.int64)
    s, t = tl.arange(0, STATES), tl.arange(0, CLASSES)
    in_table = (t < classes)[:, None] & (s < N)[None, :]
    prompts = tl.load(table + t[:, None] * N + s[None, :], mask=in_table, other=0.0)
    sums = tl.zeros((CLASSES, STATES), tl.float32)
    start = tl.program_id(0) * TOKENS
    for first in range(start, tl.minimum(start + TOKENS, length), ROWS):
        i = first + tl.arange(0, ROWS)
        rows = sample * length + i
        inside = i < length
        x, _, mask = _load_logits(logits, rows, (sample + 1) * length, classes, CLASSES)
        x = tl.where(inside[:, None], x, 0.0)
        g = tl.load(grad + rows[:, None] * N + s[None, :], mask=inside[:, None] & (s < N)[None, :], other=0.0)
        e = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
        p = e / tl.sum(e, 1)[:, None]
        q = tl.dot(g, tl.trans(prompts), input_precision="ieee")
        out = p * (q - tl.sum(p * q, 1)[:, None])
        tl.store(grad_logits + rows[:, None] * classes + t[None, :], out, mask=mask)
        classes_of = tl.load(index + rows, mask=inside, other=0).to(tl.int32)  # behind the end g is 0
        one_hot = (classes_of[None, :] == t[:, None]).to(tl.float32)
        sums = tl.dot(one_hot, g, sums, input_precision="ieee")
    part = sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(part_table + (part * classes + t[:, None]) * N + s[None, :], sums, mask=in_table)


def _padded(count: int) -> int:
    """The next power of two, and at least what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(count))


def choose(logits: Tensor) -> Tensor:
    """See `make_operators`."""
    batch, length, classes = logits.shape
    index = torch.empty(batch, length, dtype=torch.int64, device=logits.device)
    grid = (triton.cdiv(index.numel(), ROWS),)
    with torch.cuda.device_of(logits):
        choose_rows[grid](logits, index, index.numel(), classes, CLASSES=_padded(classes), ROWS=ROWS, num_warps=WARPS)
    return index


def order(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """See `make_operators`."""
    batch, length = index.shape
    blocks = triton.cdiv(length, BLOCK)
    counts = torch.empty(batch, blocks, _padded(classes), dtype=torch.int32, device=index.device)
    places, inverse = torch.empty_like(index), torch.empty_like(index)
    constants = {"CLASSES": _padded(classes), "BLOCK": BLOCK, "num_warps": WARPS}
    with torch.cuda.device_of(index):
        count_classes[blocks, batch](index, counts, length, **constants)
        place_tokens[blocks, batch](index, counts, places, inverse, length, **constants)
    return places, inverse


def differentiate(grad: Tensor, logits: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """See `make_operators`."""
    batch, length, classes = logits.shape
    states = table.shape[1]
    parts = triton.cdiv(length, TOKENS)
    grad_logits, part_table = torch.empty_like(logits), table.new_empty(batch, parts, *table.shape)
    with torch.cuda.device_of(logits):
        differentiate_prompt[parts, batch](
            grad, logits, table, index, grad_logits, part_table, length, classes,
            N=states, STATES=_padded(states), CLASSES=_padded(classes), ROWS=ROWS, TOKENS=TOKENS,
            num_warps=PROMPT_WARPS,
        )  # fmt: skip
    return grad_logits, part_table.sum((0, 1))


choose_class, class_order, class_prompt = make_operators("triton", choose, order, differentiate)
