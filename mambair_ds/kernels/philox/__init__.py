"""Noise that is a function of its place: Philox4x32-10 counters instead of a generator's state.

A number depends on the run's seed, the sample's position in the run's stream, the stream (a layer, say) and the element
within the sample, and on nothing else. So any number of ranks, any batch size and a resumed run draw the same noise, a
backward pass can draw it again instead of storing it, and a checkpoint holds no generator.

Element e of a sample is word e mod 4 of Philox4x32-10 (Salmon et al. 2011, SC'11) for the key (seed's low word, seed's
high word) and the counter (e div 4, stream, position's low word, its high word). A word x gives the uniform number
((x >> 9) + 1/2) / 2^23, exact in float32 and never 0 or 1. Gumbel noise is -log(-log(uniform)); normal noise is
Box and Muller's on the words (0, 1) and (2, 3), the first of each pair for the radius, cosine before sine. The words
are the same on every backend, the noise up to 1e-6.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mambair_ds.kernels import load_backend

DEGRADATION_STREAM = 2**31
"""The stream of degradation noise; the layers' Gumbel noise has the streams 0, 1, 2, ... in the order of execution."""

_FILES = {"reference": "reference", "torch": "cpu", "triton": "triton"}


@dataclass(frozen=True)
class NoiseKey:
    """Which noise a batch gets."""

    seed: int
    """The run's seed, 0 <= seed < 2^64."""

    positions: Tensor
    """(B,) int64, not negative: each sample's position in the run's global stream."""


@dataclass(frozen=True)
class KeyedNoise:
    """Noise that an operator draws where it uses it, that of `gumbel(key, stream, ...)`, and never stores."""

    key: NoiseKey
    stream: int
    """0 <= stream < 2^32; noise of different streams is independent."""


def check_key(key: NoiseKey, stream: int, batch: int) -> None:
    """Raise a ValueError if seed or stream are out of range or there is not one position for each of `batch`."""
    if not 0 <= key.seed < 2**64:
        raise ValueError(f"philox: seed is {key.seed}, expected 0 <= seed < 2^64")
    if not 0 <= stream < 2**32:
        raise ValueError(f"philox: stream is {stream}, expected 0 <= stream < 2^32")
    if key.positions.dtype != torch.int64 or tuple(key.positions.shape) != (batch,):
        raise ValueError(
            f"philox: positions is {key.positions.dtype} of shape {tuple(key.positions.shape)}, "
            f"expected torch.int64 of shape ({batch},)"
        )


def gumbel(
    key: NoiseKey, stream: int, shape: tuple[int, ...], device: torch.device | str, backend: str | None = None
) -> Tensor:
    """Standard Gumbel noise, float32, of `shape` (B, ...) on `device`.

    Args:
        stream: 0 <= stream < 2^32; noise of different streams is independent.
        backend: "reference" (any device), "torch" (CPU) or "triton"; None chooses by `device`.

    Raises:
        ValueError: a seed, stream, shape or backend that does not fit.
    """
    return _draw("gumbel", key, stream, shape, torch.device(device), backend)


def normal(
    key: NoiseKey, stream: int, shape: tuple[int, ...], device: torch.device | str, backend: str | None = None
) -> Tensor:
    """Standard normal noise, float32, of `shape` (B, ...) on `device`; arguments and errors as `gumbel`'s."""
    return _draw("normal", key, stream, shape, torch.device(device), backend)


def _draw(
    kind: str, key: NoiseKey, stream: int, shape: tuple[int, ...], device: torch.device, backend: str | None
) -> Tensor:
    check_key(key, stream, shape[0])
    module = load_backend("philox", _FILES, device.type, backend)
    noise = getattr(module, kind)(key.seed, key.positions.to(device), stream, math.prod(shape[1:]))
    return noise.reshape(shape)
