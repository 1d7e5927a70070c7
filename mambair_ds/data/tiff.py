"""Uncompressed strip TIFF: the form in which whole pictures lie in a shard.

Any TIFF reader opens these files, and their pixels are one contiguous (H, W, C) block after a short header, so that a
crop can be copied out of a memory-mapped shard without decoding. Strips of 16 rows keep region decoders cheap too.
"""

from __future__ import annotations

import struct

import numpy as np

ROWS_PER_STRIP = 16
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_CODES = {_SHORT: "H", _LONG: "I", _RATIONAL: "I"}  # a rational is two longs


def encode_tiff(picture: np.ndarray) -> tuple[bytes, int]:
    """Encode a picture as uncompressed strip TIFF.

    Args:
        picture: uint8 (H, W, 1) grey or (H, W, 3) RGB.

    Returns:
        The file's bytes, and the offset of the first pixel in them.

    Raises:
        ValueError: if the picture has another shape or type, or does not fit a TIFF file (4 GiB).
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3) or picture.size == 0:
        raise ValueError(f"expected uint8 (H, W, 1 or 3), got {picture.dtype} {picture.shape}")
    height, width, channels = picture.shape
    row = width * channels
    starts = range(0, height, ROWS_PER_STRIP)
    sizes = [min(ROWS_PER_STRIP, height - start) * row for start in starts]

    def header(pixels: int) -> bytes:
        return _header(
            [
                (256, _LONG, [width]),
                (257, _LONG, [height]),
                (258, _SHORT, [8] * channels),  # bits per sample
                (259, _SHORT, [1]),  # no compression
                (262, _SHORT, [2 if channels == 3 else 1]),  # RGB, or grey with black at 0
                (273, _LONG, [pixels + start * row for start in starts]),
                (277, _SHORT, [channels]),
                (278, _LONG, [ROWS_PER_STRIP]),
                (279, _LONG, sizes),
                (282, _RATIONAL, [72, 1]),  # resolution: without meaning here, but a baseline file has it
                (283, _RATIONAL, [72, 1]),
                (284, _SHORT, [1]),  # channels interleaved
                (296, _SHORT, [2]),
            ]
        )

    offset = len(header(0))
    if offset + picture.size >= 2**32:
        raise ValueError(f"{width}x{height} pixels do not fit a TIFF file (4 GiB)")
    return header(offset) + picture.tobytes(), offset


def _header(entries: list[tuple[int, int, list[int]]]) -> bytes:
    """A little-endian header with one directory, padded to 16 bytes; values wider than 4 bytes follow the directory."""
    directory = struct.pack("<H", len(entries))
    outside = b""
    outside_at = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, values in entries:
        data = struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
        count = len(values) // 2 if kind == _RATIONAL else len(values)
        if len(data) > 4:
            data, outside = struct.pack("<I", outside_at + len(outside)), outside + data
        directory += struct.pack("<HHI", tag, kind, count) + data.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + outside
    return head.ljust(-(-len(head) // 16) * 16, b"\0")
