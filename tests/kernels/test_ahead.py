"""Kernels are compiled for a GPU that need not be there, where a run looks for them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONFIG = "configs/demo.yml"
RUN = f"""
import torch
from triton import knobs
from mambair_ds.config import load_config
from mambair_ds.kernels.ahead import take_step
missed = []
def listen(*, src, cache_hit, **_):
    if not cache_hit:
        missed.append(src.name)
knobs.compilation.listener = listen
take_step(load_config({CONFIG!r}), torch.device("cuda"))
print("compiled again:", missed)
"""


def run(cache: Path, *command: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": interpret}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


def compile_ahead(cache: Path, *options: str) -> tuple[int, int]:
    """How many kernels there are, and how many were there already."""
    done = run(cache, "-m", "mambair_ds.compile", "--config", CONFIG, *options, interpret="1")
    counts = re.fullmatch(rf"{CONFIG}: (\d+) kernels, (\d+) of them were there already, \d+ s\n", done.stdout)
    assert counts, done.stdout + done.stderr
    return int(counts[1]), int(counts[2])


def test_kernels_are_compiled_once_and_of_every_operator(tmp_path: Path) -> None:
    total, found = compile_ahead(tmp_path, "--capability", "8.9")
    assert total > 40
    assert found == 0
    cubins = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert cubins >= {
        "backward_inputs", "differentiate_bias", "differentiate_prompt", "differentiate_tiles", "differentiate_weight",
        "step_blocks",
    }  # fmt: skip
    assert compile_ahead(tmp_path, "--capability", "8.9") == (total, total)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_compiles_nothing_that_is_there(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    compile_ahead(tmp_path, "--capability", f"{major}.{minor}")
    done = run(tmp_path, "-c", RUN)
    assert done.stdout == "compiled again: []\n", done.stdout + done.stderr


@pytest.mark.parametrize("options", [("--capability", "7.5"), ("--capability", "9.9"), ("--capability", "nine")])
def test_a_capability_that_is_none_is_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run(tmp_path, "-m", "mambair_ds.compile", "--config", CONFIG, *options)
    assert done.returncode == 2
    assert "expected a compute capability of 8.0 or more" in done.stderr
