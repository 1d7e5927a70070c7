"""The operators that PyTorch lacks, one folder each, and the one place that picks an operator's backend.

Every operator has a `reference` (slow, obvious, any device), a CPU backend named `torch`, and faster ones for GPUs;
they agree with one another and are interchangeable. Importing this package loads neither numba nor triton: a backend's
file is imported on its first use.
"""

import functools
import importlib
import logging
import os
import sys
from collections.abc import Mapping
from types import ModuleType

import torch

logger = logging.getLogger(__name__)
_PACKAGE = sys.modules[__name__]

compiling_for: tuple[int, int] | None = None
"""The compute capability of a GPU that is not there, whose place the CPU takes; see `ahead`."""


def on_cpu(device: torch.device) -> bool:
    """Whether a tensor's operators run on the CPU."""
    return device.type == "cpu" and compiling_for is None


def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; where the interpreter runs the kernels on a CPU they are those of an H100."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return compiling_for or (9, 0)


def gpu_class(capability: tuple[int, int]) -> str:
    """Which GPUs have their kernels cut alike: as an A100, H100 or B200, or small, with 99 KiB for a program."""
    return {(8, 0): "A100", (9, 0): "H100", (10, 0): "B200", (10, 3): "B200"}.get(capability, "small")


@functools.cache
def _preferred(operator: str, device_type: str, backends: frozenset[str]) -> str:
    backend = {"cpu": "torch", "cuda": "triton"}.get(device_type, "reference")
    backend = backend if backend in backends else "reference"
    logger.info("%s on %s: %s backend", operator, device_type, backend)
    return backend


def load_backend(operator: str, files: Mapping[str, str], device_type: str, requested: str | None) -> ModuleType:
    """The module that computes `operator`.

    Args:
        operator: the name of its folder here.
        files: the operator's backends, each with the name of its file in the folder.
        device_type: where the tensors are: "cpu", "cuda", ...
        requested: a backend's name; None takes the one for the device, decided and logged once.

    Raises:
        ValueError: there is no such backend, or it does not run on that device.
    """
    device_type = "cuda" if compiling_for else device_type
    return getattr(getattr(_PACKAGE, operator), _import(operator, files, device_type, requested))


def _import(operator: str, files: Mapping[str, str], device_type: str, requested: str | None) -> str:
    backend = _preferred(operator, device_type, frozenset(files)) if requested is None else requested
    if backend not in files:
        raise ValueError(f"{operator}: no backend {backend!r}; there are {', '.join(files)}")
    if backend == "torch" and device_type != "cpu":
        raise ValueError(f"{operator}: the torch backend runs on the CPU, the tensors are on {device_type}")
    if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{operator}: the triton backend runs on the CPU only under TRITON_INTERPRET=1")
    importlib.import_module(f"{__name__}.{operator}.{files[backend]}")
    return files[backend]


# torch.compile runs these instead of tracing them; torch.compiler.assume_constant_result does the same, but imports the
# compiler, and with it Triton.
for _function in (_import, capability):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010
