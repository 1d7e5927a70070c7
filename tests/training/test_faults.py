"""What a run bears: gradients that are not finite, pictures that cannot be read, ranks that die or hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import Workplace

from mambair_ds.data.shards import Shards

SKIP = """
import os, sys, torch, torch.distributed as dist
from mambair_ds.config import TrainConfig
from mambair_ds.training import launch
launch.detect()
from mambair_ds.training import fragments
from mambair_ds.training.engine import Engine, start_process_group

train = TrainConfig.model_validate({
    "total_iter": 9, "optim": {"lr": 0.1}, "scheduler": {"type": "MultiStepLR", "milestones": [9]},
    "pixel_loss": {"type": "L1Loss"}, "zero_stage": int(sys.argv[1]), "accumulation": 2, "grad_clip": 1.0,
    "ema_decay": 0.5,
})
start_process_group(torch.device("cpu"), 60)
torch.manual_seed(0)
engine = Engine(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)), train, 2, sys.argv[2])

def state():
    tensors = [*fragments.whole(engine, "params").values()]
    tensors += [value for one in engine.optimizer.state.values() for value in one.values()]
    return [tensor.clone() for tensor in tensors]

def step(poison):
    for micro in range(2):
        loss = engine(torch.ones(2, 4)).float().square().mean()
        if poison and micro == 0 and dist.get_rank() == dist.get_world_size() - 1:
            loss = loss * float("nan")
        engine.step(loss, 0.1, False)
    return float(engine.skipped)

assert step(False) == 0.0
before = state()
assert step(True) == 1.0, "a gradient that is not finite was taken"
assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)), "a skipped step changed something"
assert step(False) == 0.0
after = state()
assert not torch.equal(before[0], after[0]) and all(tensor.isfinite().all() for tensor in after)
dist.barrier()
os._exit(0)  # gloo's threads, met by the interpreter's end, abort the process now and then
"""


QUIET = """
import torch
from mambair_ds.config import TrainConfig
from mambair_ds.training import launch
launch.detect()
from mambair_ds.training.engine import Engine, start_process_group

train = TrainConfig.model_validate({
    "total_iter": 9, "optim": {"lr": 0.1}, "scheduler": {"type": "MultiStepLR", "milestones": [9]},
    "pixel_loss": {"type": "L1Loss"}, "ema_decay": 0.5,
})
device = torch.device("cuda", 0)
start_process_group(device, 60)
engine = Engine(torch.nn.Linear(4, 1).to(device), train, 2, "bf16")
x = torch.ones(2, 4, device=device)

def step():
    engine.step(engine(x).float().square().mean(), 0.1, False)

