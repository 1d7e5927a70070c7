"""Validation sets: paired folders, GT folders with LQ made on the fly, or shards, all behind one small interface."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from mambair_ds.config import UserError, ValSetConfig
from mambair_ds.data.degradations import resize_uint8
from mambair_ds.data.pictures import (
    Channels,
    Pair,
    PictureError,
    Problem,
    cut_to_multiple,
    fit_pair,
    pair_folder,
    read_picture,
)
from mambair_ds.data.shards import Shards

_SHOWN = 5  # problems that an error spells out


class ValidationSet(Protocol):
    """Pictures to measure on, in a fixed order."""

    def __len__(self) -> int:
        """Number of pictures."""

    def name(self, i: int) -> str:
        """Name of a picture, unique in the set."""

    def load(self, i: int) -> tuple[np.ndarray | None, np.ndarray]:
        """LQ (h, w, C) and GT (h * scale, w * scale, C), uint8; LQ is None where the task degrades the GT itself."""


class PairedFolder:
    """A folder of GT pictures and perhaps one of LQ pictures; without it, LQ comes from GT by the MATLAB rule."""

    def __init__(
        self, gt: Path, lq: Path | None = None, *, scale: int, filename_tmpl: str = "{}", channels: Channels = "rgb"
    ) -> None:
        """Pair the files by name.

        Args:
            gt, lq: the folders. Without lq and at scale 1, `load` gives no LQ.
            scale: GT size over LQ size. GT is cut to a multiple of it.
            filename_tmpl: see `pair_folder`.
            channels: ``rgb``, or ``gray`` for the luma of color pictures.

        Raises:
            UserError: listing every file without partner or of a name taken twice.
        """
        pairs, problems = pair_folder(gt, lq, filename_tmpl)
        if problems:
            raise UserError(_explain(problems, gt, lq, scale))
        self._pairs: list[Pair] = pairs
        self._scale = scale
        self._channels = channels

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, i: int) -> str:
        """The GT's file name without its ending."""
        return self._pairs[i].name

    def load(self, i: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Read a pair; see `ValidationSet.load`.

        Raises:
            UserError: naming a broken file or a pair whose sizes do not fit.
        """
        pair = self._pairs[i]
        reading = pair.gt
        try:
            gt = read_picture(pair.gt, self._channels).pixels
            if pair.lq:
                reading = pair.lq
                lq = read_picture(pair.lq, self._channels).pixels
                return lq, fit_pair(gt, lq, self._scale)
            gt = cut_to_multiple(gt, self._scale)
        except PictureError as error:
            raise UserError(f"{reading}: {error}") from error
        return (resize_uint8(gt, 1 / self._scale) if self._scale > 1 else None), gt


def _explain(problems: list[Problem], gt: Path, lq: Path | None, scale: int) -> str:
    """The first problems, and the usual template that would pair the files if there is one."""
    lines = [f"{problem.file}: {problem.reason}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN} more files")
    for template in ("{}", f"{{}}x{scale}", f"{{}}_LRBI_x{scale}"):
        if not pair_folder(gt, lq, template)[1]:
            lines.append(f"did you mean the filename template '{template}'?")
    return "\n".join(lines)


class ShardSet:
    """A shard folder as a validation set: whole pictures in packed order."""

    def __init__(self, folder: Path, *, scale: int, channels: Channels = "rgb") -> None:
        """Open the shards.

        Raises:
            UserError: if the folder is no intact shard folder, or of another scale or other channels.
        """
        self._shards = Shards.open(folder)
        for key, wanted in (("scale", scale), ("channels", channels)):
            if self._shards.settings[key] != wanted:
                raise UserError(f"{folder}: shards of {key} {self._shards.settings[key]}, the network needs {wanted}")

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, i: int) -> str:
        """The sample's key."""
        return self._shards.key(i)

    def load(self, i: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Copy a sample out of its shard; see `ValidationSet.load`."""
        return (self._shards.picture(i, "lq") if self._shards.has_lq else None), self._shards.picture(i, "gt")


def open_validation_set(config: ValSetConfig, scale: int, channels: Channels) -> ValidationSet:
    """The validation set that a configuration names.

    Raises:
        UserError: if its folders are missing, empty or do not fit together.
    """
    if config.shards is not None:
        return ShardSet(config.shards, scale=scale, channels=channels)
    assert config.gt is not None  # ValSetConfig allows nothing else
    return PairedFolder(config.gt, config.lq, scale=scale, filename_tmpl=config.filename_tmpl, channels=channels)
