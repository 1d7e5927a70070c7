"""What the Triton kernels may cost, by counts of compiled instructions, so that a GPU need not be at hand to notice."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

AOT = Path(__file__).parents[2] / "benchmarks" / "aot.py"
OPERATORS = sorted(path.stem for path in AOT.parent.glob("cases/[a-z]*.py"))
SCAN_LIMITS = {"forward_ends": 5.0, "forward_outputs": 6.0, "backward_ends": 4.9, "backward_inputs": 16.2}
"""Instructions a state update."""
WAITING = {"forward_ends": 1.4, "forward_outputs": 1.75, "backward_ends": 1.4, "backward_inputs": 2.25}
WAITING |= {"carry": 1.4, "differentiate_tiles 5×5 gelu_residual": 1.65}
"""How many times its floor a kernel of the scan or the convolution may take by simulation, if not 1.3 times."""

SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB a program may have, by compute capability."""
SPILLED = {
    (90, "fp32", "differentiate_tiles 5×5 gelu_residual"): 8,
    (100, "fp32", "convolve_tiles 5×5 add"): 8,
    (100, "fp32", "differentiate_prompt"): 24,
}
"""Bytes of stack by compute capability, dtype and kernel: float32 is the slow path that is there to be exact."""
SPILLED_BY_SMALL = 32
"""Of any kernel on GPUs that have the shared memory of 8.9 or 12.0: there it must run, and need not be the fastest."""

CAPABILITIES = (80, 89, 90, 100)
_pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="aot")


@pytest.fixture(scope="module", autouse=True)
def builds_end_with_the_tests() -> Iterator[None]:
    yield
    _pool.shutdown(cancel_futures=True)


def _build(operator: str, capability: int, shape: str, dtype: str) -> dict[str, dict[str, Any]]:
    """What benchmarks/aot.py says, by kernel; a program of its own because the tests' runs Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(AOT), "--json", "--operator", operator]
    command += ["--capability", str(capability), "--shape", shape, "--dtype", dtype]
    command += ["--simulate"] if capability == 90 and operator in ("selective_scan", "depthwise_conv") else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {row["kernel"]: row for row in map(json.loads, done.stdout.splitlines())}


@functools.cache
def _building(*build: Any) -> Future[dict[str, dict[str, Any]]]:
    return _pool.submit(_build, *build)


def costs(operator: str, capability: int, shape: str, dtype: str) -> dict[str, dict[str, Any]]:
    """See `_build`. All that are wanted of a shape are built beside one another, in the order of the tests."""
    for other in OPERATORS[OPERATORS.index(operator) :]:
        for one in CAPABILITIES:
            _building(other, one, shape, dtype)
    return _building(operator, capability, shape, dtype).result()


@pytest.mark.parametrize("capability", [*CAPABILITIES, pytest.param(120, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("base", "bf16"),
        pytest.param("base", "fp32", marks=pytest.mark.slow),
        pytest.param("light", "bf16", marks=pytest.mark.slow),
        pytest.param("light", "fp32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_build_without_spilling_registers(operator: str, shape: str, dtype: str, capability: int) -> None:
    if operator == "window_attention" and dtype == "fp32":
        pytest.xfail("too many keys at a time for the registers, and on 8.0 for the shared memory")
    rows = costs(operator, capability, shape, dtype)
    assert rows
    for name, row in rows.items():
        assert row["registers"] > 10, f"{name} was compiled to almost nothing"
        assert row["shared"] <= SHARED_MEMORY[capability] * 1024, f"{name} has {row['shared']} bytes of shared memory"
        spilled = SPILLED_BY_SMALL if SHARED_MEMORY[capability] < 100 else SPILLED.get((capability, dtype, name), 0)
        assert row["stack"] <= spilled, f"{name} spills: {row['registers']} registers, {row['stack']} bytes of stack"


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_kernel_takes_much_longer_than_its_arithmetic_and_bytes(operator: str) -> None:
    for name, row in costs(operator, 90, "base", "bf16").items():
        assert row["ratio"] <= 1.5, f"{name}: {row['ratio']:.2f} times its floor, bound by {row['binding']}"


def test_the_scan_stays_within_its_instructions() -> None:
    rows = costs("selective_scan", 90, "base", "bf16")
    for name, limit in SCAN_LIMITS.items():
        assert rows[name]["total"] <= limit, f"{name}: {rows[name]['total']:.2f} instructions a state update"


@pytest.mark.parametrize("operator", ["selective_scan", "depthwise_conv"])
def test_loads_are_on_their_way_before_they_are_needed(operator: str) -> None:
    for name, row in costs(operator, 90, "base", "bf16").items():
        least = max(row["issue_ms"], row["special_ms"], row["bytes_ms"])
        limit = WAITING.get(name.removesuffix(" without order"), 1.3)
        assert row["simulated_ms"] <= limit * least, f"{name}: {row['simulated_ms'] / least:.2f}, {row['waits']}"
