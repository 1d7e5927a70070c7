"""LQ from GT: MATLAB's resize against recorded numbers, and the published noise and JPEG."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from mambair_ds.data.degradations import add_validation_noise, imresize, jpeg_roundtrip, resize_uint8

REFERENCE = Path(__file__).parents[1] / "data/reference"


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_reduction_matches_the_reference(scale: int) -> None:
    reference = np.load(REFERENCE / "imresize.npz")
    gt = data.astronaut()
    gt = gt[: 512 // scale * scale, : 512 // scale * scale]
    exact = imresize(gt / 255.0, 1 / scale)
    corner = reference[f"imresize_astronaut_x{scale}_f32_corner"]
    np.testing.assert_allclose(exact[: corner.shape[0], : corner.shape[1]], corner, atol=1e-6, rtol=0)

    expected = reference[f"imresize_astronaut_x{scale}"]
    difference = np.abs(resize_uint8(gt, 1 / scale).astype(int) - expected)
    near_half = np.abs(exact * 255 % 1 - 0.5) < 1e-4
    assert difference.max() <= 1
    assert not difference[~near_half].any()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_reduction_of_another_shape(scale: int) -> None:
    """Not square, and summed over the whole picture."""
    expected = json.loads((REFERENCE / "metrics.json").read_text())["imresize"][f"chelsea_x{scale}"]
    height, width, _ = expected["in_shape"]
    lq = resize_uint8(data.chelsea()[:height, :width], 1 / scale)
    assert list(lq.shape) == expected["out_shape"]
    assert abs(int(lq.sum(dtype=np.int64)) - expected["sum"]) <= expected["n_within_1e_4_of_half"]


def test_enlarging_keeps_flat_and_linear_pictures() -> None:
    ramp = np.tile(np.arange(40.0), (30, 1))
    large = imresize(ramp, 3)
    assert large.shape == (90, 120)
    # Away from the mirrored border a cubic reproduces a straight line.
    np.testing.assert_allclose(large[:, 9:-9], np.tile((np.arange(120) - 1) / 3, (90, 1))[:, 9:-9], atol=1e-12)
    np.testing.assert_allclose(imresize(np.full((5, 7, 3), 0.25), 4), 0.25, atol=1e-12)


def test_sizes_are_rounded_up_and_tiny_pictures_work() -> None:
    assert imresize(np.zeros((171, 7)), 1 / 3).shape == (57, 3)
    assert imresize(np.ones((1, 1, 3)), 1 / 4).tolist() == [[[1.0, 1.0, 1.0]]]
    assert imresize(np.zeros((2, 3), np.float32), 2).dtype == np.float32


def test_wrong_input_is_refused() -> None:
    for picture, scale in [
        (np.zeros((4, 4), np.uint8), 0.5),
        (np.zeros(4), 0.5),
        (np.zeros((0, 4)), 0.5),
        (np.zeros((4, 4)), 0),
    ]:
        with pytest.raises(ValueError):
            imresize(picture, scale)
    with pytest.raises(ValueError):
        resize_uint8(np.zeros((4, 4)), 0.5)


def test_validation_noise_is_the_published_draw() -> None:
    gt = data.astronaut()[:20, :30]
    bgr = gt[..., ::-1].astype(np.float32) / 255.0
    np.random.seed(seed=0)
    published = bgr + np.random.normal(0, 25 / 255.0, bgr.shape)
    noisy = add_validation_noise(gt, 25)
    assert noisy.dtype == np.float32
    np.testing.assert_array_equal(noisy, published[..., ::-1].astype(np.float32))
    np.testing.assert_array_equal(noisy, add_validation_noise(gt, 25))


def test_jpeg_is_the_published_encoder() -> None:
    gt = data.astronaut()[:33, :47]
    file = io.BytesIO()
    Image.fromarray(gt).save(file, "JPEG", quality=10, subsampling="4:2:0")
    np.testing.assert_array_equal(jpeg_roundtrip(gt, 10), np.asarray(Image.open(file)))

    grey = gt[..., :1]
    encoded = cv2.imencode(".jpg", grey[..., 0], [cv2.IMWRITE_JPEG_QUALITY, 10])[1]
    np.testing.assert_array_equal(jpeg_roundtrip(grey, 10)[..., 0], cv2.imdecode(encoded, 0))
