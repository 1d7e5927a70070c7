"""A run under a hundred faults: ``make storm``, or ``python tests/storm/storm.py --faults 100 --out FILE.md``.

Two ranks train a tiny network. Again and again something happens to them, drawn at random; then the same command
starts again. At the end every loss must be that of a run which nothing happened to, bit for bit. Needs psutil and, for
the full disk, root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from places import losses, make_place

RANKS = 2
STEPS = 18  # that a start does on the average before something happens
DISK = 96  # MiB


class Storm:
    """A run, and what befalls it."""

    def __init__(self, folder: Path, total: int, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        make_place(folder)
        self.experiments = folder / "experiments"
        self.experiments.mkdir()
        self.settings = [f"train.total_iter={total}", "data.train.verify=true", "faults.timeout=8"]
        self.settings += ["checkpoint.retries=1", "checkpoint.retry_wait=0.2", "checkpoint.keep=4"]
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.first_steps: list[float] = []
        self.done: Counter[str] = Counter()

    @property
    def run(self) -> Path:
        return self.experiments / "tiny"

    @property
    def reached(self) -> int:
        """The last iteration that was logged."""
        log = self.run / "log/metrics.jsonl"
        for line in reversed(log.read_bytes().splitlines()) if log.exists() else []:
            try:
                return int(json.loads(line)["iteration"])
            except (ValueError, KeyError):
                continue
        return 0

    def size(self) -> int:
        log = self.run / "log/metrics.jsonl"
        return log.stat().st_size if log.exists() else 0

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, "-m", "mambair_ds.train", "--config", "tiny.yml"]
        command += [word for setting in self.settings for word in ("--set", setting)]
        self.ranks = []
        for rank in range(RANKS):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            with (self.folder / f"rank-{rank}.log").open("wb") as log:
                environment = os.environ | shared | places
                self.ranks.append(
                    subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )

    def said(self) -> str:
        return "\n".join(
            (self.folder / f"rank-{rank}.log").read_text(errors="replace")[-2500:] for rank in range(RANKS)
        )

    def alive(self) -> bool:
        return all(rank.poll() is None for rank in self.ranks)

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it holds before a rank ends and the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.alive() or time.monotonic() > deadline:
                return condition()
            time.sleep(0.01)
        return True

    def end(self, codes: set[int], seconds: float = 60) -> None:
        """All ranks leave with one of the codes, and leave nobody behind."""
        deadline = time.monotonic() + seconds
        for rank in self.ranks:
            try:
                rank.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a rank does not end\n{self.said()}") from None
        found = {rank.returncode for rank in self.ranks}
        assert found <= codes, f"exit codes {found}, expected {codes}\n{self.said()}"
        left = [p.pid for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(self.folder)]
        assert not left, f"processes are left behind: {left}"

    def train_a_little(self) -> bool:
        """Start and let it do some steps; False if it has come to its end."""
        began, before = time.monotonic(), self.size()
        self.start()
        # The first row says that it has started, the next ones are steps.
        assert self.until(lambda: self.size() > before + 150, 120) or not self.alive(), self.said()
        if not self.alive():
            return False
        self.first_steps.append(time.monotonic() - began)
        goal = self.reached + self.random.randint(1, 2 * STEPS)
        return self.until(lambda: self.reached >= goal, 60) and self.alive()

    # ---- faults; each leaves with all ranks ended ----

    def kill_a_rank(self) -> None:
        self.random.choice(self.ranks).kill()
        self.end({-signal.SIGKILL, 1})

    def kill_all(self) -> None:
        for rank in self.ranks:
            rank.kill()
        self.end({-signal.SIGKILL})

    def stop_a_rank(self) -> None:
        stopped = self.random.choice(self.ranks)
        stopped.send_signal(signal.SIGSTOP)
        (other,) = (rank for rank in self.ranks if rank is not stopped)
        try:
            assert other.wait(60) == 1, self.said()
        finally:
            stopped.kill()
        self.end({-signal.SIGKILL, 1})

    def kill_during_a_save(self) -> None:
        folder = self.run / "checkpoints"
        self.until(lambda: any(folder.glob("*.partial")), 30)
        self.random.choice([self.kill_a_rank, self.kill_all])()

    def terminate(self) -> None:
        self.random.choice(self.ranks).send_signal(self.random.choice([signal.SIGTERM, signal.SIGUSR1]))
        self.end({75})

    def truncate_a_checkpoint(self) -> None:
        self.kill_all()
        file = self.newest_file()
        if file:
            os.truncate(file, self.random.randrange(file.stat().st_size))

    def flip_a_bit_of_a_checkpoint(self) -> None:
        self.kill_all()
        file = self.newest_file()
        if file:
            flip(file, self.random)

    def newest_file(self) -> Path | None:
        """A random file of the newest checkpoint, unless it is the only one."""
        whole = sorted(path for path in (self.run / "checkpoints").glob("*") if path.name.isdigit())
        return self.random.choice(sorted(whole[-1].iterdir())) if len(whole) > 1 else None

    def fill_the_disk(self) -> None:
        filler = self.experiments / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            except OSError:
                pass
        try:
            self.end({1}, 90)
        finally:
            filler.unlink()

    def damage_a_shard(self) -> None:
        """Found at the next start, which is refused; repaired for the one after."""
        self.kill_all()
        (tar,) = (self.folder / "shards").glob("*.tar")
        whole = tar.read_bytes()
        if self.random.random() < 0.5:
            flip(tar, self.random)
        else:
            os.truncate(tar, self.random.randrange(tar.stat().st_size))
        self.start()
        self.end({2, 1, -signal.SIGKILL})
        assert any(rank.returncode == 2 for rank in self.ranks), self.said()
        tar.write_bytes(whole)


def flip(file: Path, dice: random.Random) -> None:
    with file.open("r+b") as stream:
        place = dice.randrange(file.stat().st_size)
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << dice.randrange(8)]))


FAULTS: list[tuple[Callable[[Storm], None], int]] = [
    (Storm.kill_a_rank, 3),
    (Storm.kill_all, 2),
    (Storm.kill_during_a_save, 3),
    (Storm.stop_a_rank, 1),
    (Storm.terminate, 3),
    (Storm.truncate_a_checkpoint, 2),
    (Storm.flip_a_bit_of_a_checkpoint, 2),
    (Storm.fill_the_disk, 1),
    (Storm.damage_a_shard, 1),
]


def main() -> None:
    """Rage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown report")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="storm-"))
    total, began = (STEPS + 4) * args.faults + 30, time.monotonic()
    faults = [fault for fault, weight in FAULTS for _ in range(weight)]
    calm, storm = Storm(work / "calm", total, args.seed), Storm(work / "storm", total, args.seed)
    tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(storm.experiments)]
    if os.geteuid() != 0 or subprocess.run(tmpfs, capture_output=True).returncode:
        print("no full disk: needs root for a small file system")
        faults.remove(Storm.fill_the_disk)
    try:
        calm.start()
        calm.end({0}, 3600)
        expected = losses(calm.run)
        assert set(expected) == set(range(1, total + 1)), "the calm run has lost rows"
        print(f"{time.monotonic() - began:6.0f} s  calm run: {total} iterations", flush=True)
        number = 0
        while number < args.faults:
            if not storm.train_a_little():
                assert all(rank.wait(60) == 0 for rank in storm.ranks), storm.said()
                break  # it came to its end before the faults did
            fault = storm.random.choice(faults)
            name = fault.__name__.replace("_", " ")
            print(
                f"{time.monotonic() - began:6.0f} s  {number + 1:3d}  iteration {storm.reached:5d}  {name}", flush=True
            )
            fault(storm)
            storm.done[name] += 1
            number += 1
        storm.start()
        storm.end({0}, 3600)
        assert losses(storm.run) == expected, "the losses differ from those of the run that nothing happened to"
        assert number == args.faults or number > 0.9 * args.faults, f"only {number} faults before the end"
        stalls = [
            row["time/save"]
            for line in (storm.run / "log/metrics.jsonl").read_text(errors="replace").splitlines()
            if "time/save" in line and "time/save" in (row := json.loads(line))
        ]
        report = describe(storm, total, time.monotonic() - began, stalls)
        print(report)
        if args.out:
            args.out.write_text(report)
    finally:
        for one in (calm, storm):
            for rank in one.ranks:
                if rank.poll() is None:
                    rank.kill()
        subprocess.run(["umount", str(storm.experiments)], capture_output=True)
    shutil.rmtree(work, ignore_errors=True)


