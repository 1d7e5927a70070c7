"""Whole runs: losses do not depend on the layout, a killed run goes on exactly, and what is left on disk is usable."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import MakeWorkplace, Workplace

from mambair_ds.prepare import main as prepare

VALIDATED = ["data.val.every=3", "data.val.save_img=true"]


def weights(place: Workplace, iteration: int, name: str = "tiny") -> dict[str, dict[str, torch.Tensor]]:
    path = place.folder / "experiments" / name / "models" / f"net_g_{iteration}.pth"
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def test_a_run_leaves_checkpoints_weights_logs_and_pictures(workplace: Workplace, pictures: Path) -> None:
    done = workplace.train(
        *VALIDATED, f"data.val.sets.photos.gt={pictures}", "train.ema_decay=0.9", "log.tensorboard=true"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = workplace.folder / "experiments/tiny"
    assert (run / "checkpoints/0000006/manifest.json").is_file()
    assert set(weights(workplace, 6)) == {"params", "params_ema"}
    assert (run / "visualization/cat/cat_3.png").is_file()
    assert list((run / "log/tensorboard").glob("events*"))
    assert "metrics/photos/psnr" in (run / "report/index.html").read_text()
    assert (run / "report/pictures/photos/cat/network_0000006.png").is_file()
    assert json.loads((run / "environment.json").read_text())["launcher"] == "python"
    assert workplace.scalars("metrics/photos/psnr").keys() == {3, 6}
    assert "started by python" in done.stdout
    assert "Validation photos, iter 6: psnr:" in done.stdout
    assert "End of training. Time consumed" in done.stdout


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_and_one_give_the_same_losses(make_workplace: MakeWorkplace, stage: int) -> None:
    one, two = make_workplace("one"), make_workplace("two")
    settings = ["train.total_iter=4", "train.grad_clip=0.5"]
    done = one.train(*settings)
    assert done.returncode == 0, done.stderr
    done = two.train(*settings, "data.train.batch_size=2", f"train.zero_stage={stage}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert two.scalars() == pytest.approx(one.scalars(), rel=1e-6)


def test_zero_3_gathers_parameters_that_operators_take_from_other_modules(make_workplace: MakeWorkplace) -> None:
    """DeepSpeed leaves parameters as small as these whole; here it must split them all."""
    one, two = make_workplace("one"), make_workplace("two")
    (two.folder / "train.py").write_text("""
import sys
from mambair_ds.training import engine
make_config = engine.deepspeed_config
def deepspeed_config(*arguments):
    config = make_config(*arguments)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config
engine.deepspeed_config = deepspeed_config
from mambair_ds.train import main
sys.exit(main())
""")
    two.door = ("train.py",)
    settings = ["train.total_iter=4", "train.grad_clip=0.5", "network.use_checkpoint=true"]
    done = one.train(*settings)
    assert done.returncode == 0, done.stderr
    done = two.train(*settings, "data.train.batch_size=2", "train.zero_stage=3", ranks=2)
    assert done.returncode == 0, done.stderr
    assert two.scalars() == pytest.approx(one.scalars(), rel=1e-6)


@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_a_killed_run_goes_on_bit_for_bit(make_workplace: MakeWorkplace, stage: int) -> None:
    settings = [
        "train.total_iter=8",
        "checkpoint.every=3",
        "train.accumulation=2",
        "train.ema_decay=0.9",
        "train.gumbel=published",
        f"train.zero_stage={stage}",
    ]
    whole, broken = make_workplace("whole"), make_workplace("broken")
    assert whole.train(*settings, ranks=2).returncode == 0

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        broken.command(*settings, ranks=2), cwd=broken.folder, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoint = broken.folder / "experiments/tiny/checkpoints/0000003"
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert checkpoint.exists()

    resumed = broken.train(*settings, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed from" in resumed.stdout
    assert broken.scalars() == whole.scalars()
    for name, tensors in weights(whole, 8).items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, weights(broken, 8)[name][key]), (name, key)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "bf16"), pytest.param(2, "pure_bf16", marks=pytest.mark.slow), (3, "pure_bf16")],
)
def test_reduced_precision_trains_and_stays_near_float32(
    make_workplace: MakeWorkplace, stage: int, precision: str
) -> None:
    exact, reduced = make_workplace("exact"), make_workplace("reduced")
    assert exact.train().returncode == 0
    done = reduced.train(f"train.precision={precision}", f"train.zero_stage={stage}")
    assert done.returncode == 0, done.stderr
    assert reduced.scalars() == pytest.approx(exact.scalars(), rel=0.1)


WITHOUT_INDUCTOR = """
import sys
from torch import nn
compile = nn.Module.compile
nn.Module.compile = lambda module, **settings: compile(module, backend="aot_eager", dynamic=settings.get("dynamic"))
from mambair_ds.train import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("stage", "inductor"), [(0, False), *(pytest.param(stage, True, marks=pytest.mark.slow) for stage in range(4))]
)
def test_a_compiled_run_has_the_losses_of_an_eager_one(
    make_workplace: MakeWorkplace, pictures: Path, stage: int, inductor: bool
) -> None:
    eager, compiled = make_workplace("eager"), make_workplace("compiled")
    settings = [f"train.zero_stage={stage}", "train.total_iter=3", "network.depths=[1]", "network.num_heads=[2]"]
    settings.append(f"data.val.sets.photos.gt={pictures}")
    assert eager.train(*settings).returncode == 0
    if not inductor:  # which takes a C++ compiler, and minutes
        (compiled.folder / "train.py").write_text(WITHOUT_INDUCTOR)
        compiled.door = ("train.py",)
    done = compiled.train(*settings, "train.compile=true", timeout=600)
    assert done.returncode == 0, done.stderr
    for key, bound in (("losses/l_pix", 1e-5), ("metrics/photos/psnr", 1e-3)):
        assert compiled.scalars(key) == pytest.approx(eager.scalars(key), abs=bound)


