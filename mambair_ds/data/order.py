"""What comes next: the order of the training samples as arithmetic.

Position p of a run's endless stream says, together with the seed, which picture is next, where it is cropped and how
it is flipped. Nothing is stored and nothing is drawn one after the other: a stream starts anywhere, any number of ranks
share it, and its whole state is one integer. The randomness is Philox4x32-10 with the position in its counter.

Shuffling is a keyed permutation: a Feistel network over the smallest power of two that holds every index, repeated
while the result falls outside (cycle walking). It is a true permutation of any number of pictures and needs no list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mambair_ds.kernels.philox import DEGRADATION_STREAM
from mambair_ds.kernels.philox.reference import philox4x32

Integers = NDArray[np.int64]

# Philox streams above those of the layers and of the degradation noise.
_SAMPLE_STREAM = DEGRADATION_STREAM + 1
_PERMUTATION_STREAM = DEGRADATION_STREAM + 2
# So many that all orders of 3 to 7 pictures come equally often by a chi-squared test; 8 and 12 rounds fail it.
_ROUNDS = 20
_MASK = 0xFFFFFFFF


def _words(seed: int, element: ArrayLike, stream: ArrayLike, turn: ArrayLike) -> list[Integers]:
    """Four random 32-bit words for each (element, stream, turn); turn has 64 bits, the others 32."""
    words = np.broadcast_arrays(element, stream, np.bitwise_and(turn, _MASK), np.right_shift(turn, 32))
    c0, c1, c2, c3 = (torch.from_numpy(np.ascontiguousarray(word, np.int64)) for word in words)
    return [word.numpy() for word in philox4x32((c0, c1, c2, c3), (seed & _MASK, seed >> 32))]


def permute(index: Integers, size: ArrayLike, seed: int, stream: ArrayLike, turn: ArrayLike) -> Integers:
    """Images of `index` (n,) under random permutations of 0 ... size - 1, one for each (seed, stream, turn).

    size (below 2**53), stream and turn are (n,) integers, or one integer for all.
    """
    index, size, stream, turn = (np.array(a, np.int64) for a in np.broadcast_arrays(index, size, stream, turn))
    keys = np.concatenate(_words(seed, np.arange(_ROUNDS // 4)[:, None], stream, turn))
    width = np.frexp((size - 1).astype(np.float64))[1].astype(np.int64)  # bits of the largest index
    low_bits = (width + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << width - low_bits) - 1
    todo = np.arange(index.size)
    while todo.size:
        high, low = index[todo] >> low_bits[todo], index[todo] & low_mask[todo]
        for step in range(0, _ROUNDS, 2):
            high ^= _mix(low ^ keys[step, todo]) & high_mask[todo]
            low ^= _mix(high ^ keys[step + 1, todo]) & low_mask[todo]
        index[todo] = high << low_bits[todo] | low
        todo = todo[index[todo] >= size[todo]]
    return index


def _mix(x: Integers) -> Integers:
    """Scatter 32-bit words (the finalizer of MurmurHash3)."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _MASK
    x = (x ^ x >> 13) * 0xC2B2AE35 & _MASK
    return x ^ x >> 16


@dataclass(frozen=True)
class Samples:
    """What to take at n positions: one (n,) array a field."""

    position: Integers
    """Position in the run's stream."""
    epoch: Integers
    """Epoch that the position belongs to, from 0."""
    folder: Integers
    """Index of the shard folder."""
    picture: Integers
    """Index of the picture in its folder."""
    row: Integers
    """Random 32-bit word that places the crop vertically; see `anchor`."""
    column: Integers
    """Random 32-bit word that places the crop horizontally."""
    hflip: NDArray[np.bool_]
    """Whether to mirror left-right, first."""
    vflip: NDArray[np.bool_]
    """Whether to mirror up-down, second."""
    transpose: NDArray[np.bool_]
    """Whether to swap rows and columns, last."""

    def __getitem__(self, part: slice) -> Samples:
        return Samples(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


def anchor(word: ArrayLike, choices: ArrayLike) -> Integers:
    """First pixel of a crop, 0 ... choices - 1, from a 32-bit word: word · choices / 2**32, rounded down.

    Choices is the number of places: picture side - crop side + 1, below 2**31. The probability of a place is off by
    less than 2**-32.
    """
    return np.asarray(word, np.int64) * np.asarray(choices, np.int64) >> 32


class Order:
    """The endless, shuffled stream of samples over several folders of pictures."""

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Order over folders of counts[i] pictures, of which an epoch takes weights[i] · counts[i], rounded (or 1).

        A folder's pictures come from its own endless run of shuffled passes, so that all come equally often for any
        weight: once an epoch for weight 1, every second epoch for 0.5.
        """
        self._counts = np.array(counts, np.int64)
        self._shares = np.maximum(1, np.rint(self._counts * np.array(weights))).astype(np.int64)
        self._ends = np.cumsum(self._shares)
        self._seed = seed

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch."""
        return int(self._ends[-1])

    def samples(self, positions: Integers) -> Samples:
        """What to take at `positions` (n,); a pure function of seed and position, for every n."""
        epoch, place = np.divmod(positions, self.epoch_size)
        mixed = permute(place, self.epoch_size, self._seed, _PERMUTATION_STREAM, epoch)
        folder = np.searchsorted(self._ends, mixed, side="right")
        count, share = self._counts[folder], self._shares[folder]
        taken = epoch * share + mixed - (self._ends[folder] - share)
        passed, place = np.divmod(taken, count)
        picture = permute(place, count, self._seed, _PERMUTATION_STREAM + 1 + folder, passed)
        row, column, flips, _ = _words(self._seed, 0, _SAMPLE_STREAM, positions)
        hflip, vflip, transpose = (flips >> bit & 1 == 1 for bit in range(3))
        return Samples(positions, epoch, folder, picture, row, column, hflip, vflip, transpose)
