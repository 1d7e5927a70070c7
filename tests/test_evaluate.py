"""The evaluate door: the numbers of every picture and set, from folders or a configuration, on any number of ranks."""

import csv
import json
import subprocess
import sys
import types

import cv2
import numpy as np
import pytest
import torch
import yaml
from networks import build_tiny, tiny_network
from PIL import Image

from mambair_ds.data.degradations import add_validation_noise, jpeg_roundtrip, resize_uint8
from mambair_ds.evaluate import main
from mambair_ds.inference import restore, to_picture, to_tensor
from mambair_ds.metrics import psnr, ssim
from mambair_ds.weights import save_network


def photograph(seed, height=40, width=52, channels=3):
    """Smooth enough for a scale to make sense."""
    noise = np.random.default_rng(seed).random((height, width, channels), np.float32)
    return np.atleast_3d(cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Sets A (with LQ named {}x2) and B (grey), and weights."""
    folder = tmp_path_factory.mktemp("place")
    for i in range(3):
        gt = photograph(i)
        for path, picture in ((f"A/HR/p{i}.png", gt), (f"A/LR/p{i}x2.png", resize_uint8(gt, 0.5))):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / path)
    (folder / "B").mkdir()
    Image.fromarray(photograph(9, channels=1)[..., 0]).save(folder / "B/grey.png")
    x2, same = build_tiny(0), build_tiny(1, upscale=1, upsampler="", in_chans=1)
    save_network(folder / "x2.pth", {"params": x2.state_dict()})
    save_network(folder / "gray.safetensors", {"params": same.state_dict()})
    return folder


def measured(tmp_path, *arguments):
    out = tmp_path / "results.json"
    assert main([*map(str, arguments), "--out", str(out), "--overwrite"]) == 0
    return json.loads(out.read_text())


def test_folders_are_measured_as_published(place, tmp_path):
    results = measured(
        tmp_path,
        "--weights",
        place / "x2.pth",
        "--gt",
        place / "A/HR",
        "--lq",
        place / "A/LR",
        "--filename-tmpl",
        "{}x2",
    )
    rows = results["sets"]["A"]["pictures"]
    for i in range(3):
        gt = photograph(i)
        picture = to_picture(restore(build_tiny(0), to_tensor(resize_uint8(gt, 0.5)), 2))
        expected = {"psnr": psnr(picture, gt, 2, True), "ssim": ssim(picture, gt, 2, True)}
        assert rows[f"p{i}"] == pytest.approx(expected, abs=1e-5)
    assert results["sets"]["A"]["average"]["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows.values()]))
    assert (results["crop_border"], results["test_y_channel"]) == (2, True)


def test_lq_is_made_where_there_is_none(place, tmp_path):
    given = ("--gt", place / "A/HR", "--lq", place / "A/LR", "--filename-tmpl", "{}x2")
    made = measured(tmp_path, "--weights", place / "x2.pth", "--gt", place / "A/HR")
    assert made["sets"] == measured(tmp_path, "--weights", place / "x2.pth", *given)["sets"]


@pytest.mark.parametrize(
    "options, lq",
    [
        (["--task", "denoise", "--sigma", "25"], lambda gt: np.rint(np.clip(add_validation_noise(gt, 25), 0, 1) * 255)),
        (["--task", "jpeg", "--quality", "10"], lambda gt: jpeg_roundtrip(gt, 10)),
    ],
    ids=["denoise", "jpeg"],
)
def test_bicubic_measures_the_degraded_picture_at_scale_1(place, tmp_path, options, lq):
    results = measured(
        tmp_path, "--weights", "bicubic", "--scale", "1", *options, "--gt", place / "B", "--metrics", "psnr"
    )
    gt = photograph(9, channels=1)
    if "denoise" in options:
        gt = np.repeat(gt, 3, axis=2)
    expected = psnr(lq(gt).astype(np.uint8), gt, 0, "jpeg" in options)
    assert results["sets"]["B"]["pictures"] == {"grey": {"psnr": pytest.approx(expected)}}


def test_a_grey_network_measures_grey(place, tmp_path):
    arguments = ("--task", "jpeg", "--quality", "40", "--gt", place / "B")
    results = measured(tmp_path, "--weights", place / "gray.safetensors", *arguments)
    gt = photograph(9, channels=1)
    network = build_tiny(1, upscale=1, upsampler="", in_chans=1)
    picture = to_picture(restore(network, to_tensor(jpeg_roundtrip(gt, 40)), 1))
    assert results["sets"]["B"]["pictures"]["grey"]["psnr"] == pytest.approx(psnr(picture, gt, 0, True), abs=1e-4)


def write_config(path, place, **more):
    sets = {
        "A": {"gt": str(place / "A/HR"), "lq": str(place / "A/LR"), "filename_tmpl": "{}x2"},
        "B": {"gt": str(place / "B")},
    }
    val = {"sets": sets, "crop_border": 2, "test_y_channel": True}
    path.write_text(yaml.safe_dump({"task": {"kind": "sr"}, "data": {"val": val}} | more))
    return path


def test_a_configuration_names_sets_and_weights(place, tmp_path, capsys):
    config = write_config(tmp_path / "test.yml", place, weights=str(place / "x2.pth"))
    results = measured(tmp_path, "--config", config)
    assert {name: list(one["pictures"]) for name, one in results["sets"].items()} == {
        "A": ["p0", "p1", "p2"],
        "B": ["grey"],
    }
    printed = capsys.readouterr().out
    assert printed.count("average") == 2 and "| set" in printed
    assert f"{results['sets']['A']['average']['psnr']:.4f}" in printed.split("| set")[1]


def test_the_configuration_says_the_precision_unless_the_command_does(place, tmp_path):
    config = write_config(tmp_path / "test.yml", place, weights=str(place / "x2.pth"))
    near = ("--config", config, "--set", "data.val.precision=bf16")

    def psnr_of(*arguments):
        return measured(tmp_path, *arguments)["sets"]["A"]["average"]["psnr"]

    exact = psnr_of("--config", config)
    assert psnr_of(*near, "--precision", "fp32") == exact
    assert exact != psnr_of(*near) == psnr_of("--config", config, "--precision", "bf16")


def test_a_runs_configuration_takes_the_runs_newest_weights(place, tmp_path):
    train = {"total_iter": 8, "optim": {"lr": 1e-4}, "scheduler": {"type": "MultiStepLR", "milestones": [4]}}
    train["pixel_loss"] = {"type": "L1Loss"}
    more = {"name": "run", "experiments_root": str(tmp_path), "network": tiny_network(), "train": train}
    config = write_config(tmp_path / "run.yml", place, **more)
    tree = yaml.safe_load(config.read_text())
    tree["data"]["train"] = {"shards": ["nowhere"], "gt_size": 32, "batch_size": 1}
    config.write_text(yaml.safe_dump(tree))
    for iteration, seed in ((8, 1), (16, 0)):
        save_network(tmp_path / f"run/models/net_g_{iteration}.pth", {"params": build_tiny(seed).state_dict()})
    assert (
        measured(tmp_path, "--config", config)["sets"]
        == measured(tmp_path, "--config", config, "--weights", place / "x2.pth")["sets"]
    )


def test_ranks_share_the_pictures(place, tmp_path):
    config = write_config(tmp_path / "test.yml", place, weights=str(place / "x2.pth"))
    tables = []
    for start in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]):
        out = tmp_path / f"{len(tables)}.csv"
        done = subprocess.run(
            [*start, "-m", "mambair_ds.evaluate", "--config", config, "--out", out], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        tables.append([[*row[:2], *map(float, row[2:])] for row in list(csv.reader(out.open()))[1:]])
        assert done.stdout.count("average") == 2  # one rank speaks
    for one, two in zip(*tables, strict=True):
        assert one[:2] == two[:2] and one[2:] == pytest.approx(two[2:], abs=1e-4)


def test_pictures_are_saved_when_asked(place, tmp_path):
    measured(tmp_path, "--weights", place / "x2.pth", "--gt", place / "A/HR", "--save-img", tmp_path / "saved")
    saved = np.asarray(Image.open(tmp_path / "saved/A/p1.png"))
    np.testing.assert_array_equal(
        saved, to_picture(restore(build_tiny(0), to_tensor(resize_uint8(photograph(1), 0.5)), 2))
    )


def test_perceptual_metrics_get_rgb_in_units_without_the_border(place, tmp_path, monkeypatch):
    seen = []

    def create_metric(name, device):
        def metric(a, b):
            seen.append((name, a, b))
            return torch.tensor(0.5)

        return metric

    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    results = measured(
        tmp_path, "--weights", "bicubic", "--scale", "2", "--gt", place / "B", "--metrics", "lpips", "dists"
    )
    assert results["sets"]["B"]["average"] == {"lpips": 0.5, "dists": 0.5}
    name, picture, gt = seen[0]
    assert name == "lpips" and picture.shape == gt.shape == (1, 3, 36, 48)
    expected = np.repeat(photograph(9, channels=1)[2:-2, 2:-2], 3, axis=2)
    np.testing.assert_allclose(gt[0].permute(1, 2, 0).numpy(), expected / 255, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gt", "A/HR"], "--weights: missing"),
        (["--weights", "bicubic", "--gt", "A/HR"], "--scale is missing"),
        (["--weights", "none.pth", "--gt", "A/HR"], "none.pth: cannot read it"),
        (["--weights", "x2.pth", "--gt", "nowhere"], "no such folder"),
        (["--weights", "x2.pth", "--gt", "A/HR", "--lq", "A/LR"], "did you mean the filename template '{}x2'?"),
        (["--weights", "x2.pth", "--gt", "A/HR", "--scale", "3"], "has scale 2"),
        (["--weights", "x2.pth", "--gt", "A/HR", "--task", "denoise"], "sigma is missing"),
        (["--weights", "x2.pth", "--gt", "A/HR", "--task", "denoise", "--sigma", "5"], "goes with scale 1"),
        (["--weights", "gray.safetensors", "--gt", "A/HR"], "scale 1 and no LQ"),
        (["--weights", "x2.pth", "--gt", "A/HR", "B/../A/HR"], "two sets of the name A"),
        (["--weights", "x2.pth", "--gt", "A/HR", "--out", "r.txt"], "ends in .json or .csv"),
        (["--weights", "x2.pth", "--gt", "A/HR", "--out", "there.csv"], "there already"),
        (["--weights", "x2.pth", "--gt", "A/HR", "--crop-border", "18"], "A/p0: SSIM needs"),
        (["--config", "none.yml"], "no file none.yml"),
        (["--config", "typo.yml"], "unknown key; did you mean weights?"),
    ],
)
def test_mistakes_get_one_message(place, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(place)
    (place / "there.csv").write_text("mine")
    write_config(place / "typo.yml", place, wieghts="x2.pth")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "evaluate: " in said and words in said and "Traceback" not in said
    assert (place / "there.csv").read_text() == "mine"


def test_pyiqa_is_asked_for(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    assert main(["--weights", "bicubic", "--scale", "2", "--gt", str(place / "B"), "--metrics", "lpips"]) == 2
    assert "mambair-ds[perceptual]" in capsys.readouterr().err
