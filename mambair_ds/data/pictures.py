"""Pictures from folders: which files there are, which belong together, and their pixels as uint8.

Whatever Pillow or OpenCV read becomes RGB (or grey) of 8 bits, upright. What that changed is said in `Picture.notes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from mambair_ds.config import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm"})
"""Endings (in any case) of the files that count as pictures."""

Channels = Literal["rgb", "gray"]

DEEP_GREY = ("I", "I;16", "I;16B", "I;16L")
"""Pillow's modes for grey of more than 8 bits."""


class PictureError(Exception):
    """A picture that cannot be used; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture."""

    pixels: np.ndarray
    """uint8 (H, W, 3) RGB or (H, W, 1) grey."""
    notes: tuple[str, ...]
    """What reading changed, one short text each."""


@dataclass(frozen=True)
class Pair:
    """Files that make a sample."""

    name: str
    """The GT's file name without its ending."""
    gt: Path
    lq: Path | None


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why."""

    file: Path
    reason: str


def pair_folder(gt: Path, lq: Path | None, filename_tmpl: str) -> tuple[list[Pair], list[Problem]]:
    """The pictures of a GT folder (not of its subfolders) by name, each with its LQ partner.

    Args:
        gt: folder of GT pictures.
        lq: folder of their LQ pictures, or None.
        filename_tmpl: an LQ's name without ending, ``{}`` standing for the GT's: ``{}x2`` pairs baby and babyx2.

    Returns:
        The pairs in order of their names, and the files left over: without partner, or several of one name.

    Raises:
        UserError: if a folder is missing or holds no picture, or the template has no ``{}``.
    """
    if "{}" not in filename_tmpl:
        raise UserError(f"filename template {filename_tmpl!r}: expected {{}} where the GT's name goes, as in '{{}}x2'")
    gts, problems = _by_name(gt)
    if lq is None:
        return [Pair(name, path, None) for name, path in gts.items()], problems
    lqs, lq_problems = _by_name(lq)
    # A name that is taken twice is reported as that; its partner is not alone.
    partners_taken = {problem.file.stem for problem in lq_problems}
    partners_wanted = {filename_tmpl.replace("{}", problem.file.stem) for problem in problems}
    problems += lq_problems
    pairs = []
    for name, path in gts.items():
        partner = filename_tmpl.replace("{}", name)
        partners_wanted.add(partner)
        if partner in lqs:
            pairs.append(Pair(name, path, lqs[partner]))
        elif partner not in partners_taken:
            problems.append(Problem(path, f"no LQ partner {partner}.* in {lq}"))
    problems += [Problem(path, f"no GT partner in {gt}") for name, path in lqs.items() if name not in partners_wanted]
    return pairs, problems


def read_picture(path: Path, channels: Channels) -> Picture:
    """Decode a picture completely.

    16 bits become 8 by rounding v / 257; the orientation of EXIF is applied; alpha is dropped; palettes, CMYK and other
    color spaces become RGB; color profiles are ignored. For ``rgb``, grey is repeated; for ``gray``, color becomes the
    full-range luma of BT.601 (OpenCV's grey, as the published JPEG code reads).

    Raises:
        PictureError: if the file is broken, cut off or of a kind that has no 8-bit meaning (floating point).
    """
    try:
        pixels, notes = _decode(path)
    except PictureError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken bytes, SyntaxError included
        raise PictureError(f"cannot be decoded: {error}") from error
    if channels == "rgb" and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
        notes.append("grey repeated as RGB")
    elif channels == "gray" and pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        notes.append("color turned grey")
    return Picture(np.ascontiguousarray(pixels), tuple(notes))


def cut_to_multiple(gt: np.ndarray, scale: int) -> np.ndarray:
    """GT (H, W, C) without the bottom rows and right columns beyond a multiple of the scale.

    Raises:
        PictureError: if nothing is left.
    """
    height, width = gt.shape[0] // scale * scale, gt.shape[1] // scale * scale
    if not height or not width:
        raise PictureError(f"{gt.shape[1]}x{gt.shape[0]} pixels are smaller than the scale {scale}")
    return gt[:height, :width]


def fit_pair(gt: np.ndarray, lq: np.ndarray, scale: int) -> np.ndarray:
    """GT (H, W, C) cut to scale times the LQ (h, w, C).

    Raises:
        PictureError: if the LQ's size is not the GT's over the scale, rounded down.
    """
    expected = gt.shape[0] // scale, gt.shape[1] // scale
    if lq.shape[:2] != expected:
        raise PictureError(
            f"sizes do not fit: GT {gt.shape[1]}x{gt.shape[0]}, LQ {lq.shape[1]}x{lq.shape[0]}, "
            f"expected LQ {expected[1]}x{expected[0]} at scale {scale}"
        )
    return cut_to_multiple(gt, scale)


def _by_name(folder: Path) -> tuple[dict[str, Path], list[Problem]]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of pictures")
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            names.setdefault(path.stem, []).append(path)
    if not names:
        folders = sum(path.is_dir() for path in folder.iterdir())
        hint = f"; it has {folders} subfolders: name those that hold pictures" if folders else ""
        raise UserError(f"{folder}: no pictures ({', '.join(sorted(SUFFIXES))}){hint}")
    unique = {name: paths[0] for name, paths in names.items() if len(paths) == 1}
    problems = [
        Problem(path, f"name is taken twice, by {' and '.join(other.name for other in paths)}")
        for paths in names.values()
        if len(paths) > 1
        for path in paths
    ]
    return unique, problems


def _decode(path: Path) -> tuple[np.ndarray, list[str]]:
    """uint8 (H, W, 1 or 3) and notes."""
    notes = []
    with Image.open(path) as file:
        file.verify()  # checksums, which decoding a PNG skips
    with Image.open(path) as file:
        # Of deeper colors Pillow keeps the upper byte only; its tile still tells the depth of the file.
        deep_color = file.mode not in DEEP_GREY and ";16" in str(file.tile)
        if file.has_transparency_data:
            notes.append("alpha dropped")
        if file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            notes.append("turned as EXIF says")
        if getattr(file, "n_frames", 1) > 1:
            file.seek(0)
            notes.append("first of several frames taken")
        file.load()
        pixels = _deep_color(path) if deep_color else _plain(ImageOps.exif_transpose(file), notes)
    if pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 65535:
            raise PictureError("32-bit pixels; expected 8 or 16 bits")
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        notes.append("16 bits rounded to 8")
    return pixels, notes


def _plain(image: Image.Image, notes: list[str]) -> np.ndarray:
    """Pixels of what Pillow reads in full: uint8 grey or RGB, or deep grey; adds to the notes."""
    if image.mode == "F":
        raise PictureError("floating-point pixels; expected integers of 8 or 16 bits")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        notes.append(f"converted from {image.mode}")
    if image.mode in ("1", "LA", "La"):
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", *DEEP_GREY):
        image = image.convert("RGB")
    return np.atleast_3d(np.asarray(image))


def _deep_color(path: Path) -> np.ndarray:
    """uint16 RGB. OpenCV applies the orientation itself and drops alpha."""
    pixels = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if pixels is None or pixels.dtype != np.uint16:
        raise PictureError("16-bit colors that OpenCV cannot decode")
    return pixels[..., ::-1]
