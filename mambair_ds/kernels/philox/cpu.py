"""Philox noise on the CPU: loops compiled by numba over tasks of `TILE` elements of one sample, on several threads."""

# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch
from torch import Tensor

from mambair_ds.kernels.cpu import jit, run_tasks

TILE = 4096


@jit
def _rounds(words, k0, k1):
    """Philox4x32-10 of the counters `words`, (4, TILE / 4) uint32, in place; a row for each word, to fill vectors."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = words[0], words[1], words[2], words[3]
    for _ in range(10):
        for i in range(len(c0)):
            p0 = np.uint64(c0[i]) * np.uint64(0xD2511F53)
            p1 = np.uint64(c2[i]) * np.uint64(0xCD9E8D57)
            c0[i] = np.uint32(p1 >> half) ^ c1[i] ^ np.uint32(k0)
            c1[i] = np.uint32(p1)
            c2[i] = np.uint32(p0 >> half) ^ c3[i] ^ np.uint32(k1)
            c3[i] = np.uint32(p0)
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask


@jit
def _uniform(word):
    return (np.float32(np.int32(word >> np.uint32(9))) + np.float32(0.5)) * np.float32(2.0**-23)


@jit
def log(x):
    """Natural logarithm of a normal x > 0: log(2^e m) = e log 2 + 2 artanh((m - 1) / (m + 1))."""
    bits = np.float32(x).view(np.int32)
    exponent = np.int32((bits - 0x3F3504F3) >> 23)  # m lies between sqrt(1/2) and sqrt(2)
    m = np.int32(bits - (exponent << 23)).view(np.float32)
    r = (m - np.float32(1)) / (m + np.float32(1))
    w = r * r
    p = np.float32(0.2992545) * w + np.float32(0.39974804)
    p = p * w + np.float32(0.66666816)
    p = p * w + np.float32(2)
    return np.float32(exponent) * np.float32(0.6931471805599453) + r * p


@jit
def sin_cos(turn):
    """Sine and cosine of 2 pi turn, 0 <= turn <= 1: polynomials on an eighth of a turn around each quarter."""
    quarter = np.int32(turn * np.float32(4) + np.float32(0.5))
    r = turn - np.float32(quarter) * np.float32(0.25)
    w = r * r
    p = np.float32(41.472891) * w - np.float32(76.697868)
    p = p * w + np.float32(81.605205)
    p = p * w - np.float32(41.341702)
    sine = (p * w + np.float32(6.2831853)) * r
    p = np.float32(59.22028804) * w - np.float32(85.44284841)
    p = p * w + np.float32(64.93931617)
    p = p * w - np.float32(19.73920865)
    cosine = p * w + np.float32(1)
    if quarter & 1:
        sine, cosine = cosine, -sine
    return (-sine, -cosine) if quarter & 2 else (sine, cosine)


@jit
def _fill(task, k0, k1, positions, stream, is_normal, out):
    count = out.shape[1]
    tiles = (count + TILE - 1) // TILE
    sample, first = task // tiles, task % tiles * TILE
    words = np.empty((4, TILE // 4), np.uint32)
    for i in range(TILE // 4):
        words[0, i] = np.uint32(first // 4 + i)
    words[1, :] = np.uint32(stream)
    words[2, :] = np.uint32(np.uint64(positions[sample]) & np.uint64(0xFFFFFFFF))
    words[3, :] = np.uint32(np.uint64(positions[sample]) >> np.uint64(32))
    _rounds(words, k0, k1)
    noise = np.empty((4, TILE // 4), np.float32)
    if is_normal:
        for pair in range(0, 4, 2):
            for i in range(TILE // 4):
                radius = np.sqrt(np.float32(-2) * log(_uniform(words[pair, i])))
                sine, cosine = sin_cos(_uniform(words[pair + 1, i]))
                noise[pair, i], noise[pair + 1, i] = radius * cosine, radius * sine
    else:
        for j in range(4):
            for i in range(TILE // 4):
                noise[j, i] = -log(-log(_uniform(words[j, i])))
    for i in range(min(TILE, count - first)):
        out[sample, first + i] = noise[i % 4, i // 4]


def _draw(seed: int, positions: Tensor, stream: int, count: int, is_normal: bool) -> Tensor:
    out = torch.empty(len(positions), count)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    tasks = len(positions) * -(-count // TILE)
    run_tasks(_fill, tasks, k0, k1, positions.contiguous().numpy(), np.uint64(stream), is_normal, out.numpy())
    return out


def gumbel(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard Gumbel noise for `positions`, (B,) int64."""
    return _draw(seed, positions, stream, count, is_normal=False)


def normal(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard normal noise for `positions`, (B,) int64."""
    return _draw(seed, positions, stream, count, is_normal=True)
