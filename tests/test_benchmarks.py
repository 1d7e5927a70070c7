"""The benchmarks: the table of operators at tiny sizes, that a wrong one is not timed, and the model of waiting."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/operators.py with tiny shapes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    shape = importlib.import_module("disassembly").Shape
    module = importlib.import_module("operators")
    tiny = {
        "base": shape(2, 16, 12, 24, 4, 2, 8, 8, gated=False),
        "light": shape(2, 16, 12, 12, 4, 2, 8, 8, gated=True),
    }
    monkeypatch.setattr(module, "CPU_SHAPES", tiny)
    monkeypatch.setattr(module, "SHAPES", tiny)
    return module


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "operators.json").read_text())["rows"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_operators_are_in_the_table_forward_and_backward(
    device: str, operators: ModuleType, tmp_path: Path
) -> None:
    assert operators.main(["--device", device, "--shapes", "base,light", "--seconds", "0", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)
    assert [(row["shape"], row["operator"]) for row in rows] == [
        (shape, operator) for shape in ("base", "light") for operator in operators.OPERATORS
    ]
    for row in rows:
        assert row["state"] == "ok" and (row["floor"] is None) == (device == "cpu") and row["kept"]["ours"] >= 0
        assert len(row["times"]) >= 2, "no peer"
        assert all(time > 0 for times in row["times"].values() for time in times)
    text = (tmp_path / "operators.md").read_text()
    assert ("threads" if device == "cpu" else "driver") in text and "--seconds 0" in text, "no hardware or no command"
    assert text.count("\n| base | ") == text.count("\n| light | ") >= len(operators.OPERATORS)
    assert text.count("times faster than the reference loop") == (2 if device == "cpu" else 0)


@pytest.mark.parametrize("part", ["value", "gradient"])
def test_a_wrong_operator_is_named_and_not_timed(
    part: str, operators: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor, **rest: Any) -> Tensor:
        y = importlib.import_module("mambair_ds.kernels.linear").linear(x, weight, bias, **rest)
        return 1.01 * y if part == "value" else y.detach() + 0.9 * (y - y.detach())

    monkeypatch.setattr(importlib.import_module("jobs"), "linear", wrong)
    asked = ["--shapes", "light", "--operators", "linear-gelu,depthwise-3x3"]
    assert operators.main(["--device", "cpu", *asked, "--seconds", "0", "--out", str(tmp_path)]) == 1
    right, off = results(tmp_path)
    assert right["state"] == "ok" and right["times"]
    assert off["state"].startswith("WRONG") and "gradient of weight" in off["state"] and not off["times"]
    assert ("output 0" in off["state"]) == (part == "value")


def test_floors_are_the_longest_of_bytes_and_arithmetic(operators: ModuleType) -> None:
    rates = operators.Rates(bandwidth=1e12, floats=1e12, special=1e11, matrix=1e14)
    work = operators.Work(values=10, floats=5, special=1, matrix=100, indices=1)
    assert operators.floor(work, 10**9, rates) == pytest.approx((28.0, 28.0))
    work = operators.Work(values=1, floats=5, special=1, matrix=100)
    assert operators.floor(work, 10**9, rates) == pytest.approx((10.0, 2.0))


def test_unknown_names_are_refused_with_those_there_are(
    operators: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        operators.main(["--operators", "scan,routes"])
    assert "no routes; there are scan, attention" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_a_missing_peer_is_explained(operators: ModuleType, tmp_path: Path) -> None:
    peer = importlib.import_module("mamba_ssm_peer")
    assert str(peer.load(None)).startswith("not available: ")
    assert str(peer.load(tmp_path)).startswith("not available: ")


FREE = 7  # no scoreboard


def _line(text: str, stall: int = 1, result: int = FREE, read: int = FREE, waits: int = 0) -> str:
    """An instruction as nvdisasm prints it."""
    control = (stall | result << 5 | read << 8 | waits << 11) << 41
    return f"        /*0000*/    {text} ;    /* 0x0000000000000000 */\n    /* 0x{control:016x} */\n"


@pytest.mark.parametrize(("warps", "expected"), [(1, 606), (4, 618)])
def test_simulated_warps_wait_for_memory_side_by_side(warps: int, expected: int, operators: ModuleType) -> None:
    code = _line("LDG.E R0, desc[UR4][R2.64]", result=0) + _line("FADD R0, R0, R1", waits=1) + _line("EXIT")
    assert _cycles(code, warps) == pytest.approx(expected, abs=8)


@pytest.mark.parametrize("warps", [1, 4])
def test_simulated_warps_take_turns_at_a_unit(warps: int, operators: ModuleType) -> None:
    assert _cycles(_line("MUFU.EX2 R0, R1") * 10 + _line("EXIT"), warps) == pytest.approx(80 * warps, abs=10)


def test_a_simulated_loop_runs_as_often_as_the_case_says(operators: ModuleType) -> None:
    loop = ".L_0:\n" + _line("FADD R0, R0, R1", stall=4) + _line("@P0 BRA `(.L_0)", stall=5)
    assert _cycles(loop + _line("EXIT"), 1, trips=(20,)) == pytest.approx(180, abs=3)
    with pytest.raises(ValueError, match="zip"):
        _cycles(loop + _line("EXIT"), 1)


def test_settings_of_a_variant_are_taken_back(operators: ModuleType) -> None:
    module = ModuleType("kernels")
    module.UNROLL, module.TILES = 4, {"convolve": {"ROWS": 16}}  # type: ignore[attr-defined]
    before = dict(vars(module))
    changed = importlib.import_module("variants").changed
    with changed(module, {"UNROLL": 8, "TILES.convolve.ROWS": 32}):
        assert (module.UNROLL, module.TILES["convolve"]["ROWS"]) == (8, 32)
    assert vars(module) == before and module.TILES["convolve"]["ROWS"] == 16
    with pytest.raises(KeyError, match="ROW"), changed(module, {"UNROLL": 8, "TILES.convolve.ROW": 32}):
        pass
    assert module.UNROLL == 4


def test_a_simulated_grid_takes_no_less_than_one_warp(operators: ModuleType) -> None:
    assert _cycles(_line("MUFU.EX2 R0, R1") * 10 + _line("EXIT"), 1 / 2) == pytest.approx(80, abs=10)


def _cycles(code: str, warps: float, trips: tuple[float, ...] = ()) -> float:
    """Of all multiprocessors' quarters with so many warps each."""
    disassembly, simulation = importlib.import_module("disassembly"), importlib.import_module("simulation")
    programs = round(4 * warps * simulation.MULTIPROCESSORS)
    case = disassembly.Case(None, "", {}, {}, 1, programs, "", 1, 1, 1, trips, 1)
    time, _ = simulation.simulate(case, disassembly.Compiled(32, 0, 0, code))
    return time / 1e3 * simulation.CLOCK
