"""How LQ pictures come from GT on the CPU: the MATLAB resize, and noise and JPEG exactly as published validations do.

`imresize` follows MATLAB's function of that name (bicubic, antialiased), because the field's LQ pictures are made by
it; other libraries' bicubic differs by visible amounts, at borders most.
"""

from __future__ import annotations

import math

import cv2
import numpy as np


def imresize(picture: np.ndarray, scale: float) -> np.ndarray:
    """Resize as MATLAB's imresize(picture, scale) does: Keys' cubic (a = -0.5), widened by 1/scale when reducing.

    Args:
        picture: float32 or float64 (H, W) or (H, W, C); computed in its own type.
        scale: output size over input size, below or above 1.

    Returns:
        (ceil(H * scale), ceil(W * scale)[, C]), neither clipped nor rounded.

    Raises:
        ValueError: on other types or shapes, an empty picture or a scale not above 0.
    """
    if picture.dtype not in (np.float32, np.float64) or picture.ndim not in (2, 3) or picture.size == 0:
        raise ValueError(f"expected float (H, W) or (H, W, C), got {picture.dtype} {picture.shape}")
    if not scale > 0:
        raise ValueError(f"expected a scale above 0, got {scale}")
    # Rows first, then columns as rows of the transpose: both passes read whole contiguous rows.
    for _ in range(2):
        picture = np.ascontiguousarray(_resize_rows(picture, scale).swapaxes(0, 1))
    return picture


def resize_uint8(picture: np.ndarray, scale: float) -> np.ndarray:
    """`imresize` of a uint8 picture, in float32, rounded (half to even) and clipped to uint8.

    Bytes may differ by 1 from another program's where the value lies within rounding of a half.
    """
    if picture.dtype != np.uint8:
        raise ValueError(f"expected uint8, got {picture.dtype}")
    return np.clip(np.rint(imresize(picture.astype(np.float32), scale)), 0, 255).astype(np.uint8)


def add_validation_noise(gt: np.ndarray, sigma: float) -> np.ndarray:
    """The published validation noise: NumPy's legacy generator, seeded 0 anew for each picture.

    The published code adds it to BGR pictures, so here the channels of the draw are reversed: every pixel gets the
    very noise it gets there.

    Args:
        gt: uint8 RGB (H, W, 3) or grey (H, W, 1).
        sigma: standard deviation in grey levels of 255.

    Returns:
        float32, shape of gt, range about [0, 1], not clipped.
    """
    noise = np.random.RandomState(0).normal(0, sigma / 255.0, gt.shape)[..., ::-1]
    return (gt.astype(np.float32) / np.float32(255) + noise).astype(np.float32)


def jpeg_roundtrip(picture: np.ndarray, quality: int) -> np.ndarray:
    """A picture after OpenCV's JPEG encoder and decoder, the field's JPEG degradation.

    Args:
        picture: uint8 RGB (H, W, 3), compressed as YCbCr 4:2:0, or grey (H, W, 1).
        quality: 1 to 100.

    Returns:
        uint8, shape of picture.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3):
        raise ValueError(f"expected uint8 (H, W, 1 or 3), got {picture.dtype} {picture.shape}")
    bgr = np.ascontiguousarray(picture[..., ::-1])
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)).reshape(picture.shape)
    return np.ascontiguousarray(decoded[..., ::-1])


def _resize_rows(x: np.ndarray, scale: float) -> np.ndarray:
    """Resize along the first axis: (n, ...) to (ceil(n * scale), ...)."""
    weights, rows = _taps(len(x), scale)
    weights = weights.astype(x.dtype)
    out = np.zeros((len(rows), *x.shape[1:]), x.dtype)
    for tap in range(rows.shape[1]):
        taken = x[rows[:, tap]]
        taken *= weights[:, tap].reshape(-1, *[1] * (x.ndim - 1))
        out += taken
    return out


def _taps(size: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """For each output row the input rows it is made of (mirrored at the border) and their weights: both (out, taps)."""
    out_size = math.ceil(round(size * scale, 9))  # 1/3 is not exact: 171/3 must not become 58
    stretch = min(scale, 1.0)
    taps = math.ceil(4 / stretch) + 2
    center = (np.arange(out_size) + 0.5) / scale - 0.5
    first = np.floor(center - 2 / stretch) + 1
    rows = first[:, None] + np.arange(taps)
    weights = _cubic((center[:, None] - rows) * stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    used = weights.any(axis=0)
    mirrored = rows[:, used].astype(np.int64) % (2 * size)
    return weights[:, used], np.minimum(mirrored, 2 * size - 1 - mirrored)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel, a = -0.5, support (-2, 2)."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
