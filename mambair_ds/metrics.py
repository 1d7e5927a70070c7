"""PSNR and SSIM as the field computes them, number for number, so that results compare with published tables.

Both take uint8 RGB pictures. With ``test_y_channel`` the pictures become Y of BT.601 (16 to 235), unrounded and kept in
float32, as the published code (BasicSR's metrics) has it; that PSNR is then float32 arithmetic down to the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from mambair_ds.config import UserError

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(a: np.ndarray, b: np.ndarray, crop_border: int, test_y_channel: bool = False) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures.

    Args:
        a, b: uint8 (H, W, 3) RGB, (H, W, 1) or (H, W), both of one shape.
        crop_border: pixels cut from every side first.
        test_y_channel: measure on Y instead of RGB.

    Raises:
        ValueError: on other types or shapes, or if the crop leaves nothing.
    """
    a, b = _prepare(a, b, crop_border, test_y_channel)
    mse = np.mean((a - b) ** 2)
    return float("inf") if mse == 0 else float(10.0 * np.log10(255.0**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray, crop_border: int, test_y_channel: bool = False) -> float:
    """Structural similarity (Wang et al., 2004): Gaussian window 11x11, σ 1.5, valid area only, mean over the channels.

    Args and Raises as in `psnr`; the cropped pictures must be at least 11 pixels high and wide.
    """
    a, b = (x.astype(np.float64) for x in _prepare(a, b, crop_border, test_y_channel))
    if min(a.shape[:2]) < _WINDOW:
        raise ValueError(f"SSIM needs {_WINDOW}x{_WINDOW} pixels, {a.shape[0]}x{a.shape[1]} are left after the crop")
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a**2
    var_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (var_a + var_b + _C2)
    return float(np.mean(luminance * structure))


def perceptual(name: str, crop_border: int, device: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """LPIPS (Zhang et al., 2018; AlexNet) or DISTS (Ding et al., 2020) as pyiqa computes them; lower is better.

    Args:
        name: lpips or dists.
        crop_border: pixels cut from every side first.
        device: where to compute.

    Returns:
        A function of a picture and its GT, uint8 (H, W, 3) RGB or (H, W, 1).

    Raises:
        UserError: pyiqa is not installed, or cannot get the metric's weights.
    """
    try:
        import pyiqa
        import torch
    except ImportError as error:
        raise UserError(f"metric {name}: pip install 'mambair-ds[perceptual]' brings it ({error})") from error
    try:
        network = pyiqa.create_metric(name, device=torch.device(device))
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise UserError(f"metric {name}: pyiqa downloads its weights once and could not ({error})") from error

    def measure(a: np.ndarray, b: np.ndarray) -> float:
        tensors = []
        for picture in (a, b):
            inner = slice(crop_border, -crop_border or None)
            unit = np.broadcast_to(np.atleast_3d(picture)[inner, inner], (*picture[inner, inner].shape[:2], 3)) / 255
            tensors.append(torch.from_numpy(unit.astype(np.float32)).permute(2, 0, 1)[None].to(device))
        with torch.inference_mode():
            return float(network(*tensors))

    return measure


def _prepare(a: np.ndarray, b: np.ndarray, crop_border: int, test_y_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    if a.shape != b.shape:
        raise ValueError(f"pictures differ in shape: {a.shape} and {b.shape}")
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"expected uint8 pictures, got {a.dtype} and {b.dtype}")
    if a.ndim not in (2, 3) or (a.ndim == 3 and a.shape[2] not in (1, 3)):
        raise ValueError(f"expected (H, W), (H, W, 1) or (H, W, 3), got {a.shape}")
    if crop_border < 0 or 2 * crop_border >= min(a.shape[:2]):
        raise ValueError(f"crop_border {crop_border} leaves nothing of {a.shape[0]}x{a.shape[1]}")
    inner = slice(crop_border, -crop_border or None)
    return _to_float(a[inner, inner], test_y_channel), _to_float(b[inner, inner], test_y_channel)


def _to_float(picture: np.ndarray, luma: bool) -> np.ndarray:
    """float64 of the same values, or float32 Y (H, W, 1); a grey picture is its own Y."""
    picture = np.atleast_3d(picture)
    if not luma:
        return picture.astype(np.float64)
    unit = picture.astype(np.float32) / 255
    if unit.shape[2] == 3:
        # The sum in BGR order, as published: another order changes last bits.
        y = unit[..., ::-1] @ np.array([24.966, 128.553, 65.481]) + 16.0
        unit = (y / 255).astype(np.float32)[..., None]
    return unit * np.float32(255)


def _blur(x: np.ndarray) -> np.ndarray:
    """Gaussian mean of the windows that lie inside: (H, W, C) to (H - 10, W - 10, C)."""
    kernel = cv2.getGaussianKernel(_WINDOW, _SIGMA)
    margin = _WINDOW // 2
    return np.atleast_3d(cv2.sepFilter2D(x, -1, kernel, kernel))[margin:-margin, margin:-margin]
