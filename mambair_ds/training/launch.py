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
    local_world_size: int
    """Ranks on this machine."""

    @property
    def device(self) -> str:
        """Where this rank computes: its GPU if there is one."""
        import torch

        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"

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
        # One number, or a list such as 2(x3),1 where nodes differ: the largest share is the cautious answer.
        shares = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
        environ["LOCAL_WORLD_SIZE"] = max((part.split("(")[0] for part in shares.split(",")), key=int)
        environ.setdefault("MASTER_ADDR", _first_host(environ.get("SLURM_JOB_NODELIST", "localhost")))
        # One port a job: jobs that share a node must not meet.
        environ.setdefault("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000))
    else:
        launcher = "python"
        environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    environ.setdefault("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", "1"))  # torchrun's name, DeepSpeed's name
    try:
        numbers = [int(environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    except ValueError as error:
        raise UserError(f"the launcher's RANK, LOCAL_RANK, WORLD_SIZE must be integers: {error}") from error
    return Launch(launcher, *numbers)


def share_cores(place: Launch) -> None:
    """Divide the machine's cores among its ranks, and let waiting threads sleep; call before torch is imported.

    Without it, every rank on a CPU starts a thread a core, and threads that spin while they wait take the cores from
    those that work: steps become ten times slower. Spinning for some microseconds, as GNU's OpenMP counts, spares most
    of the waking instead: 7 % of a step on idle cores, against 2 % lost on busy ones. Settings of the user win.
    """
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // place.local_world_size)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "300")


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
