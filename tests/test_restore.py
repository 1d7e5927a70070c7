"""The restore door and the Python call behind it: every kind of picture in, the same kind out, nothing lost."""

import io
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import build_tiny
from PIL import Image

from mambair_ds.config import UserError
from mambair_ds.data.degradations import imresize
from mambair_ds.data.picture_files import PictureFile, decode, encode
from mambair_ds.inference import restore
from mambair_ds.restore import main
from mambair_ds.restorer import Restorer, tile_for
from mambair_ds.weights import save_network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "x2.pth"
    save_network(path, {"params": build_tiny(0).state_dict(), "params_ema": build_tiny(1).state_dict()})
    return path


def random_picture(*shape, dtype=np.uint8):
    return np.random.default_rng(sum(shape)).integers(0, np.iinfo(dtype).max, shape, dtype)


def save(path, pixels, **parts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(PictureFile(pixels, **parts), "png", 95)[0])
    return path


def run(weights, *arguments):
    return main(["--weights", str(weights), *map(str, arguments)])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_three_lines_of_python_do_it(weights, dtype):
    restorer = Restorer.open(weights)
    picture = random_picture(10, 13, 3, dtype=dtype)
    restored = restorer(picture)
    top = np.iinfo(dtype).max
    lq = torch.from_numpy(picture.astype(np.float32) / np.float32(top)).permute(2, 0, 1)[None]
    expected = restore(build_tiny(1), lq, 2)[0].clamp(0, 1).permute(1, 2, 0).numpy()  # the running mean's weights
    assert restored.dtype == dtype
    np.testing.assert_array_equal(restored, np.rint(expected * top).astype(dtype))


def test_a_compiled_network_restores_pictures_of_all_sizes_alike(weights, monkeypatch):
    settings = []
    compile = torch.nn.Module.compile

    def without_inductor(module, **asked):  # which takes a C++ compiler, and minutes
        settings.append(asked)
        compile(module, backend="aot_eager", **asked)

    monkeypatch.setattr(torch.nn.Module, "compile", without_inductor)
    eager, compiled = Restorer.open(weights), Restorer.open(weights, compile=True)
    assert settings == [{"dynamic": True}]
    for shape in ((10, 13, 3), (21, 20, 3)):
        picture = random_picture(*shape)
        np.testing.assert_array_equal(compiled(picture), eager(picture))


@pytest.mark.parametrize("in_chans, upscale", [(3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_channels_stay_what_they_are(in_chans, upscale, shape):
    head = {"upsampler": ""} if upscale == 1 else {}
    restorer = Restorer(build_tiny(in_chans=in_chans, upscale=upscale, **head))
    restored = restorer(random_picture(*shape))
    assert restored.shape == (5 * upscale, 7 * upscale, *shape[2:])


def test_alpha_is_enlarged_bicubically_and_chroma_too():
    picture = random_picture(6, 6, 4)
    restored = Restorer(build_tiny())(picture)
    alpha = np.clip(np.rint(imresize(picture[..., 3:].astype(np.float32) / 255, 2) * 255), 0, 255)
    np.testing.assert_array_equal(restored[..., 3:], alpha)
    np.testing.assert_array_equal(restored[..., :3], Restorer(build_tiny())(picture[..., :3].copy()))


def test_a_one_channel_network_leaves_the_chroma():
    picture = cv2.GaussianBlur(random_picture(16, 16, 3), (0, 0), 4)  # dull colors: nothing is clipped
    restorer = Restorer(build_tiny(in_chans=1, upscale=1, upsampler=""))
    before, after = (
        cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2YCrCb)[..., 1:] for x in (picture, restorer(picture))
    )
    assert np.median(np.abs(before - after)) < 2


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8)]
)
def test_other_arrays_are_refused(bad):
    with pytest.raises(ValueError, match="expected uint8 or uint16"):
        Restorer(build_tiny())(bad)


def test_tiles_follow_the_memory():
    config = build_tiny().config
    sides = [tile_for(config, memory, None) for memory in (0.01, 0.1, 1)]
    assert sides == sorted(sides) and sides[0] >= config.window_size
    assert tile_for(config, 0.1, 0) > sides[1] > tile_for(config, 0.1, 100)
    with pytest.raises(UserError, match="too little"):
        tile_for(config, 1e-5, None)


