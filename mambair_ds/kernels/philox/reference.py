"""Philox4x32-10 in torch's int64 operations, the noise in float64 rounded once: what the others are tested against."""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3).

    Args:
        counter: four int64 tensors of one shape, each element a 32-bit word.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of that shape, each element a 32-bit word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two words wraps around in int64, but its 64 bits are right; masking undoes the sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _uniform(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count rounded up to a multiple of 4) float64 uniform numbers."""
    block = torch.arange(-(-count // 4), device=positions.device).expand(len(positions), -1)
    low, high = (positions & _MASK)[:, None], (positions >> 32 & _MASK)[:, None]
    words = philox4x32(
        (block, torch.full_like(block, stream), low.expand_as(block), high.expand_as(block)), (seed & _MASK, seed >> 32)
    )
    return ((torch.stack(words, -1).flatten(1) >> 9).double() + 0.5) * 2.0**-23


def gumbel(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard Gumbel noise for `positions`, (B,) int64."""
    return -torch.log(-torch.log(_uniform(seed, positions, stream, count)[:, :count])).float()


def normal(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard normal noise for `positions`, (B,) int64."""
    radius, turn = _uniform(seed, positions, stream, count).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(radius)), 2 * math.pi * turn
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).flatten(1)[:, :count].float()
