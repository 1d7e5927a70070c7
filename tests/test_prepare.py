"""The door from folders to shards: everything bad is listed before anything is written, and a stopped run continues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

import mambair_ds.data.packing as packing
from mambair_ds.data.degradations import resize_uint8
from mambair_ds.data.shards import Shards, file_sha256
from mambair_ds.prepare import main

ASTRONAUT = data.astronaut()


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(picture).save(path)


@pytest.fixture
def gt(tmp_path: Path) -> Path:
    for i in range(12):
        save(tmp_path / "gt" / f"{i:02d}.png", ASTRONAUT[20 * i : 20 * i + 101, 10 * i : 10 * i + 120 + i])
    return tmp_path / "gt"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def digest(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["tif", "png"])
def test_lq_is_made_and_order_is_shuffled(gt: Path, tmp_path: Path, form: str) -> None:
    assert run("--gt", gt, "--scale", 2, "--out", tmp_path / "s", "--format", form, "--seed", 5) == 0
    shards = Shards.open(tmp_path / "s")
    shards.verify()
    keys = [shards.key(i) for i in range(len(shards))]
    assert sorted(keys) == [f"{i:02d}" for i in range(12)] != keys
    for i, key in enumerate(keys):
        source = np.asarray(Image.open(gt / f"{key}.png"))
        cut = source[:100, : source.shape[1] // 2 * 2]
        np.testing.assert_array_equal(shards.picture(i, "gt"), cut)
        np.testing.assert_array_equal(shards.picture(i, "lq"), resize_uint8(cut, 0.5))

    assert run("--gt", gt, "--scale", 2, "--out", tmp_path / "t", "--format", form, "--seed", 6) == 0
    other = Shards.open(tmp_path / "t")
    assert [other.key(i) for i in range(12)] != keys


def test_pairs_from_several_folders(tmp_path: Path) -> None:
    for part, name in (("1", "a"), ("2", "b")):
        save(tmp_path / f"gt{part}" / f"{name}.png", ASTRONAUT[:33, :44])
        save(tmp_path / f"lq{part}" / f"{name}x4.png", ASTRONAUT[:8, :11])
    folders = [[tmp_path / f"{kind}{part}" for part in "12"] for kind in ("gt", "lq")]
    arguments = ["--gt", *folders[0], "--lq", *folders[1], "--filename-tmpl", "{}x4", "--scale", 4]
    assert run(*arguments, "--out", tmp_path / "s") == 0
    shards = Shards.open(tmp_path / "s")
    for i in range(2):
        np.testing.assert_array_equal(shards.picture(i, "gt"), ASTRONAUT[:32, :44])
        np.testing.assert_array_equal(shards.picture(i, "lq"), ASTRONAUT[:8, :11])


def test_scale_1_keeps_gt_alone_and_grey_has_one_channel(gt: Path, tmp_path: Path) -> None:
    assert run("--gt", gt, "--scale", 1, "--channels", "gray", "--out", tmp_path / "s") == 0
    shards = Shards.open(tmp_path / "s")
    assert not shards.has_lq and shards.channels == 1
    assert sorted(shards.shape(i, "gt") for i in range(12)) == [(101, 120 + i, 1) for i in range(12)]


def test_everything_bad_is_listed_and_nothing_written(
    gt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lq = tmp_path / "lq"
    for path in gt.iterdir():
        width = Image.open(path).width
        save(lq / path.name, ASTRONAUT[:50, : width // 2])
    (gt / "00.png").write_bytes((gt / "00.png").read_bytes()[:900])
    save(lq / "01.png", ASTRONAUT[:49, :60])
    (lq / "02.png").unlink()
    save(lq / "stray.png", ASTRONAUT[:5, :5])
    save(gt / "03.jpg", ASTRONAUT[:101, :123])

    arguments = ["--gt", gt, "--lq", lq, "--scale", 2, "--out", tmp_path / "s"]
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    for part in (
        "6 files cannot be used",
        "gt/00.png: cannot be decoded",
        "lq/01.png: sizes do not fit: GT 121x101, LQ 60x49, expected LQ 60x50 at scale 2",
        "gt/02.png: no LQ partner 02.*",
        "lq/stray.png: no GT partner",
        "gt/03.jpg: name is taken twice, by 03.jpg and 03.png",
        "gt/03.png: name is taken twice",
    ):
        assert part in message
    assert not (tmp_path / "s").exists()

    assert run(*arguments, "--skip-bad") == 0
    shards = Shards.open(tmp_path / "s")
    assert {shards.key(i) for i in range(len(shards))} == {f"{i:02d}" for i in range(4, 12)}
    listed = {Path(item["file"]).name for item in shards.manifest["skipped"]}
    assert listed == {"00.png", "01.png", "02.png", "stray.png", "03.jpg", "03.png"}


def test_one_name_in_two_folders(gt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "more" / "07.png", ASTRONAUT)
    save(tmp_path / "more" / "a b.png", ASTRONAUT)
    save(tmp_path / "more" / "a.b.png", ASTRONAUT)
    assert run("--gt", gt, tmp_path / "more", "--scale", 2, "--out", tmp_path / "s") == 2
    message = capsys.readouterr().err
    assert "4 files" in message
    assert "name 07 is taken twice" in message
    assert "name a_b is taken twice" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gt", "nowhere", "nowhere2"], "nowhere2: no such folder"),
        (["--gt", "empty"], "empty: no pictures"),
        (["--gt", "gt", "--lq", "gt", "gt"], "one LQ folder a GT folder"),
        (["--gt", "gt", "--lq", "gt", "--filename-tmpl", "x2"], "expected {} where"),
        (["--gt", "gt", "--out", "gt"], "gt: not empty and not a shard folder"),
        (["--gt", "gt", "--out", "gt/00.png"], "00.png: a file"),
    ],
)
def test_bad_arguments(
    gt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run("--scale", 2, "--out", "s", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_again_does_nothing_and_other_settings_are_refused(
    gt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert run("--gt", gt, "--scale", 2, "--out", out) == 0
    before = digest(out)
    assert run("--gt", gt, "--scale", 2, "--out", out) == 0
    assert "complete already" in capsys.readouterr().err
    assert run("--gt", gt, "--scale", 4, "--out", out) == 2
    assert "scale 2 (now 4)" in capsys.readouterr().err
    save(gt / "new.png", ASTRONAUT)
    assert run("--gt", gt, "--scale", 2, "--out", out) == 2
    assert "other pictures" in capsys.readouterr().err
    assert digest(out) == before


def test_a_failed_run_continues_to_the_same_bytes(
    gt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in gt.iterdir():
        save(path, np.resize(np.asarray(Image.open(path)), (400, 500, 3)))  # 750 kB with LQ: one a shard of 1 MB
    arguments = ["--gt", gt, "--scale", 2, "--shard-size", 1]
    assert run(*arguments, "--out", tmp_path / "whole") == 0

    out, write_shard = tmp_path / "stopped", packing.write_shard

    def full_disk(folder: Path, number: int, samples: object) -> object:
        if number == 4:
            raise OSError(28, "No space left on device")
        return write_shard(folder, number, samples)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_shard", full_disk)
        assert run(*arguments, "--out", out) == 1
    assert "No space left" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    os.truncate(out / "000001.tar", 1000)  # a finished shard that got damaged meanwhile
    kept = (out / "000000.tar").stat().st_mtime_ns

    assert run(*arguments, "--out", out) == 0
    assert "3 of 12 shards are written already" in capsys.readouterr().err
    assert (out / "000000.tar").stat().st_mtime_ns == kept
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals_leave_a_run_to_continue(tmp_path: Path, number: signal.Signals, code: int) -> None:
    # Pictures without end: numbered links to one file, so that the run cannot finish before the signal.
    save(tmp_path / "one.png", np.resize(ASTRONAUT, (700, 700, 3)))
    (tmp_path / "gt").mkdir()
    for i in range(60):
        os.link(tmp_path / "one.png", tmp_path / "gt" / f"{i}.png")
    out = tmp_path / "s"
    command = [sys.executable, "-m", "mambair_ds.prepare", "--gt", tmp_path / "gt", "--scale", 2, "--out", out]
    command += ["--shard-size", 2, "--workers", 1]
    # A background job of a shell ignores Ctrl-C, and so would its children.
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heeded)
    deadline = time.monotonic() + 60
    while not (out / ".prepare" / "000001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert "run the same command again to continue" in message
    assert not (out / "manifest.json").exists()
    assert main([str(word) for word in command[3:]]) == 0
    Shards.open(out).verify()
    assert not [path for path in out.iterdir() if path.suffix not in (".tar", ".idx", ".json", ".npy")]
    assert json.loads((out / "manifest.json").read_text())["count"] == 60


def test_help_is_quick() -> None:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "mambair_ds.prepare", "--help"], check=True, capture_output=True)
    assert time.monotonic() - start < 1