def describe(storm: Storm, total: int, seconds: float, stalls: list[float]) -> str:
    """The report."""
    rows = "".join(f"| {name} | {count} | {count} |\n" for name, count in sorted(storm.done.items()))
    every = sum(storm.done.values())
    first = storm.first_steps
    command = f"python {' '.join(map(str, sys.argv))}"
    cores = psutil.cpu_count(False) or psutil.cpu_count()
    return (
        f"# A storm of {every} faults\n\n"
        f"{RANKS} ranks on {cores} CPU cores ({platform.machine()}), gloo, a tiny network, {total:,} iterations, "
        f"{seconds / 60:.0f} minutes.\n\n`{command}`\n\n"
        "Every loss of the run equals, bit for bit, that of a run which nothing happened to, so every iteration saw\n"
        "the samples that it sees there: none lost, none twice. No process was left behind.\n\n"
        f"| fault | times | survived |\n| --- | --- | --- |\n{rows}| all | {every} | {every} |\n\n"
        f"From the restart to the first new step: median {statistics.median(first):.1f} s, "
        f"at most {max(first):.1f} s,\nmost of it imports. A save stalls training for the copy to host memory: median "
        f"{1000 * statistics.median(stalls):.1f} ms,\nat most {1000 * max(stalls):.1f} ms.\n"
    )


if __name__ == "__main__":
    main()
