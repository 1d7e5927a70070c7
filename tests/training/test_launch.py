"""Each launcher's environment gives the same answer: who am I among how many."""

import os

import pytest

from mambair_ds.config import UserError
from mambair_ds.training.launch import Launch, detect, share_cores

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
SLURM = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_NODELIST", "SLURM_JOB_ID")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES + OTHERS + SLURM:
        # set before deleting, so that what detect writes is undone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def ranks(environment: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("3", "1", "4", "host", "29500"), strict=False):
        environment.setenv(name, value)


def test_plain_python_is_one_rank(environment: pytest.MonkeyPatch) -> None:
    assert detect() == Launch("python", 0, 0, 1, 1)


def test_torchrun(environment: pytest.MonkeyPatch) -> None:
    ranks(environment)
    environment.setenv("TORCHELASTIC_RUN_ID", "x")
    environment.setenv("LOCAL_WORLD_SIZE", "2")
    assert detect() == Launch("torchrun", 3, 1, 4, 2)


def test_deepspeed(environment: pytest.MonkeyPatch) -> None:
    ranks(environment)
    environment.setenv("LOCAL_SIZE", "2")
    assert detect(deepspeed_local_rank=1) == Launch("deepspeed", 3, 1, 4, 2)


def test_srun(environment: pytest.MonkeyPatch) -> None:
    for name, value in zip(SLURM, ("0", "5", "1", "8", "n1,n2", "12345"), strict=True):
        environment.setenv(name, value)
    environment.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x1),3")
    assert detect() == Launch("srun", 5, 1, 8, 4)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n1", "32345")


def test_a_batch_script_without_srun_is_one_rank(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "8")
    assert detect() == Launch("python", 0, 0, 1, 1)


def test_half_an_environment_is_an_error(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "0")
    with pytest.raises(UserError, match="not WORLD_SIZE"):
        detect()


def test_ranks_of_a_machine_share_its_cores_unless_the_user_says_otherwise(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    environment.setenv("OMP_NUM_THREADS", "")
    environment.delenv("OMP_NUM_THREADS")
    share_cores(Launch("torchrun", 0, 0, 2, 2))
    assert os.environ["OMP_NUM_THREADS"] == "3"
    environment.setenv("OMP_NUM_THREADS", "5")
    share_cores(Launch("torchrun", 0, 0, 2, 2))
    assert os.environ["OMP_NUM_THREADS"] == "5"