def test_a_folder_is_restored_with_its_subfolders(weights, tmp_path, capsys):
    save(tmp_path / "in/a.png", random_picture(6, 8, 3))
    save(
        tmp_path / "in/deep/b.png",
        random_picture(5, 5, 1, dtype=np.uint16),
        alpha=random_picture(5, 5, 1, dtype=np.uint16),
    )
    assert run(weights, tmp_path / "in", "--out", tmp_path / "out") == 0
    assert decode((tmp_path / "out/a.png").read_bytes()).pixels.shape == (12, 16, 3)
    deep = decode((tmp_path / "out/deep/b.png").read_bytes())
    assert deep.pixels.shape == (10, 10, 1) and deep.pixels.dtype == np.uint16 and deep.alpha is not None
    said = capsys.readouterr().err
    assert "[1/2]" in said and "8x6 -> " in said and "16x12" in said


def test_a_bad_picture_is_named_and_the_rest_is_done(weights, tmp_path, capsys):
    for name in ("a", "c"):
        save(tmp_path / f"in/{name}.png", random_picture(6, 8, 3))
    (tmp_path / "in/b.png").write_bytes(b"nothing of the kind")
    assert run(weights, tmp_path / "in/*.png", "--out", tmp_path / "out") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    said = capsys.readouterr().err
    assert "b.png: NOT RESTORED: cannot be decoded" in said and "1 of 3" in said


def test_a_file_becomes_a_file_of_the_format_it_names(weights, tmp_path):
    source = save(tmp_path / "a.png", random_picture(6, 8, 3))
    for name, form in (("o.jpg", "JPEG"), ("o.JPEG", "JPEG"), ("o.webp", "WEBP"), ("o.png", "PNG")):
        assert run(weights, source, "--out", tmp_path / name) == 0
        assert Image.open(tmp_path / name).format == form
    assert run(weights, source, "--out", tmp_path / "folder", "--format", "webp") == 0
    assert Image.open(tmp_path / "folder/a.webp").size == (16, 12)


def test_stdin_becomes_stdout(weights, tmp_path):
    source = save(tmp_path / "a.png", random_picture(6, 8, 3))
    command = [sys.executable, "-m", "mambair_ds.restore", "--weights", str(weights), "-", "--out", "-"]
    done = subprocess.run(command, stdin=source.open("rb"), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(io.BytesIO(done.stdout)).size == (16, 12)


def test_what_is_there_stays_unless_told_otherwise(weights, tmp_path, capsys):
    source = save(tmp_path / "in/a.png", random_picture(6, 8, 3))
    old = save(tmp_path / "out/a.png", random_picture(2, 2, 3)).read_bytes()
    assert run(weights, source, "--out", tmp_path / "out") == 2
    assert "there already" in capsys.readouterr().err
    assert run(weights, source, "--out", tmp_path / "out", "--skip-existing") == 0
    assert (tmp_path / "out/a.png").read_bytes() == old
    assert run(weights, source, "--out", tmp_path / "out", "--overwrite") == 0
    assert decode((tmp_path / "out/a.png").read_bytes()).pixels.shape == (12, 16, 3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["missing.png", "--out", "o"], "no such file"),
        (["nothing*", "--out", "o"], "no pictures"),
        (["in", "in2/a.jpg", "--out", "o"], "both become"),
        (["in", "--out", "-"], "stdout takes one"),
        (["-", "in", "--out", "o"], "stdin is one picture"),
        (["in/a.png", "--out", "o.gif"], "expected a folder, or a file"),
        (["in/a.png", "--out", "o.png", "--format", "jpg"], "ending says the format"),
        (["in/a.png", "in2/b.jpg", "--out", "in/a.png"], "is a file"),
        (["in/a.png", "--out", "o", "--memory", "0.00001"], "too little"),
        (["in/a.png", "--out", "o", "--weights", "in/a.png"], "broken, or no file of weights"),
        (["in/a.png", "--out", "o", "--weights", "in"], "net_g_ITER.pth"),
    ],
)
def test_mistakes_get_one_message(weights, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in/a.png", random_picture(6, 8, 3))
    save(tmp_path / "in2/a.jpg", random_picture(6, 8, 3))
    save(tmp_path / "in2/b.jpg", random_picture(6, 8, 3))
    assert run(weights, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("restore: ") and words in said and "Traceback" not in said
    assert not (tmp_path / "o").exists()


def test_with_overlap_beyond_its_reach_a_local_network_restores_tiles_as_the_whole():
    def local(lq):
        return F.avg_pool2d(F.interpolate(lq, scale_factor=2), 3, 1, 1)

    x = torch.rand(1, 3, 50, 41)
    tiled, whole = (restore(local, x, 2, **options) for options in ({"tile": 16, "overlap": 2}, {"tile": None}))
    torch.testing.assert_close(tiled[..., :-2, :-2], whole[..., :-2, :-2])
