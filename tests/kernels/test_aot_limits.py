"""What the scan's kernels may cost, by counts of compiled instructions, so that a GPU need not be at hand to notice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AOT = Path(__file__).parents[2] / "benchmarks" / "aot.py"
PASSES = ("forward_ends", "forward_outputs", "backward_ends", "backward_inputs")


def costs(capability: int, shape: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What benchmarks/aot.py says, by kernel; a program of its own because the tests' runs Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, str(AOT), "--json", "--operator", "scan"]
    command += ["--capability", str(capability), "--shape", shape, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {row["kernel"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("base", "bf16"),
        pytest.param("base", "fp32", marks=pytest.mark.slow),
        pytest.param("light", "bf16", marks=pytest.mark.slow),
        pytest.param("light", "fp32", marks=pytest.mark.slow),
    ],
)
def test_scan_stays_within_its_registers_and_instructions(
    capability: int, shape: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = costs(capability, shape, dtype, monkeypatch)
    assert set(rows) == {*PASSES, "carry"}
    for name, row in rows.items():
        assert row["stack"] == 0, f"{name} spills: {row['registers']} registers, {row['stack']} bytes of stack"
    limits = {"base": (6, 7.1, 6, 26.5), "light": (7.2, 8.5, 7.2, 29)}[shape]
    if dtype == "bf16":
        for name, limit in zip(PASSES, limits, strict=True):
            assert rows[name]["total"] <= limit, f"{name}: {rows[name]['total']:.2f} instructions a state update"
