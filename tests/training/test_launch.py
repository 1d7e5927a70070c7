"""Each launcher's environment gives the same answer: who am I among how many."""

import pytest

from mambair_ds.config import UserError
from mambair_ds.training.launch import Launch, detect

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
SLURM = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_NODELIST", "SLURM_JOB_ID")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES + SLURM:
        # set before deleting, so that what detect writes is undone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def ranks(environment: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("3", "1", "4", "host", "29500"), strict=False):
        environment.setenv(name, value)


def test_plain_python_is_one_rank(environment: pytest.MonkeyPatch) -> None:
    assert detect() == Launch("python", 0, 0, 1)


def test_torchrun(environment: pytest.MonkeyPatch) -> None:
    ranks(environment)
    environment.setenv("TORCHELASTIC_RUN_ID", "x")
    assert detect() == Launch("torchrun", 3, 1, 4)


def test_deepspeed(environment: pytest.MonkeyPatch) -> None:
    ranks(environment)
    assert detect(deepspeed_local_rank=1) == Launch("deepspeed", 3, 1, 4)


def test_srun(environment: pytest.MonkeyPatch) -> None:
    for name, value in zip(SLURM, ("0", "5", "1", "8", "n1,n2", "12345"), strict=True):
        environment.setenv(name, value)
    assert detect() == Launch("srun", 5, 1, 8)
    import os

    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n1", "32345")


def test_a_batch_script_without_srun_is_one_rank(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "8")
    assert detect() == Launch("python", 0, 0, 1)


def test_half_an_environment_is_an_error(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "0")
    with pytest.raises(UserError, match="not WORLD_SIZE"):
        detect()
