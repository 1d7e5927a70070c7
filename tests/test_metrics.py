"""PSNR and SSIM against numbers of the published code (computed there on BGR, here on RGB)."""

import json
from pathlib import Path

import numpy as np
import pytest
from skimage import data

from mambair_ds.metrics import psnr, ssim

REFERENCE = json.loads((Path(__file__).parent / "data/reference/metrics.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    gt = data.astronaut()
    noise = np.random.Generator(np.random.PCG64(11)).standard_normal(gt.shape) * 10
    noisy = np.clip(np.rint(gt + noise), 0, 255).astype(np.uint8)
    blur = np.pad(gt.astype(np.int64), ((1, 1), (1, 1), (0, 0)), "edge")
    blur = blur[:-2] + 2 * blur[1:-1] + blur[2:]
    blur = blur[:, :-2] + 2 * blur[:, 1:-1] + blur[:, 2:]
    return {"gt": gt, "noisy": noisy, "blur": ((blur + 8) // 16).astype(np.uint8)}


@pytest.mark.parametrize("crop", [0, 2, 4])
@pytest.mark.parametrize("channels", ["bgr", "y"])
@pytest.mark.parametrize("kind", ["noisy", "blur"])
def test_published_values(pictures: dict[str, np.ndarray], kind: str, channels: str, crop: int) -> None:
    expected = REFERENCE[f"{kind}_crop{crop}_{channels}"]
    arguments = pictures[kind], pictures["gt"], crop, channels == "y"
    # The reference's float32 logarithm differs between processors by a unit in the last place (3.8e-6 dB).
    assert psnr(*arguments) == pytest.approx(expected["psnr"], rel=2e-7 if channels == "y" else 1e-12)
    assert ssim(*arguments) == pytest.approx(expected["ssim"], abs=1e-9)


@pytest.mark.parametrize("axis", [(), (None,)])
def test_grey_is_its_own_luma(pictures: dict[str, np.ndarray], axis: tuple[None, ...]) -> None:
    expected = REFERENCE["gray2d_noisy_crop0"]
    noisy, gt = (pictures[name][(..., 1, *axis)] for name in ("noisy", "gt"))
    assert psnr(noisy, gt, 0, True) == pytest.approx(expected["psnr"], rel=2e-7)
    assert ssim(noisy, gt, 0, True) == pytest.approx(expected["ssim"], abs=1e-9)


def test_equal_pictures(pictures: dict[str, np.ndarray]) -> None:
    gt = pictures["gt"]
    for luma in (False, True):
        assert psnr(gt, gt, 0, luma) == float("inf")
        assert ssim(gt, gt, 0, luma) == 1.0


def test_what_is_cut_off_does_not_count(pictures: dict[str, np.ndarray]) -> None:
    gt = pictures["gt"]
    framed = gt.copy()
    framed[:3], framed[-3:], framed[:, :3], framed[:, -3:] = 0, 0, 0, 0
    assert psnr(framed, gt, 3) == float("inf") > psnr(framed, gt, 2)


def test_wrong_pictures_are_refused() -> None:
    small = np.zeros((12, 12, 3), np.uint8)
    for a, b, crop in [
        (small, small[:11], 0),
        (small, small.astype(np.float32), 0),
        (np.zeros((12, 12, 4), np.uint8),) * 2 + (0,),
        (np.zeros(12, np.uint8),) * 2 + (0,),
        (small, small, 6),
        (small, small, -1),
    ]:
        for metric in (psnr, ssim):
            with pytest.raises(ValueError):
                metric(a, b, crop)
    with pytest.raises(ValueError, match="11x11"):
        ssim(small, small, 1)
