"""The convert door: weights keep every number, option files every setting, ONNX the network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from networks import build_tiny, tiny_network

from mambair_ds.config import load_config, load_evaluation
from mambair_ds.convert import main
from mambair_ds.weights import open_network, read_weights, save_network

PUBLISHED = json.loads((Path(__file__).parent / "data/reference/training.json").read_text())


@pytest.fixture
def run(tmp_path):
    """A run's folder with weights of iteration 8 and its configuration."""
    params, mean = build_tiny(0).state_dict(), build_tiny(1).state_dict()
    save_network(tmp_path / "run/models/net_g_8.pth", {"params": params, "params_ema": mean})
    settings = {"name": "tiny", "task": {"kind": "sr"}, "network": tiny_network()}
    (tmp_path / "run/config.yml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run"


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_pth_keeps_both_sets(run, tmp_path):
    assert main(["weights", str(run), "--out", str(tmp_path / "a.pth")]) == 0
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(content) == ["params", "params_ema"]
    assert equal(content["params"], build_tiny(0).state_dict())
    assert equal(content["params_ema"], build_tiny(1).state_dict())


@pytest.mark.parametrize("key, seed", [(None, 1), ("params", 0), ("params_ema", 1)])
def test_safetensors_hold_one_set_and_come_back(run, tmp_path, key, seed):
    chosen = ["--param-key", key] if key else []
    out, back = tmp_path / "a.safetensors", tmp_path / "b.pth"
    assert main(["weights", str(run), "--out", str(out), *chosen]) == 0
    assert main(["weights", str(out), "--out", str(back)]) == 0
    assert equal(read_weights(back), build_tiny(seed).state_dict())


def test_the_card_says_what_the_file_is(run, tmp_path):
    assert main(["weights", str(run), "--out", str(tmp_path / "a.pth")]) == 0
    card = (tmp_path / "a.md").read_text()
    parameters = sum(p.numel() for p in build_tiny().parameters())
    for words in (
        "MambaIRv2Light, x2, RGB",
        f"{parameters:,}",
        "run tiny",
        "kind sr",
        "| Iterations | 8 |",
        "embed_dim: 12",
    ):
        assert words in card


@pytest.mark.parametrize(
    "changes",
    [{}, {"type": "MambaIRv2", "upscale": 1, "upsampler": "", "in_chans": 1, "resi_connection": "3conv"}],
    ids=["light", "base"],
)
def test_onnx_restores_pictures_of_any_size_as_the_network_does(tmp_path, changes, capsys):
    from mambair_ds.conversion.onnx import run

    network = build_tiny(**changes).eval()
    save_network(tmp_path / "n.safetensors", {"params": network.state_dict()})
    out = tmp_path / "n.onnx"
    assert main(["onnx", str(tmp_path / "n.safetensors"), "--out", str(out)]) == 0
    assert "differs by" in capsys.readouterr().out and "in onnxruntime" in (tmp_path / "n.md").read_text()
    for shape in ((1, 9, 7), (2, 16, 16), (1, 33, 50), (1, 1, 1), (3, 3, 64)):
        lq = np.random.default_rng(0).random((shape[0], network.config.in_chans, *shape[1:]), np.float32)
        with torch.inference_mode():
            expected = network(torch.from_numpy(lq)).numpy()
        np.testing.assert_allclose(run(out, lq), expected, rtol=0, atol=1e-4)
    # The export leaves nothing behind in the process.
    assert (
        network.training is False
        and torch.isfinite(open_network(tmp_path / "n.safetensors")(torch.from_numpy(lq))).all()
    )


def published_options(name, train):
    """An option file with the keys of the published ones, from the recorded settings."""
    settings = PUBLISHED[name]
    level = name.rpartition("_")[2]
    task, scale = settings["task"], settings["network_g"]["upscale"]
    lq = {"SR": f"/data/DF2K/LR_bicubic/X{scale}", "CAR": f"/data/LQ/{level[1:]}", "denoising_color": "/data/HQ"}[task]
    data = {
        "task": task,
        "name": "DF2K",
        "type": "PairedImageDataset",
        "dataroot_gt": "/data/HQ",
        "dataroot_lq": lq,
        "filename_tmpl": f"{{}}x{scale}" if task == "SR" else "{}",
        "io_backend": {"type": "disk"},
    } | ({"noise": settings["noise"]} if settings["noise"] else {})
    options = {
        "name": f"MambaIRv2_{name}",
        "model_type": "MambaIRv2Model",
        "scale": scale,
        "num_gpu": 8,
        "manual_seed": settings["manual_seed"],
        "network_g": settings["network_g"],
        "path": {"pretrain_network_g": "/data/start.pth", "strict_load_g": False, "resume_state": None},
    }
    metrics = {"psnr": settings["psnr"], "ssim": settings["psnr"] | {"type": "calculate_ssim"}}
    if not train:
        sets = {f"test_{i}": data | {"name": set_name} for i, set_name in enumerate(("Set5", "Urban100"))}
        val = {"save_img": False, "suffix": None, "selfensemble_testing": False, "metrics": metrics}
        return options | {"datasets": sets, "val": val}
    loader = {"use_shuffle": True, "num_worker_per_gpu": 32, "dataset_enlarge_ratio": 100, "prefetch_mode": None}
    crops = {key: settings[key] for key in ("gt_size", "batch_size_per_gpu")} | {"use_hflip": True, "use_rot": True}
    return options | {
        "datasets": {"train": data | loader | crops, "val": data | {"name": "Set14"}},
        "train": {key: settings[key] for key in ("optim_g", "scheduler", "total_iter", "pixel_opt")}
        | {"warmup_iter": -1},
        "val": {"val_freq": 5e3, "save_img": False, "metrics": metrics},
        "logger": {
            "print_freq": 200,
            "save_checkpoint_freq": 5e3,
            "use_tb_logger": True,
            "wandb": {"project": None, "resume_id": None},
        },
        "dist_params": {"backend": "nccl", "port": 29500},
    }


def converted(tmp_path, options, *arguments):
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump(options))
    out = tmp_path / "ours.yml"
    code = main(["config", str(tmp_path / "theirs.yml"), "--out", str(out), "--overwrite", *arguments])
    return out if code == 0 else None


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_training_options_become_runs(tmp_path, name):
    published = PUBLISHED[name]
    path = converted(tmp_path, published_options(name, train=True))
    config = load_config(path)
    network = config.network.model_dump()
    assert {key: network[key] for key in published["network_g"]} == published["network_g"]
    train, data = config.train, config.data
    assert (data.train.gt_size, data.train.batch_size) == (published["gt_size"], published["batch_size_per_gpu"])
    assert train.optim.model_dump(mode="json") == {"type": "Adam"} | published["optim_g"]
    assert train.scheduler.model_dump(include={"type", "milestones", "gamma"}) == published["scheduler"]
    assert (train.total_iter, train.warmup_iter, config.seed) == (published["total_iter"], 0, published["manual_seed"])
    assert train.pixel_loss.type == published["pixel_opt"]["type"]
    assert (str(train.pretrain.path), train.pretrain.strict) == ("/data/start.pth", False)
    assert (config.log.print_freq, config.checkpoint.every, data.val.every) == (200, 5000, 5000)
    assert (data.val.crop_border, data.val.test_y_channel) == tuple(
        published["psnr"][key] for key in ("crop_border", "test_y_channel")
    )
    kind = {"SR": "sr", "CAR": "jpeg", "denoising_color": "denoise"}[published["task"]]
    assert (config.task.kind, config.task.sigma) == (kind, published["noise"])
    if kind == "jpeg":
        assert config.task.quality == int(name.rpartition("_q")[2])
    assert (data.val.sets["Set14"].lq is None) == (kind == "denoise")
    assert f"--scale {config.network.upscale} --out {data.train.shards[0].path}" in path.read_text()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_test_options_become_evaluations(tmp_path, name):
    published = PUBLISHED[name]
    config = load_evaluation(converted(tmp_path, published_options(name, train=False)))
    assert str(config.weights) == "/data/start.pth"
    assert list(config.data.val.sets) == ["Set5", "Urban100"]
    network = config.network.model_dump()
    assert {key: network[key] for key in published["network_g"]} == published["network_g"]


