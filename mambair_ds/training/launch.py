"""Who started this process, and as which rank.

Runs start by plain `python -m`, torchrun, the deepspeed launcher or `srun`. `detect` reads the environment that each
leaves, and writes the variables that torch's rendezvous reads, so that nothing after it asks again.
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass

from mambair_ds.config import UserError


@dataclass(frozen=True)
class Launch:
    """This process's place in the run."""

    launcher: str
    """python, torchrun, deepspeed or srun."""
    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0


def detect(deepspeed_local_rank: int | None = None) -> Launch:
    """Read the launcher's environment and complete it for the rendezvous.

    Args:
        deepspeed_local_rank: the --local_rank argument that the deepspeed launcher adds.

    Raises:
        UserError: if variables of a launcher are there, but incomplete or no integers.
    """
    environ = os.environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        elastic = "TORCHELASTIC_RUN_ID" in environ
        launcher = "torchrun" if elastic else "deepspeed" if deepspeed_local_rank is not None else "environment"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise UserError(f"the launcher set RANK or WORLD_SIZE but not {name}; set all or none of them")
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        launcher = "srun"
        environ["RANK"] = environ["SLURM_PROCID"]
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
        environ["WORLD_SIZE"] = environ["SLURM_NTASKS"]
        environ.setdefault("MASTER_ADDR", _first_host(environ.get("SLURM_JOB_NODELIST", "localhost")))
        # One port a job: jobs that share a node must not meet.
        environ.setdefault("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000))
    else:
        launcher = "python"
        environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    try:
        numbers = [int(environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    except ValueError as error:
        raise UserError(f"RANK, LOCAL_RANK and WORLD_SIZE must be integers: {error}") from error
    return Launch(launcher, *numbers)


def _first_host(nodelist: str) -> str:
    """First host of a Slurm node list such as node[3-6]; Slurm itself expands it."""
    if "[" not in nodelist:
        return nodelist.split(",")[0]
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"cannot expand SLURM_JOB_NODELIST={nodelist} ({error}); set MASTER_ADDR") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
