"""Philox noise on the CPU: loops compiled by numba over tasks of `TILE` elements of one sample, on several threads."""

# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch
from torch import Tensor

from mambair_ds.kernels.cpu import jit, run_tasks

TILE = 4096


@jit
def _words(block, stream, low, high, k0, k1):
    """Philox4x32-10; each word a uint64 below 2^32, since a product of two fits no less."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = block, stream, low, high
    for _ in range(10):
        p0 = c0 * np.uint64(0xD2511F53)
        p1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & mask, (p0 >> half) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


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
    low, high = np.uint64(positions[sample]) & np.uint64(0xFFFFFFFF), np.uint64(positions[sample]) >> np.uint64(32)
    tile = np.empty(TILE, np.float32)
    for i in range(TILE // 4):
        words = _words(np.uint64(first // 4 + i), stream, low, high, k0, k1)
        for j in range(4):
            tile[4 * i + j] = (np.float32(np.int32(words[j] >> np.uint64(9))) + np.float32(0.5)) * np.float32(2.0**-23)
    if is_normal:
        for i in range(TILE // 2):
            radius = np.sqrt(np.float32(-2) * log(tile[2 * i]))
            sine, cosine = sin_cos(tile[2 * i + 1])
            tile[2 * i], tile[2 * i + 1] = radius * cosine, radius * sine
    else:
        for i in range(TILE):
            tile[i] = -log(-log(tile[i]))
    for i in range(min(TILE, count - first)):
        out[sample, first + i] = tile[i]


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
