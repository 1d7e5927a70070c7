"""A picture file with all that belongs to it: depth, alpha, color profile and EXIF, read and written again.

Training and evaluation want plain 8-bit pictures (`pictures`); restoring a user's picture must lose nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import ExifTags, Image

from mambair_ds.data.pictures import DEEP_GREY, PictureError

FORMATS = ("png", "jpg", "webp")
"""Formats that can be written; png keeps 16 bits."""

_EXIF_HEAD = b"Exif\x00\x00"  # before the TIFF structure in JPEG and WebP, not in PNG
_ICC_SPACE = slice(16, 20)  # of a profile: the color space it is for
# EXIF's eight orientations as what undoes them: transpose, flip up-down, flip left-right.
_TURNS = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


@dataclass(frozen=True)
class PictureFile:
    """A decoded file, upright."""

    pixels: np.ndarray
    """uint8 or uint16, (H, W, 1) grey or (H, W, 3) RGB."""
    alpha: np.ndarray | None = None
    """Same dtype, (H, W, 1)."""
    icc: bytes | None = None
    """Color profile."""
    exif: bytes | None = None
    """EXIF as a TIFF structure; the orientation is applied and no longer in it."""


def decode(data: bytes) -> PictureFile:
    """Decode a file completely.

    Palettes, CMYK and other color spaces become RGB (a profile of theirs is left out); of several frames the first
    counts.

    Raises:
        PictureError: if the bytes are broken, cut off, or of a kind that has no meaning in integers (floating point).
    """
    try:
        return _decode(data)
    except PictureError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken bytes, SyntaxError included
        raise PictureError(f"cannot be decoded: {error}") from error


def _decode(data: bytes) -> PictureFile:
    with Image.open(io.BytesIO(data)) as file:
        file.verify()  # checksums, which decoding a PNG skips
    with Image.open(io.BytesIO(data)) as file:
        mode = file.mode
        if mode == "F":
            raise PictureError("floating-point pixels; expected integers of 8 or 16 bits")
        deep = mode in DEEP_GREY or ";16" in str(file.tile)
        exif, icc = file.getexif(), file.info.get("icc_profile")
        turn = _TURNS.get(exif.pop(ExifTags.Base.Orientation, 1), (0, 0, 0))
        file.load()
        pixels, alpha = _deep(data) if deep else _plain(file)
    if mode not in ("L", "LA", "RGB", "RGBA", *DEEP_GREY) or not _fits(icc, pixels):
        icc = None
    pixels = np.ascontiguousarray(_upright(pixels, turn))
    alpha = None if alpha is None else np.ascontiguousarray(_upright(alpha, turn))
    return PictureFile(pixels, alpha, icc, exif.tobytes().removeprefix(_EXIF_HEAD) if exif else None)


def _plain(file: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """8 bits: pixels and alpha."""
    transparent = file.has_transparency_data
    grey = file.mode in ("1", "L", "LA", "La")
    whole = np.asarray(file.convert(("LA" if grey else "RGBA") if transparent else ("L" if grey else "RGB")))
    whole = np.atleast_3d(whole)
    return (whole[..., :-1], whole[..., -1:]) if transparent else (whole, None)


def _deep(data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """16 bits, of which Pillow would keep the upper 8: pixels and alpha."""
    whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if whole is None or whole.dtype != np.uint16:
        raise PictureError("deep pixels that are no 16-bit integers; expected 8 or 16 bits")
    whole = np.atleast_3d(whole)
    pixels, alpha = (whole[..., :3], whole[..., 3:]) if whole.shape[2] == 4 else (whole, None)
    pixels = pixels[..., ::-1]
    if alpha is not None and (pixels == pixels[..., :1]).all():  # OpenCV reads grey with alpha as colors
        pixels = pixels[..., :1]
    return pixels, alpha


def encode(picture: PictureFile, form: str, quality: int) -> tuple[bytes, list[str]]:
    """Encode a picture with what belongs to it.

    Args:
        picture: what to write.
        form: one of `FORMATS`.
        quality: of jpg and webp, 1 to 100.

    Returns:
        The file's bytes, and what the format could not keep, a short text each.
    """
    lost = []
    pixels, alpha = picture.pixels, picture.alpha
    if pixels.dtype == np.uint16 and form != "png":
        pixels, alpha = _shallow(pixels), None if alpha is None else _shallow(alpha)
        lost.append(f"16 bits rounded to 8, all that {form} holds")
    if alpha is not None and form == "jpg":
        alpha = None
        lost.append("alpha dropped, which jpg does not hold")
    if alpha is not None and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)  # OpenCV writes no grey with alpha
    whole = pixels[..., ::-1] if alpha is None else np.concatenate((pixels[..., ::-1], alpha), axis=2)
    kinds, contents = [], []
    if picture.exif:
        kinds.append(cv2.IMAGE_METADATA_EXIF)
        contents.append(picture.exif if form == "png" else _EXIF_HEAD + picture.exif)
    if picture.icc and _fits(picture.icc, pixels):
        kinds.append(cv2.IMAGE_METADATA_ICCP)
        contents.append(picture.icc)
    elif picture.icc:
        lost.append("color profile dropped, which is not for these channels")
    flags = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "webp": cv2.IMWRITE_WEBP_QUALITY}
    done, data = cv2.imencodeWithMetadata(
        f".{form}",
        np.ascontiguousarray(whole),
        kinds,
        [np.frombuffer(content, np.uint8) for content in contents],
        [flags[form], quality] if form in flags else [],
    )
    if not done:
        raise PictureError(f"cannot be written as {form}")
    return data.tobytes(), lost


def resized_exif(exif: bytes | None, width: int, height: int) -> bytes | None:
    """EXIF whose record of the picture's size, if it has one, says the new size in pixels."""
    if exif is None:
        return None
    tags = Image.Exif()
    tags.load(_EXIF_HEAD + exif)
    detail = tags.get_ifd(ExifTags.IFD.Exif)
    for tag, size in ((ExifTags.Base.ExifImageWidth, width), (ExifTags.Base.ExifImageHeight, height)):
        if tag in detail:
            detail[tag] = size
    for tag, size in ((ExifTags.Base.ImageWidth, width), (ExifTags.Base.ImageLength, height)):
        if tag in tags:
            tags[tag] = size
    return tags.tobytes().removeprefix(_EXIF_HEAD)


def _shallow(x: np.ndarray) -> np.ndarray:
    return ((x.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _fits(icc: bytes | None, pixels: np.ndarray) -> bool:
    """Whether a color profile is for pixels of so many channels."""
    return icc is not None and icc[_ICC_SPACE] == (b"GRAY" if pixels.shape[2] == 1 else b"RGB ")


def _upright(x: np.ndarray, turn: Sequence[int]) -> np.ndarray:
    transpose, flip_v, flip_h = turn
    x = x.swapaxes(0, 1) if transpose else x
    return x[:: -1 if flip_v else 1, :: -1 if flip_h else 1]
