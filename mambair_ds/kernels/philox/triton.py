"""Philox noise on GPUs, and the functions with which other kernels draw it themselves.

A round takes two wide multiplications, each of which gives both halves of its product, and two exclusive ors.
Logarithms are the GPU's own, which are within 2^-22 of the result outside of (1/2, 2) and within 2^-22 inside. Near 1
that is too little: the largest Gumbel numbers come from there, so -log2 of more than 3/4 is a polynomial. Sine and
cosine are polynomials too.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.gpu import INTERPRETED

BLOCK = 512
"""Counters of a program."""
WARPS = 4

LN2 = tl.constexpr(0.6931471805599453)
LOG2_LN2 = tl.constexpr(-0.5287663729448977)
BELOW_ONE = tl.constexpr(1 - 2.0**-24)


@triton.jit
def words(block, stream, low, high, seed):
    """The four words of Philox4x32-10 for the counter (block, stream, low, high), uint32; `seed` is uint64."""
    c0, c1, c2, c3 = block, stream, low, high
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _log2(x):
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _uniform(word):
    """((word >> 9) + 1/2) / 2^23, exact: the 23 bits make a number between 1 and 2."""
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - BELOW_ONE


@triton.jit
def _negative_log2(u):
    """-log2 of u, 0 < u < 1, with a relative error of at most 6e-7."""
    w = 1.0 - u
    p = 0.49022427 * w + 0.20762552
    p = p * w + 0.37192595
    p = p * w + 0.48021063
    p = p * w + 0.72136265
    p = p * w + 1.44269502
    return tl.where(w <= 0.25, p * w, -_log2(u))


@triton.jit
def gumbel_exponent(word):
    """x of the Gumbel number -(x + log2(log 2)) log 2: log2 of the word's exponentially distributed -log2(u)."""
    return _log2(_negative_log2(_uniform(word)))


@triton.jit
def _gumbel(word):
    return gumbel_exponent(word) * -LN2 - LOG2_LN2 * LN2


@triton.jit
def _normal(word, turn_word):
    """Box and Muller's two numbers."""
    radius = tl.sqrt(_negative_log2(_uniform(word)) * (2.0 * LN2))
    turn = _uniform(turn_word)
    quarter = (turn * 4.0 + 0.5).to(tl.int32)  # polynomials on an eighth of a turn around each quarter, as the CPU's
    r = turn - quarter.to(tl.float32) * 0.25
    w = r * r
    p = 41.472891 * w - 76.697868
    p = p * w + 81.605205
    p = p * w - 41.341702
    sine = (p * w + 6.2831853) * r
    p = 59.22028804 * w - 85.44284841
    p = p * w + 64.93931617
    p = p * w - 19.73920865
    cosine = p * w + 1.0
    odd = (quarter & 1) != 0
    radius = tl.where((quarter & 2) != 0, -radius, radius)
    return radius * tl.where(odd, -sine, cosine), radius * tl.where(odd, cosine, sine)


@triton.jit(do_not_specialize=["seed", "stream"])
def fill(
    seed, stream, positions, out, count, NORMAL: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Noise for `out`, (B, count); a program has BLOCK counters of one sample. WHOLE says that 4 divides `count`."""
    sample = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + sample).to(tl.uint64)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    w0, w1, w2, w3 = words(block.to(tl.uint32), stream.to(tl.uint32), low, high, seed.to(tl.uint64))
    if NORMAL:
        x0, x1 = _normal(w0, w1)
        x2, x3 = _normal(w2, w3)
    else:
        x0, x1, x2, x3 = _gumbel(w0), _gumbel(w1), _gumbel(w2), _gumbel(w3)
    noise = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BLOCK, 4))
    element = 4 * block[:, None] + tl.arange(0, 4)[None, :]
    if WHOLE:  # all four of a counter by one store
        mask = tl.broadcast_to((block < count // 4)[:, None], element.shape)
        tl.store(out + sample * (count // 4) * 4 + element, noise, mask=mask)
    else:
        tl.store(out + sample * count + element, noise, mask=element < count)


def _draw(seed: int, positions: Tensor, stream: int, count: int, normal: bool) -> Tensor:
    out = torch.empty(len(positions), count, device=positions.device)
    grid = (triton.cdiv(count, 4 * BLOCK), len(positions))
    with torch.cuda.device_of(out):
        fill[grid](
            seed, stream, positions.contiguous(), out, count,
            NORMAL=normal, WHOLE=count % 4 == 0, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def gumbel(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard Gumbel noise for `positions`, (B,) int64."""
    return _draw(seed, positions, stream, count, normal=False)


def normal(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard normal noise for `positions`, (B,) int64."""
    return _draw(seed, positions, stream, count, normal=True)
