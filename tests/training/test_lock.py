"""Two runs in one folder: the second is refused while the first lives, and goes on soon after the first has died."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Workplace

from mambair_ds.config import UserError
from mambair_ds.training.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from mambair_ds.training.lock import RunLock
RunLock(Path(sys.argv[1]), 60.0, print)
print("held", flush=True)
time.sleep(60)
"""


def take(folder: Path, stale: float = 60.0) -> RunLock:
    return RunLock(folder, stale, lambda reason: None)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder whose lock names a process of another machine, where the kernel's lock is not seen."""
    (tmp_path / ".run.lock").write_text(json.dumps({"host": "n7", "pid": 12, "job": "345", "machine": "other"}))
    return tmp_path / "run"


def test_a_lock_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    first = take(tmp_path / "run")
    with pytest.raises(UserError, match=rf"another run is writing to it: host .*, process {os.getpid()}"):
        take(tmp_path / "run")
    take(tmp_path / "other").release()
    first.release()
    take(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_on_this_machine_blocks_nobody(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        take(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    take(tmp_path / "run").release()
    assert time.monotonic() - began < 1


def test_a_silent_holder_on_another_machine_is_waited_for_and_then_passed_over(elsewhere: Path) -> None:
    began = time.monotonic()
    take(elsewhere, stale=1.0).release()
    assert 0.5 < time.monotonic() - began < 5
    (elsewhere.parent / ".run.lock").write_text('{"machine": "other"}')
    os.utime(elsewhere.parent / ".run.lock", (0, 0))
    began = time.monotonic()
    take(elsewhere).release()
    assert time.monotonic() - began < 1


def test_a_living_holder_on_another_machine_is_recognised_by_its_sign_of_life(elsewhere: Path) -> None:
    touching = subprocess.Popen(["bash", "-c", 'while sleep 0.2; do touch "$0"; done', elsewhere.parent / ".run.lock"])
    try:
        with pytest.raises(UserError, match="host n7, process 12, job 345"):
            take(elsewhere, stale=3.0)
    finally:
        touching.kill()
        touching.wait()


def test_without_file_locks_the_sign_of_life_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    first = take(tmp_path / "run", stale=2.0)
    with pytest.raises(UserError, match="another run"):
        take(tmp_path / "run", stale=2.0)
    first.release()
    take(tmp_path / "run", stale=2.0).release()


def test_a_holder_notices_that_it_was_taken_over(tmp_path: Path) -> None:
    reasons: list[str] = []
    lock = RunLock(tmp_path / "run", 0.6, reasons.append)
    (tmp_path / ".run.lock").write_text('{"token": "another"}')
    deadline = time.monotonic() + 5
    while not reasons and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "taken over" in reasons[0]
    lock.release()
    assert (tmp_path / ".run.lock").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00" * 40])
def test_a_damaged_lock_file_blocks_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / ".run.lock").write_text(content)
    take(tmp_path / "run").release()


def test_the_door_refuses_a_second_run_with_exit_code_2(workplace: Workplace) -> None:
    lock = take(workplace.folder / "experiments/tiny")
    refused = workplace.train()
    assert refused.returncode == 2
    assert f"process {os.getpid()}" in refused.stderr
    assert not (workplace.folder / "experiments/tiny").exists()
    lock.release()
