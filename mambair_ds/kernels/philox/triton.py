"""Philox noise on GPUs: Triton has the generator; logarithm, sine and cosine are polynomials, since the GPU's own
logarithm is off near 1, where the largest Gumbel numbers come from."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _log(x):
    """As the CPU's: log(2^e m) = e log 2 + 2 artanh((m - 1) / (m + 1)), m between sqrt(1/2) and sqrt(2)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    r = (m - 1.0) / (m + 1.0)
    w = r * r
    p = 0.2992545 * w + 0.39974804
    p = p * w + 0.66666816
    p = p * w + 2.0
    return exponent.to(tl.float32) * 0.6931471805599453 + r * p


@triton.jit
def _sine_cosine(turn):
    """As the CPU's: of 2 pi turn, from polynomials on an eighth of a turn around each quarter."""
    quarter = (turn * 4.0 + 0.5).to(tl.int32)
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
    sign = tl.where((quarter & 2) != 0, -1.0, 1.0)
    return sign * tl.where(odd, cosine, sine), sign * tl.where(odd, -sine, cosine)


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)


@triton.jit(do_not_specialize=["seed", "stream"])
def fill(seed, stream, positions, out, count, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    """Noise for `out`, (B, count); a program makes 4 * BLOCK elements of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + sample)
    block = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    zero = block * 0
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block, zero + stream.to(tl.uint32), zero + low, zero + high)
    x0, x1, x2, x3 = _uniform(w0), _uniform(w1), _uniform(w2), _uniform(w3)
    if NORMAL:
        sine, cosine = _sine_cosine(x1)
        radius = tl.sqrt(-2.0 * _log(x0))
        x0, x1 = radius * cosine, radius * sine
        sine, cosine = _sine_cosine(x3)
        radius = tl.sqrt(-2.0 * _log(x2))
        x2, x3 = radius * cosine, radius * sine
    else:
        x0, x1, x2, x3 = -_log(-_log(x0)), -_log(-_log(x1)), -_log(-_log(x2)), -_log(-_log(x3))
    element = tl.program_id(0) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    noise = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    tl.store(out + sample * count + element, noise, mask=element < count)


def _draw(seed: int, positions: Tensor, stream: int, count: int, normal: bool) -> Tensor:
    out = torch.empty(len(positions), count, device=positions.device)
    grid = (triton.cdiv(count, 4 * BLOCK), len(positions))
    with torch.cuda.device_of(out):
        fill[grid](seed, stream, positions.contiguous(), out, count, NORMAL=normal, BLOCK=BLOCK)
    return out


def gumbel(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard Gumbel noise for `positions`, (B,) int64."""
    return _draw(seed, positions, stream, count, normal=False)


def normal(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard normal noise for `positions`, (B,) int64."""
    return _draw(seed, positions, stream, count, normal=True)
