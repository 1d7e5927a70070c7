"""Reading pictures of any kind as uint8, pairing folders, and validation sets over them."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from mambair_ds.config import UserError, ValSetConfig
from mambair_ds.data.degradations import resize_uint8
from mambair_ds.data.folders import PairedFolder, ShardSet, open_validation_set
from mambair_ds.data.pictures import PictureError, read_picture
from mambair_ds.data.shards import Sample, store_picture, write_manifest, write_shard

RGB = data.astronaut()[100:160, 200:280]
DEEP = (RGB.astype(np.uint16) << 8) + 200  # rounds up: v * 256 + 200 is nearer to (v + 1) * 257 for small v
ROUNDED = np.rint(DEEP / 257).astype(np.uint8)


def orientation(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = tag
    return exif


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.ppm", "A.PNG"])
def test_plain_rgb(tmp_path: Path, name: str) -> None:
    Image.fromarray(RGB).save(tmp_path / name, lossless=True)
    picture = read_picture(tmp_path / name, "rgb")
    np.testing.assert_array_equal(picture.pixels, RGB)
    assert picture.notes == ()


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_rounded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), DEEP[..., ::-1])
    picture = read_picture(path, "rgb")
    np.testing.assert_array_equal(picture.pixels, ROUNDED)
    assert picture.notes == ("16 bits rounded to 8",)
    Image.fromarray(DEEP[..., 0]).save(path)
    np.testing.assert_array_equal(read_picture(path, "gray").pixels, ROUNDED[..., :1])


def test_16_bits_with_alpha(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([DEEP[..., ::-1], DEEP[..., 0]]))
    picture = read_picture(tmp_path / "a.png", "rgb")
    np.testing.assert_array_equal(picture.pixels, ROUNDED)
    assert "alpha dropped" in picture.notes


def test_16_bits_turned(tmp_path: Path) -> None:
    encoded = cv2.imencode(".png", DEEP[..., ::-1])[1].tobytes()
    exif = b"eXIf" + orientation(6).tobytes()[6:]
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    (tmp_path / "a.png").write_bytes(encoded[:33] + chunk + encoded[33:])
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "rgb").pixels, np.rot90(ROUNDED, -1))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("tag", [3, 6, 8])
def test_exif_orientation(tmp_path: Path, suffix: str, tag: int) -> None:
    Image.fromarray(RGB).save(tmp_path / f"a.{suffix}", exif=orientation(tag), lossless=True)
    picture = read_picture(tmp_path / f"a.{suffix}", "rgb")
    np.testing.assert_array_equal(picture.pixels, np.rot90(RGB, {3: 2, 6: -1, 8: 1}[tag]))
    assert picture.notes == ("turned as EXIF says",)


def test_grey_and_color(tmp_path: Path) -> None:
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "grey.png", "rgb").pixels, RGB[..., [0, 0, 0]])
    np.testing.assert_array_equal(read_picture(tmp_path / "grey.png", "gray").pixels, RGB[..., :1])
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    luma = read_picture(tmp_path / "rgb.png", "gray").pixels
    assert np.abs(luma[..., 0] - RGB @ [0.299, 0.587, 0.114]).max() <= 0.51


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    picture = read_picture(path, "rgb")
    expected = image.convert("L" if mode in ("1", "LA") else "RGB").convert("RGB")
    np.testing.assert_array_equal(picture.pixels, np.asarray(expected))
    assert ("alpha dropped" in picture.notes) == (mode in ("LA", "RGBA"))


def test_broken_pictures(tmp_path: Path) -> None:
    def bad(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PictureError):
            read_picture(tmp_path / name, "rgb")

    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG")
    png = file.getvalue()
    bad("empty.png", b"")
    bad("text.png", b"no picture")
    bad("cut.png", png[: len(png) // 2])
    bad("flipped.png", png[:500] + bytes([png[500] ^ 1]) + png[501:])
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "JPEG")
    bad("cut.jpg", file.getvalue()[:1000])
    file = io.BytesIO()
    Image.fromarray(RGB[..., 0].astype(np.float32)).save(file, "TIFF")
    bad("float.tif", file.getvalue())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    gt, lq = tmp_path / "gt", tmp_path / "lq"
    gt.mkdir(), lq.mkdir()
    Image.fromarray(RGB).save(gt / "b.png")
    Image.fromarray(RGB[:50, :, 0]).save(gt / "a.bmp")
    Image.fromarray(RGB[::3, ::3][:20, :26]).save(lq / "bx3.png")
    Image.fromarray(RGB[:16, :26, 0]).save(lq / "ax3.png")
    (gt / "readme.txt").write_text("not a picture")
    return gt, lq


def test_paired_folder(folders: tuple[Path, Path]) -> None:
    val = open_validation_set(ValSetConfig(gt=folders[0], lq=folders[1], filename_tmpl="{}x3"), 3, "rgb")
    assert [val.name(i) for i in range(len(val))] == ["a", "b"]
    lq, gt = val.load(0)
    np.testing.assert_array_equal(gt, RGB[:48, :78, [0, 0, 0]])
    assert lq is not None and lq.shape == (16, 26, 3)


def test_gt_alone(folders: tuple[Path, Path]) -> None:
    lq, gt = PairedFolder(folders[0], scale=4).load(1)
    np.testing.assert_array_equal(gt, RGB)
    np.testing.assert_array_equal(lq, resize_uint8(RGB, 1 / 4))
    lq, gt = PairedFolder(folders[0], scale=1, channels="gray").load(1)
    assert lq is None and gt.shape == (60, 80, 1)


def test_every_lonely_file_is_named(folders: tuple[Path, Path]) -> None:
    (folders[1] / "ax3.png").rename(folders[1] / "cx3.png")
    with pytest.raises(UserError) as error:
        PairedFolder(*folders, scale=3, filename_tmpl="{}x3")
    assert "a.bmp: no LQ partner ax3.*" in str(error.value)
    assert "cx3.png: no GT partner" in str(error.value)


def test_sizes_that_do_not_fit(folders: tuple[Path, Path]) -> None:
    with pytest.raises(
        UserError, match=r"ax3\.png: sizes do not fit: GT 80x50, LQ 26x16, expected LQ 40x25 at scale 2"
    ):
        PairedFolder(*folders, scale=2, filename_tmpl="{}x3").load(0)


def test_shards_as_a_validation_set(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    sample = Sample("x", store_picture(RGB, "tif"), store_picture(RGB[::2, ::2], "tif"), {})
    write_manifest(folder, {"scale": 2, "channels": "rgb"}, [write_shard(folder, 0, [sample])])
    val = open_validation_set(ValSetConfig(shards=folder), 2, "rgb")
    lq, gt = val.load(0)
    assert (len(val), val.name(0)) == (1, "x")
    np.testing.assert_array_equal(gt, RGB)
    np.testing.assert_array_equal(lq, RGB[::2, ::2])
    with pytest.raises(UserError, match="shards of scale 2, the network needs 4"):
        ShardSet(folder, scale=4)