def test_nothing_is_dropped_silently(tmp_path, capsys):
    options = published_options("SR_x2", train=True)
    options["train"]["gan_opt"] = {"type": "GANLoss", "loss_weight": 0.1}
    options["val"]["pbar"] = False
    options["mystery"] = {"deep": 1}
    path = converted(tmp_path, options)
    said = capsys.readouterr().out
    listed = (
        "train.gan_opt.type: GANLoss: no counterpart",
        "mystery.deep: 1: no counterpart",
        "num_gpu: 8: the launcher",
        "dist_params.port: 29500",
        "datasets.train.dataset_enlarge_ratio: 100",
        "model_type",
        "scale: 2",
    )
    for words in listed:
        assert words in said and words in path.read_text()
    carried = ("total_iter", "milestones", "gt_size", "val_freq", "lr", "resume_id")  # the last has no value
    assert not any(f".{part}:" in said for part in carried)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"network_g": {"type": "MambaIR", "upscale": 2}}, "network.type"),
        ({"network_g": tiny_network(stars=3)}, "network.stars: unknown key"),
        ({"datasets": {"train": {"task": "derain"}}}, "task 'derain'"),
        ({"datasets": None}, "expected network_g and datasets"),
    ],
)
def test_what_has_no_counterpart_at_all_is_refused(tmp_path, capsys, change, words):
    options = published_options("SR_x2", train=True) | change
    if options["datasets"] is None:
        del options["datasets"]
    assert converted(tmp_path, options) is None
    said = capsys.readouterr().err
    assert words in said and said.startswith("convert: ")
    assert not (tmp_path / "ours.yml").exists()


def test_the_jpeg_quality_may_have_to_be_given(tmp_path, capsys):
    options = published_options("CAR_q10", train=True) | {"name": "mine"}
    options["datasets"]["train"]["dataroot_lq"] = "/data/compressed"
    assert converted(tmp_path, options) is None
    assert "give --quality" in capsys.readouterr().err
    assert load_config(converted(tmp_path, options, "--quality", "33")).task.quality == 33


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["weights", "run", "--out", "a.bin"], "ends in .pth or .safetensors"),
        (["weights", "nowhere", "--out", "a.pth"], "nowhere: cannot read it"),
        (["weights", "run/config.yml", "--out", "a.pth"], "broken, or no file of weights"),
        (["weights", "run/models/bare.safetensors", "--out", "a.pth", "--param-key", "params_ema"], "no params_ema"),
        (["weights", "run", "--out", "there.pth"], "there already"),
        (["onnx", "run", "--out", "a.pt"], "ends in .onnx"),
        (["config", "nowhere.yml", "--out", "a.yml"], "cannot read it"),
        (["config", "there.pth", "--out", "a.yml"], "expected network_g and datasets"),
    ],
)
def test_mistakes_get_one_message(run, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    save_network(run / "models/bare.safetensors", {"params": build_tiny().state_dict()})
    Path("there.pth").write_text("mine")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("convert: ") and words in said
    assert Path("there.pth").read_text() == "mine" and not list(tmp_path.glob("a.*"))
