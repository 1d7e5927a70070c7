"""LQ pictures as the real world makes them, from GT alone: the second-order chain of Real-ESRGAN.

Blur, resize, noise and JPEG, twice, then a resize to the LQ's size with a sinc filter before or after the last JPEG
(Wang et al. 2021, arXiv 2107.10833, section 3). Every choice is drawn from a generator of the sample's own, so that a
sample is the same on any number of ranks and after a restart.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from mambair_ds.config import DegradationConfig, DegradationStage

_RESIZES = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
_ANGLES = (np.arange(400) + 0.5) * (math.pi / 400)  # of the integral that is J1


def degrade(gt: np.ndarray, scale: int, config: DegradationConfig, random: np.random.Generator) -> np.ndarray:
    """Degrade a crop.

    Args:
        gt: uint8 (H, W, C), sides multiples of the scale.
        scale: GT size over LQ size.
        config: the chain; type second_order.
        random: the sample's generator.

    Returns:
        uint8 (H / scale, W / scale, C).
    """
    height, width, channels = gt.shape
    target = (width // scale, height // scale)
    picture = gt.astype(np.float32) / np.float32(255)
    picture = _jpeg(_stage(picture, (width, height), config.first, random), config.first, random)
    picture = _stage(picture, target, config.second, random)
    sinc = _sinc(_size(random), random) if random.random() < config.final_sinc_prob else None

    def finish(x: np.ndarray) -> np.ndarray:
        x = _planes(cv2.resize(x, target, interpolation=_RESIZES[random.integers(3)]), channels)
        return x if sinc is None else _filter(x, sinc)

    if random.random() < 0.5:
        picture = _jpeg(finish(picture), config.second, random)
    else:
        picture = finish(_jpeg(picture, config.second, random))
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """The generator of the sample at a position of the run's stream."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def _stage(x: np.ndarray, size: tuple[int, int], stage: DegradationStage, random: np.random.Generator) -> np.ndarray:
    """Blur, resize and noise; float32 (H, W, C) around [0, 1]. `size` is what a factor of 1 gives, (width, height)."""
    if random.random() < stage.blur_prob:
        x = _filter(x, _kernel(stage, random))
    low, high = stage.resize_range
    kind = random.choice(3, p=stage.resize_prob)
    factor = random.uniform(1, high) if kind == 0 else random.uniform(low, 1) if kind == 1 else 1.0
    sides = tuple(max(1, round(side * factor)) for side in size)
    x = _planes(cv2.resize(x, sides, interpolation=_RESIZES[random.integers(3)]), x.shape[2])
    grey = random.random() < stage.gray_noise_prob
    shape = (*x.shape[:2], 1) if grey else x.shape
    if random.random() < stage.gaussian_noise_prob:
        x = x + random.standard_normal(shape, np.float32) * np.float32(random.uniform(*stage.noise_range) / 255)
    else:
        light = np.clip(x.mean(axis=2, keepdims=True) if grey else x, 0, 1)
        levels = 2 ** math.ceil(math.log2(len(np.unique(np.rint(light * 255)))))
        noise = random.poisson(light * levels) / levels - light
        x = x + noise.astype(np.float32) * np.float32(random.uniform(*stage.poisson_scale_range))
    return np.clip(x, 0, 1)


def _jpeg(x: np.ndarray, stage: DegradationStage, random: np.random.Generator) -> np.ndarray:
    quality = round(random.uniform(*stage.jpeg_range))
    bgr = np.ascontiguousarray(np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)[..., ::-1])
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = _planes(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)), x.shape[2])
    return np.ascontiguousarray(decoded[..., ::-1]).astype(np.float32) / np.float32(255)


def _size(random: np.random.Generator) -> int:
    """Side of a kernel: odd, 7 to 21."""
    return 7 + 2 * int(random.integers(8))


def _kernel(stage: DegradationStage, random: np.random.Generator) -> np.ndarray:
    """A blur kernel of the stage's mixture, with sum 1."""
    size = _size(random)
    if random.random() < stage.sinc_prob:
        return _sinc(size, random)
    kind = random.choice(6, p=stage.kernel_prob)
    across = random.uniform(*stage.blur_sigma)
    along = random.uniform(*stage.blur_sigma) if kind % 2 else across
    angle = random.uniform(-math.pi, math.pi) if kind % 2 else 0.0
    place = np.arange(size) - size // 2
    x, y = np.meshgrid(place, place)
    u = (math.cos(angle) * x + math.sin(angle) * y) / across
    v = (math.cos(angle) * y - math.sin(angle) * x) / along
    distance = u * u + v * v
    if kind < 2:
        kernel = np.exp(-0.5 * distance)
    elif kind < 4:
        kernel = np.exp(-0.5 * distance ** _beta(stage.betag_range, random))
    else:
        kernel = 1 / (1 + distance ** _beta(stage.betap_range, random))
    return kernel / kernel.sum()


def _beta(limits: tuple[float, float], random: np.random.Generator) -> float:
    """Below and above 1 equally often, as published."""
    low, high = limits
    return random.uniform(low, 1) if random.random() < 0.5 else random.uniform(1, high)


def _sinc(size: int, random: np.random.Generator) -> np.ndarray:
    """A low-pass filter with a sharp circular edge, whose ringing is that of over-sharpened pictures."""
    cutoff = random.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi)
    place = np.arange(size) - size // 2
    radius = np.hypot(*np.meshgrid(place, place))
    argument = cutoff * radius
    bessel = np.cos(_ANGLES - argument[..., None] * np.sin(_ANGLES)).mean(axis=-1)  # J1 by Bessel's integral
    with np.errstate(invalid="ignore", divide="ignore"):
        kernel = cutoff * bessel / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _filter(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return _planes(cv2.filter2D(x, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101), x.shape[2])


def _planes(x: np.ndarray, channels: int) -> np.ndarray:
    """OpenCV drops the last dimension of one channel."""
    return x.reshape(*x.shape[:2], channels)