step(), step()
torch.cuda.set_sync_debug_mode("error")
step()
torch.cuda.set_sync_debug_mode("default")
"""


@pytest.mark.gpu
def test_a_step_that_does_not_log_waits_for_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "quiet.py").write_text(QUIET)
    done = subprocess.run([sys.executable, "quiet.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "pure_bf16"), (2, "fp32"), (3, "bf16")])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    tmp_path: Path, stage: int, precision: str
) -> None:
    (tmp_path / "skip.py").write_text(SKIP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "skip.py"]
    done = subprocess.run(
        [*command, str(stage), precision], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_run_that_stays_not_finite_ends_and_names_its_samples(workplace: Workplace) -> None:
    settings = ("train.optim.lr=1e30", "faults.max_skipped=2", "train.total_iter=50", "checkpoint.every=1")
    done = workplace.train(*settings, ranks=2)
    assert done.returncode == 1
    assert "3 steps in a row have had a gradient that is not finite" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    (named,) = (workplace.folder / "experiments/tiny/log").glob("not_finite_*.json")
    samples = json.loads(named.read_text())
    assert set(samples) == {"rank 0", "rank 1"}
    assert all("cat" in "".join(map(str, names)) or len(names) == 4 for names in samples.values())
    rows = (workplace.folder / "experiments/tiny/log/metrics.jsonl").read_text()
    assert rows.count('"event": "skipped"') == 3


@pytest.fixture
def broken_shards(pictures: Path, tmp_path: Path) -> Path:
    """PNG shards in which one picture cannot be decoded."""
    from mambair_ds.prepare import main

    folder = tmp_path / "broken"
    assert main(["--gt", str(pictures), "--scale", "2", "--format", "png", "--out", str(folder)]) == 0
    shards = Shards.open(folder)
    row = next(shards._row(i, "gt") for i in range(len(shards)) if shards.key(i) == "cat")
    tar = folder / shards.manifest["shards"][0]["file"]
    with tar.open("r+b") as file:
        file.seek(int(row["offset"]) + int(row["size"]) // 3)
        file.write(bytes(int(row["size"]) // 3))
    return folder


def test_a_damaged_picture_is_named_and_its_neighbour_taken_also_after_a_restart(
    workplace: Workplace, broken_shards: Path
) -> None:
    settings = (f"data.train.shards=[{broken_shards}]", "checkpoint.every=3")
    whole = workplace.train(*settings, "name=whole")
    assert whole.returncode == 0, whole.stderr
    assert "sample cat: its gt cannot be decoded; its neighbour is taken instead" in whole.stdout
    assert workplace.train(*settings, "train.total_iter=3").returncode == 0
    assert workplace.train(*settings).returncode == 0
    assert workplace.scalars() == workplace.scalars(name="whole")


def test_too_many_damaged_pictures_and_changed_shards_stop_the_run(workplace: Workplace, broken_shards: Path) -> None:
    settings = (f"data.train.shards=[{broken_shards}]",)
    done = workplace.train(*settings, "faults.max_damaged=0")
    assert done.returncode == 2
    assert "sample cat: its gt cannot be decoded" in done.stderr and "Traceback" not in done.stderr
    done = workplace.train(*settings, "data.train.verify=true", "name=other")
    assert done.returncode == 2
    assert "does not match its checksum" in done.stderr
    assert not (workplace.folder / "experiments/other").exists()


@pytest.mark.parametrize(
    ("blow", "said"), [(signal.SIGKILL, "rank 1 gives no sign"), (signal.SIGSTOP, "rank 1 gives no sign")]
)
def test_a_rank_that_dies_or_stops_is_named_and_nobody_stays(workplace: Workplace, blow: int, said: str) -> None:
    command = workplace.command("train.total_iter=100000", "faults.timeout=6", "data.train.batch_size=2", ranks=2)
    run = subprocess.Popen(
        command, cwd=workplace.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics = workplace.folder / "experiments/tiny/log/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert run.poll() is None and time.monotonic() < deadline, run.stdout and run.stdout.read()
        time.sleep(0.05)
    ranks = {
        int(p.environ()["RANK"]): p for p in psutil.Process(run.pid).children(recursive=True) if "RANK" in p.environ()
    }
    ranks[1].send_signal(blow)
    output, _ = run.communicate(timeout=90)
    assert run.returncode not in (0, 2, 75)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks.values())
    if blow == signal.SIGSTOP:  # of a dead one the launcher may tell first, and end the others
        assert said in output and "start the same command again" in output


def test_ranks_do_not_wait_for_a_stopped_rank_that_keeps_the_store(workplace: Workplace) -> None:
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29873", "OMP_NUM_THREADS": "1"}
        command = workplace.command("train.total_iter=100000", "faults.timeout=5", "data.train.batch_size=2")
        log = (workplace.folder / f"{rank}.log").open("wb")
        ranks.append(
            subprocess.Popen(
                command, cwd=workplace.folder, env=os.environ | place, stdout=log, stderr=subprocess.STDOUT
            )
        )
    metrics, deadline = workplace.folder / "experiments/tiny/log/metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline, (workplace.folder / "0.log").read_text()
        time.sleep(0.05)
    ranks[0].send_signal(signal.SIGSTOP)
    try:
        assert ranks[1].wait(40) == 1
    finally:
        ranks[0].kill()
    assert "rank 0, or the launcher" in (workplace.folder / "1.log").read_text()
