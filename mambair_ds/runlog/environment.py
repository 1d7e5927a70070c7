"""Versions, hardware, launcher and source revision of a run, for its log and its folder."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mambair-ds", "torch", "triton", "numba", "deepspeed", "nvidia-dali-cuda130", "webdataset", "numpy")


def describe_environment(launcher: str, world_size: int) -> dict[str, Any]:
    """Facts that decide a run's numbers and speed, as plain JSON values."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if gpus else None,
        "gpus": gpus,
        "cpu": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "system": platform.platform(),
        "git": _git_revision(),
        "launcher": launcher,
        "world_size": world_size,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the source tree this package runs from, marked if it was edited; None if it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
