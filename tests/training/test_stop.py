"""A signal or the time budget ends a run with its state saved and a code of its own; the next start goes on exactly."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import MakeWorkplace, Workplace

from mambair_ds.training.stop import INTERRUPTED, Stop, parse_duration

DEEPSPEED = [sys.executable, str(Path(__file__).parents[2] / "docker/deepspeed"), "--num_gpus", "2"]
LONG = ["train.total_iter=100000", "data.train.batch_size=2", "checkpoint.every=100000"]


def start(place: Workplace, command: list[str]) -> subprocess.Popen[str]:
    """Start a run and wait for its first iterations."""
    run = subprocess.Popen(
        command, cwd=place.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    scalars = place.folder / "experiments/tiny/log/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (scalars.exists() and scalars.read_text().count("\n") > 1) and time.monotonic() < deadline:
        assert run.poll() is None, run.stdout and run.stdout.read()
        time.sleep(0.05)
    return run


def ranks(run: subprocess.Popen[str]) -> list[psutil.Process]:
    processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    return [process for process in processes if "RANK" in process.environ() and not process.children()]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("01:00:05", 3605), ("1-2", 93600), ("1-02:03", 93780), ("2-00:00:01", 172801)],
)
def test_time_budgets_are_slurms(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "x", "1:2:3:4", "-5", "1.5", "1-", "1:2:", "10h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="Slurm"):
        parse_duration(text)


def test_a_budget_is_used_up_when_the_next_step_and_a_save_no_longer_fit() -> None:
    stop = Stop(time.monotonic(), 100.0)
    stop.hold(None)
    assert stop.reason(seconds_needed=50.0) is None
    assert "time budget" in (stop.reason(seconds_needed=101.0) or "")


@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGTERM, "one rank"), (signal.SIGUSR1, "deepspeed")])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_exactly(
    make_workplace: MakeWorkplace, number: signal.Signals, launcher: str
) -> None:
    whole, broken = make_workplace("whole"), make_workplace("broken")
    command = broken.command(*LONG)
    if launcher == "deepspeed":
        command = [*DEEPSPEED, *command[1:]]
    run = start(broken, command)
    run.send_signal(number)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED == 75, said
    assert f"received {number.name}" in said
    (checkpoint,) = (broken.folder / "experiments/tiny/checkpoints").iterdir()
    done = int(checkpoint.name)
    assert list(broken.scalars()) == list(range(1, done + 1))

    settings = [f"train.total_iter={done + 2}", "data.train.batch_size=2"]
    count = 2 if launcher == "deepspeed" else 1
    resumed = broken.train(*settings, ranks=count)
    assert resumed.returncode == 0, resumed.stderr
    assert whole.train(*settings, ranks=count).returncode == 0
    assert broken.scalars() == whole.scalars()


def test_a_signal_to_any_rank_stops_all_together(workplace: Workplace) -> None:
    run = start(workplace, workplace.command(*LONG, ranks=2))
    started = ranks(run)
    assert len(started) == 2
    started[1].send_signal(signal.SIGUSR1)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 1  # torchrun's answer to any code
    assert "exitcode  : 75" in said
    assert "received SIGUSR1" in said
    assert len(list((workplace.folder / "experiments/tiny/checkpoints").glob("*/manifest.json"))) == 1
    assert not any(process.is_running() for process in started)


def test_the_time_budget_ends_a_run_early_enough_to_save(workplace: Workplace) -> None:
    began = time.monotonic()
    done = workplace.train(*LONG, arguments=["--time-budget", "0:25"])
    assert done.returncode == INTERRUPTED, done.stderr
    assert time.monotonic() - began < 25
    assert "the time budget of 25 s is nearly used up" in done.stdout
    assert len(list((workplace.folder / "experiments/tiny/checkpoints").glob("*/manifest.json"))) == 1


def test_a_validation_that_a_signal_displaced_comes_first_after_the_restart(
    workplace: Workplace, pictures: Path
) -> None:
    settings = [*LONG, "data.val.every=1", f"data.val.sets.photos.gt={pictures}"]
    run = start(workplace, workplace.command(*settings))
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    (checkpoint,) = (workplace.folder / "experiments/tiny/checkpoints").iterdir()
    done = int(checkpoint.name)
    assert list(workplace.scalars("metrics/photos/psnr")) == list(range(1, done))
    assert workplace.train(f"train.total_iter={done + 1}", *settings[1:]).returncode == 0
    assert list(workplace.scalars("metrics/photos/psnr")) == list(range(1, done + 2))


def test_a_signal_before_the_first_step_ends_the_process_at_once(workplace: Workplace) -> None:
    run = subprocess.Popen(
        workplace.command(*LONG), cwd=workplace.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert run.stdout
    run.stdout.readline()  # "started by python": imports are done, nothing is built yet
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == INTERRUPTED
    assert "received SIGTERM: nothing to save yet" in said
