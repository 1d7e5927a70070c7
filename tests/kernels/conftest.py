"""Triton's kernels are tested on the GPU if there is one, else in Triton's interpreter on the CPU."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads the variable when it and the kernels are first imported.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before tests/kernels/conftest.py could switch its interpreter on")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter run what kernels give to the matrix units."""
    from warp import teach_interpreter

    teach_interpreter(monkeypatch)


@pytest.fixture
def device() -> str:
    """The device for Triton's tests."""
    return "cuda" if torch.cuda.is_available() else "cpu"
