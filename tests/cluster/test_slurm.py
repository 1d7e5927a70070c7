"""The shipped recipe on a real Slurm of four nodes: whatever befalls them, the run ends as if nothing had happened."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import four_nodes
import psutil
import pytest
from four_nodes import NODES, Cluster, wait_for
from places import losses, make_place

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(four_nodes.missing()), reason=f"Slurm: {four_nodes.missing()}"),
]

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 240.0
"""Seconds until a start has trained; most of it imports, on as few cores as there are."""
TOTAL = 150


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


class Place:
    """A checkout with data to train on, from where jobs are submitted."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        make_place(folder)
        (folder / "slurm").symlink_to(REPOSITORY / "slurm")

    @property
    def run(self) -> Path:
        return self.folder / "experiments/tiny"

    def submit(self, *arguments: str, nodes: int = 4, recipe: str = "x2_4node.sh", **variables: str) -> int:
        """Submit a shipped recipe, one CPU rank a node."""
        size = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30"]
        environment = {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"} | variables
        settings = ["--config", "tiny.yml", "--set", f"train.total_iter={TOTAL}", *arguments]
        return self.cluster.submit(*size, f"slurm/{recipe}", *settings, cwd=self.folder, env=environment)

    def said(self) -> str:
        """All that batch shells and ranks have said, for messages."""
        files = sorted([*self.folder.glob("slurm-*.out"), *self.folder.glob("slurm-*/*")])
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def reach(self, iteration: int) -> None:
        """Wait until the run has done an iteration."""
        wait_for(lambda: max(losses(self.run), default=0) >= iteration, PATIENCE, self.said)

    def state(self, job: int) -> str:
        return self.cluster.job(job)["JobState"]

    def restarted(self, job: int, times: int) -> None:
        """Wait until Slurm has started a job so many times again."""
        wait_for(
            lambda: (info := self.cluster.job(job))["Restarts"] == str(times) and info["JobState"] == "RUNNING",
            90,
            lambda: f"{self.cluster.job(job)} {self.cluster.sinfo()}\n{self.said()}",
        )

    def ends(self, job: int) -> str:
        """Wait for a job's end; its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_for(lambda: self.state(job) in over, PATIENCE, self.said)
        return self.state(job)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("undisturbed"), cluster)
    job = place.submit("--set", "checkpoint.keep=100")
    assert place.ends(job) == "COMPLETED", place.said()
    assert losses(place.run).keys() == set(range(1, TOTAL + 1))
    return place


def test_it_trains_on_four_hosts_and_every_rank_has_its_log(undisturbed: Place) -> None:
    logs = sorted(undisturbed.folder.glob("slurm-*/rank-*.log"))
    assert [path.name for path in logs] == [f"rank-{i}.log" for i in range(4)]
    assert "rank 0 of 4, started by srun" in logs[0].read_text()


def test_preemption_a_killed_rank_a_power_cut_and_a_cut_cable_change_no_loss(
    cluster: Cluster, undisturbed: Place, tmp_path: Path
) -> None:
    place = Place(tmp_path / "place", cluster)
    job = place.submit()

    place.reach(25)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    place.restarted(job, 1)
    saved = max(losses(place.run))
    assert "Left with code 75: queued again." in place.said()

    place.reach(saved + 15)
    os.kill(_rank_on("n4"), signal.SIGKILL)
    place.restarted(job, 2)

    place.reach(max(losses(place.run)) + 15)
    cluster.power_off("n1")  # rank 0 and the batch shell were there
    cluster.lose("n1")
    wait_for(lambda: place.state(job) == "PENDING", 30, place.said)
    cluster.power_on("n1")
    place.restarted(job, 3)

    place.reach(max(losses(place.run)) + 15)
    cluster.cable("n3", plugged=False)
    wait_for(lambda: place.state(job) == "PENDING", 60, place.said)
    cluster.cable("n3", plugged=True)
    place.restarted(job, 4)

    assert place.ends(job) == "COMPLETED", place.said()
    assert losses(place.run) == losses(undisturbed.run)
    wait_for(lambda: not any(_ranks_on(node) for node in NODES), 20, lambda: "ranks are left behind")


def test_a_run_of_four_nodes_goes_on_with_two(cluster: Cluster, undisturbed: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "place", cluster)
    half = TOTAL // 20 * 10
    for checkpoint in (undisturbed.run / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) <= half:
            shutil.copytree(checkpoint, place.run / "checkpoints" / checkpoint.name)
    job = place.submit("--set", "data.train.batch_size=2", nodes=2, recipe="nodes.sh")
    assert place.ends(job) == "COMPLETED", place.said()
    went_on = losses(place.run)
    assert went_on.keys() == set(range(half + 1, TOTAL + 1))
    expected = losses(undisturbed.run)
    # Two ranks add gradients in another order than four; how far 80 steps carry that depends on the processor.
    assert went_on == pytest.approx({i: expected[i] for i in went_on}, rel=1e-3)
    assert [went_on[i] for i in range(half + 1, half + 21)] == pytest.approx(
        [expected[i] for i in range(half + 1, half + 21)], abs=1e-5
    )


def test_a_mistake_is_found_before_ranks_start_and_not_repeated(cluster: Cluster, tmp_path: Path) -> None:
    place = Place(tmp_path / "place", cluster)
    job = place.submit("--set", "train.optim.lr=-1")
    assert place.ends(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert cluster.job(job)["Restarts"] == "0"
    assert "train.optim.lr=-1" in place.said()
    assert not place.run.exists()


def test_with_a_container_check_and_ranks_run_inside_it(cluster: Cluster, tmp_path: Path) -> None:
    """A stand-in for Apptainer notes how it is called, and runs what it is given on this machine."""
    place, calls = Place(tmp_path / "place", cluster), tmp_path / "calls"
    (tmp_path / "apptainer").write_text(f"""#!/bin/bash
echo "$*" >>{calls}
while [[ $1 != *.sif ]]; do shift; done
[[ $2 == python ]] && exec {sys.executable} "${{@:3}}"
""")
    (tmp_path / "apptainer").chmod(0o755)
    variables = {"CONTAINER": "image.sif", "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "none"}
    job = place.submit("--set", "train.total_iter=2", nodes=2, recipe="nodes.sh", **variables)
    assert place.ends(job) == "COMPLETED", place.said()
    assert set(losses(place.run)) == {1, 2}
    check, *ranks = calls.read_text().splitlines()
    start = f"exec --nv --bind {place.folder} --pwd {place.folder} image.sif python"
    assert check.startswith(f"{start} -m mambair_ds.train --check --ranks 2 ")
    assert len(ranks) == 2 and all(
        rank.startswith(f"{start} -u -m mambair_ds.train --config tiny.yml ") for rank in ranks
    )


def test_an_array_task_takes_its_configuration(cluster: Cluster, tmp_path: Path) -> None:
    place = Place(tmp_path / "place", cluster)
    job = cluster.submit(
        "--array=3", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30", "slurm/array.sh",
        "tiny.yml", cwd=place.folder, env={},
    )  # fmt: skip
    assert place.ends(job) == "FAILED"
    assert "Array task 3 has no configuration: 1 given" in place.said()


def _ranks_on(node: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if "mambair_ds.train" in process.cmdline() and process.environ().get("SLURMD_NODENAME") == node:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def _rank_on(node: str) -> int:
    """The rank's process: srun and the batch shell do not run the interpreter."""
    return next(pid for pid in _ranks_on(node) if Path(f"/proc/{pid}/comm").read_text().startswith("python"))