@pytest.mark.gpu
def test_a_run_of_cuda_graphs_has_the_losses_of_an_eager_one(make_workplace: MakeWorkplace) -> None:
    eager, graphs = make_workplace("eager"), make_workplace("graphs")
    assert eager.train("train.precision=fp32").returncode == 0
    done = graphs.train("train.precision=fp32", "train.compile=true", "train.cuda_graphs=true", timeout=300)
    assert done.returncode == 0, done.stderr
    assert graphs.scalars() == pytest.approx(eager.scalars(), abs=1e-4)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_reducing_gradients_beside_the_backward_pass_changes_no_loss(make_workplace: MakeWorkplace, stage: int) -> None:
    after, beside = make_workplace("after"), make_workplace("beside")
    settings = [f"train.zero_stage={stage}", "data.train.batch_size=2", "train.total_iter=4"]
    for place, overlap in ((after, "false"), (beside, "true")):
        done = place.train(*settings, f"train.overlap_comm={overlap}", ranks=2)
        assert done.returncode == 0, done.stderr
    assert beside.scalars() == after.scalars()


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        ("rgb", ["task.kind=denoise", "task.sigma=25"]),
        ("gray", ["task.kind=jpeg", "task.quality=10", "network.in_chans=1"]),
    ],
)
def test_restoration_tasks_train_and_validate_from_gt_alone(
    workplace: Workplace, pictures: Path, channels: str, settings: list[str]
) -> None:
    shards = workplace.folder / "gt_only"
    packed = ["--gt", str(pictures), "--scale", "1", "--channels", channels, "--out", str(shards)]
    assert prepare(packed) == 0
    done = workplace.train(
        *settings,
        f"data.train.shards=[{shards}]",
        f"data.val.sets={{folder: {{gt: {pictures}}}, packed: {{shards: {shards}}}}}",
        "network.type=MambaIRv2",
        "network.upscale=1",
        "network.upsampler=''",
        "network.use_checkpoint=true",
        "train.zero_stage=3",
        "train.pixel_loss.type=CharbonnierLoss",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The same pictures from a folder and from shards, degraded alike: by then the network does little to them.
    folder, packed_psnr = (workplace.scalars(f"metrics/{name}/psnr")[6] for name in ("folder", "packed"))
    assert folder == pytest.approx(packed_psnr, abs=1e-9)
    assert folder > 15


def test_settings_of_another_run_are_refused_with_the_differing_keys(workplace: Workplace) -> None:
    assert workplace.train("train.total_iter=1").returncode == 0
    refused = workplace.train("train.optim.lr=2e-3", "network.num_tokens=16", "log.print_freq=2")
    assert refused.returncode == 2
    assert "train.optim.lr: saved 0.001, now 0.002" in refused.stderr
    assert "network.num_tokens: saved 8, now 16" in refused.stderr
    assert "print_freq" not in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(workplace: Workplace) -> None:
    assert workplace.train("train.total_iter=4", "checkpoint.every=2").returncode == 0
    folder = workplace.folder / "experiments/tiny/checkpoints"
    with (folder / "0000004/rank_00000.pt").open("r+b") as file:
        file.write(b"damaged")
    resumed = workplace.train("train.total_iter=4", "checkpoint.every=2")
    assert resumed.returncode == 0, resumed.stderr
    assert "rank_00000.pt does not match its SHA-256; trying the one before" in resumed.stdout
    assert "0000002, iteration 2" in resumed.stdout


def test_fresh_keeps_the_old_run_under_a_time_stamp(workplace: Workplace) -> None:
    assert workplace.train("train.total_iter=1").returncode == 0
    assert workplace.train("train.total_iter=1", arguments=["--fresh"]).returncode == 0
    runs = sorted(path.name for path in (workplace.folder / "experiments").iterdir())
    assert runs[0] == "tiny"
    assert runs[1].startswith("tiny_archived_")


def test_resume_names_a_checkpoint(workplace: Workplace) -> None:
    settings = ["train.total_iter=3", "checkpoint.every=1"]
    assert workplace.train(*settings).returncode == 0
    done = workplace.train(*settings, arguments=["--resume", "experiments/tiny/checkpoints/0000002"])
    assert "0000002, iteration 2" in done.stdout
    missing = workplace.train(*settings, arguments=["--resume", "nowhere"])
    assert missing.returncode == 2
    assert "nowhere: no such checkpoint folder" in missing.stderr


def test_a_network_starts_from_exported_weights(make_workplace: MakeWorkplace) -> None:
    first, second = make_workplace("first"), make_workplace("second")
    assert first.train("train.total_iter=2").returncode == 0
    path = first.folder / "experiments/tiny/models/net_g_2.pth"
    done = second.train(f"train.pretrain.path={path}", "train.total_iter=1", "train.optim.lr=1e-30")
    assert done.returncode == 0, done.stderr
    expected = weights(first, 2)["params"]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(second, 1)["params"].items())
    other = second.train(f"train.pretrain.path={path}", "network.embed_dim=16", arguments=["--fresh"])
    assert other.returncode == 2
    assert str(path) in other.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.train.gt_size=70"], "gt_size is 70"),
        (["network.in_chans=1"], "network.in_chans"),
        (["network.upscale=4", "data.train.gt_size=32"], "network.upscale"),
        (["data.val.sets.none.gt=."], "no pictures"),
        (["data.train.shards=[.]"], "manifest.json"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_a_process_group(
    workplace: Workplace, overrides: list[str], said: str
) -> None:
    done = workplace.train(*overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert not (workplace.folder / "experiments").exists()


def test_a_failed_save_stops_the_run_and_keeps_the_checkpoint_before(workplace: Workplace) -> None:
    settings = ["train.total_iter=4", "checkpoint.every=2", "checkpoint.retries=1", "checkpoint.retry_wait=0.1"]
    assert workplace.train("train.total_iter=2", "checkpoint.every=2").returncode == 0
    folder = workplace.folder / "experiments/tiny/checkpoints"
    # A file-size limit stands in for a full disk: the write fails in the same place, with the same kind of error.
    limited = ["bash", "-c", 'ulimit -f 20 && exec "$@"', "-", *workplace.command(*settings)]
    failed = subprocess.run(limited, cwd=workplace.folder, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1, failed.stderr
    assert "could not save checkpoint" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [path.name for path in folder.iterdir()] == ["0000002"]
    assert workplace.train(*settings).returncode == 0
    assert workplace.scalars().keys() == {1, 2, 3, 4}


@pytest.mark.slow
def test_wandb_offline_continues_its_run(workplace: Workplace) -> None:
    settings = ["log.wandb.project=test", "log.wandb.mode=offline", "checkpoint.every=2"]
    assert workplace.train("train.total_iter=2", *settings).returncode == 0
    done = workplace.train("train.total_iter=4", *settings)
    assert done.returncode == 0, done.stderr
    runs = [
        path.name.rsplit("-", 1)[1] for path in (workplace.folder / "experiments/tiny/log/wandb").glob("offline-run-*")
    ]
    assert len(runs) == 2
    assert len(set(runs)) == 1


def test_a_billion_parameters_start_at_reduced_depth(workplace: Workplace) -> None:
    config = Path(__file__).parents[2] / "configs/x2_giant.yml"
    shards = workplace.config.read_text().split("shards: [")[1].split("]")[0]
    workplace.config = config
    small = ["network.depths=[1]", "network.num_heads=[33]", "data.train.gt_size=32", "data.train.batch_size=1"]
    small += [
        f"data.train.shards=[{shards}]",
        "data.val.sets={}",
        "train.total_iter=2",
        "log.print_freq=1",
        "name=tiny",
    ]
    done = workplace.train(*small, ranks=2)
    assert done.returncode == 0, done.stderr
    assert workplace.scalars().keys() == {1, 2}
