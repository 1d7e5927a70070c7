"""Nothing of a picture file is lost on its way through: depth, alpha, profile, EXIF, orientation."""

import io

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from mambair_ds.data.picture_files import FORMATS, PictureFile, decode, encode, resized_exif
from mambair_ds.data.pictures import PictureError
from mambair_ds.files import write_whole

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(dtype, channels, height=9, width=7):
    return np.random.default_rng(channels).integers(0, np.iinfo(dtype).max, (height, width, channels), dtype)


def exif(orientation=1, **more):
    tags = Image.Exif()
    tags[ExifTags.Base.Make] = "Maker"
    tags[ExifTags.Base.Orientation] = orientation
    tags.get_ifd(ExifTags.IFD.Exif).update(more)
    return tags


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_png_keeps_pixels_depth_and_alpha(dtype, channels, alpha):
    pixels = picture(dtype, channels)
    transparency = picture(dtype, 1)[::-1] if alpha else None
    data, lost = encode(PictureFile(pixels, transparency), "png", 95)
    back = decode(data)
    assert not lost
    np.testing.assert_array_equal(
        back.pixels, pixels if not alpha or dtype == np.uint16 else np.repeat(pixels, 3 // channels, 2)
    )
    assert (back.alpha is None) if not alpha else (back.alpha == transparency).all()


@pytest.mark.parametrize("form", FORMATS)
def test_profile_and_exif_are_kept(form, capfd):
    tags = exif().tobytes()
    data, lost = encode(PictureFile(picture(np.uint8, 3), icc=SRGB, exif=tags.removeprefix(b"Exif\0\0")), form, 95)
    back = decode(data)
    assert not lost
    assert back.icc == SRGB
    read = Image.Exif()
    read.load(b"Exif\0\0" + back.exif)
    assert read[ExifTags.Base.Make] == "Maker"
    assert "invalid" not in capfd.readouterr().err


def test_a_profile_for_other_channels_is_left_out_and_said():
    data, lost = encode(PictureFile(picture(np.uint8, 1), icc=SRGB), "png", 95)
    assert decode(data).icc is None
    assert "profile" in lost[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_read_is_upright(orientation, dtype):
    pixels = picture(dtype, 3)
    data, _ = encode(PictureFile(pixels, exif=exif(orientation).tobytes().removeprefix(b"Exif\0\0")), "png", 95)
    back = decode(data)
    shallow = (pixels >> 8).astype(np.uint8) if dtype == np.uint16 else pixels
    turned = Image.fromarray(shallow)
    turned.getexif()[ExifTags.Base.Orientation] = orientation
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(turned))
    np.testing.assert_array_equal((back.pixels >> 8).astype(np.uint8) if dtype == np.uint16 else back.pixels, expected)
    left = Image.Exif()
    left.load(b"Exif\0\0" + back.exif)
    assert ExifTags.Base.Orientation not in left


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "LA", "RGBA", "I;16", "YCbCr"])
def test_modes_become_grey_or_rgb(mode):
    source = Image.fromarray(picture(np.uint8, 3, 16, 16)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        source = Image.fromarray(np.asarray(source).astype(np.uint16) * 257)
    stream = io.BytesIO()
    source.save(stream, "JPEG" if mode == "YCbCr" else "TIFF")
    back = decode(stream.getvalue())
    assert back.pixels.shape == (16, 16, 1 if mode in ("1", "LA", "I;16") else 3)
    assert (back.alpha is not None) == (mode in ("LA", "RGBA"))
    assert back.pixels.dtype == (np.uint16 if mode == "I;16" else np.uint8)


def test_a_transparent_color_is_alpha():
    source = Image.fromarray(np.full((4, 4, 3), 7, np.uint8))
    stream = io.BytesIO()
    source.save(stream, "PNG", transparency=(7, 7, 7))
    assert (decode(stream.getvalue()).alpha == 0).all()


def test_what_a_format_cannot_keep_is_said():
    deep = PictureFile(picture(np.uint16, 3), picture(np.uint16, 1))
    data, lost = encode(deep, "jpg", 95)
    assert decode(data).pixels.dtype == np.uint8
    assert [text.split()[0] for text in lost] == ["16", "alpha"]
    data, lost = encode(deep, "webp", 95)
    assert decode(data).alpha is not None
    assert len(lost) == 1


def test_the_recorded_size_follows_the_picture():
    tags = exif(**{})
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 7
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageHeight] = 9
    back = Image.Exif()
    back.load(b"Exif\0\0" + resized_exif(tags.tobytes().removeprefix(b"Exif\0\0"), 14, 18))
    detail = back.get_ifd(ExifTags.IFD.Exif)
    assert (detail[ExifTags.Base.ExifImageWidth], detail[ExifTags.Base.ExifImageHeight]) == (14, 18)
    assert back[ExifTags.Base.Make] == "Maker"
    assert resized_exif(None, 1, 1) is None


def float_tiff():
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(stream, "TIFF")
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", cv2.imencode(".png", picture(np.uint8, 3))[1].tobytes()[:-30], float_tiff()],
    ids=["empty", "text", "cut", "float"],
)
def test_what_cannot_be_read_has_a_reason(data):
    with pytest.raises(PictureError, match=r"decoded|floating"):
        decode(data)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
