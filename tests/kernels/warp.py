"""Inline PTX of the kernels on numpy arrays, so that Triton's interpreter can run it: lane i has element i of 32.

Knows moves and the products of matrix units in TF32, with the fragments of the PTX ISA's "Matrix Fragments for
mma.m16n8k4" and "mma.m16n8k8": lane 4 g + t holds of the left side rows g and g + 8 in columns t (and t + 4), of the
right side rows t (and t + 4) of column g, of the sums rows g and g + 8 in columns 2 t and 2 t + 1.
"""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits behind the point; the units ignore the others."""
    return (x.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32)


def multiply(left: list[np.ndarray], right: list[np.ndarray], sums: list[np.ndarray]) -> list[np.ndarray]:
    """mma.sync.aligned.m16n8k(4 or 8).row.col.f32.tf32.tf32.f32, of registers by lane."""
    depth = 4 * len(right)
    a, b, c = np.zeros((16, depth), np.float32), np.zeros((depth, 8), np.float32), np.zeros((16, 8), np.float32)
    for i, register in enumerate(left):
        a[G + 8 * (i % 2), T + 4 * (i // 2)] = cut_to_tf32(register)
    for i, register in enumerate(right):
        b[T + 4 * i, G] = cut_to_tf32(register)
    for i, register in enumerate(sums):
        c[G + 8 * (i // 2), 2 * T + i % 2] = register
    c += (a.astype(np.float64) @ b).astype(np.float32)
    return [c[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)]


def run(code: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """The code's outputs, $0 to $(outputs - 1), for inputs of 32 lanes, which are $(outputs) and on."""
    registers: dict[str, np.ndarray] = {f"${outputs + i}": x for i, x in enumerate(inputs)}

    def read(name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.full(32, np.uint32(int(name[2:], 16))).view(np.float32)
        return registers.get(name, np.full(32, np.nan, np.float32))  # nobody wrote it

    for statement in re.sub(r"\s+", " ", code.strip()[1:-1]).split(";"):
        name, _, operands = statement.strip().partition(" ")
        if name.startswith("mov."):
            to, source = operands.replace(" ", "").split(",")
            registers[to] = read(source)
        elif re.fullmatch(r"mma\.sync\.aligned\.m16n8k[48]\.row\.col\.f32\.tf32\.tf32\.f32", name):
            to, *sides = (group.replace(" ", "").split(",") for group in re.findall(r"\{(.*?)\}", operands))
            registers.update(zip(to, multiply(*([read(x) for x in side] for side in sides)), strict=True))
        else:
            assert name in ("", ".reg"), f"unknown instruction {statement}"
    return [registers[f"${i}"] for i in range(outputs)]


def teach_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Triton's interpreter run inline PTX."""

    def create(_: Any, code: str, _constraints: str, values: list[Any], types: list[Any], *_more: object) -> Any:
        results = run(code, [value.data for value in values], len(types))
        handles = [interpreter.TensorHandle(x, kind.scalar) for x, kind in zip(results, types, strict=True)]
        return SimpleNamespace(get_result=handles.__getitem__)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)
