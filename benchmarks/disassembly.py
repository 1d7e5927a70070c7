"""Triton kernels compiled for a GPU that need not be there, disassembled and counted."""

import re
import subprocess
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ISSUE_RATE = 132 * 4 * 1.98e9
"""Warp instructions an H200 issues a second."""
SPECIAL_RATE = 132 * 16 * 1.98e9 / 32
"""Warp instructions of its special-function units a second."""
MATRIX_RATE = 790e12
"""Floating-point operations a second of its matrix units in bfloat16, measured; float32 as TF32 has half of it."""
BANDWIDTH = 4.3e12
"""Bytes a second of a large copy, measured."""

KINDS = {
    "float": {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "FHADD", "FMNMX", "HFMA2", "HADD2", "HMUL2"},
    "matrix": {"HMMA", "HGMMA", "QMMA", "UTCHMMA"},
    "special": {"MUFU"},
    "memory": {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL", "LDC", "LDCU", "ATOM", "RED"},
    "shuffle": {"SHFL"},
    "select": {"FSEL", "SEL"},
}
"""Instructions by kind; what is in none is "other": integers, addresses, conversions, control."""
LONGEST_WAIT = 8
"""Instructions of a loop that waits."""


@dataclass(frozen=True)
class Shape:
    """What a network asks of its kernels in a forward pass of one layer."""

    batch: int
    side: int
    """Of the square picture that a layer sees."""
    dim: int
    """Channels between the layers."""
    hidden: int
    """Channels inside the feed-forward block and the scan."""
    states: int
    """Numbers of a scanned channel's state."""
    heads: int
    window: int
    classes: int
    """Of the router."""
    gated: bool
    """Whether the feed-forward block is the Light model's, with half of `hidden` behind a gate."""

    @property
    def length(self) -> int:
        """Tokens of a picture."""
        return self.side**2


SHAPES = {
    "base": Shape(32, 64, 174, 348, 16, 6, 16, 128, gated=False),
    "base4": Shape(4, 64, 174, 348, 16, 6, 16, 128, gated=False),
    "light": Shape(32, 64, 48, 48, 8, 4, 16, 64, gated=True),
    "sigma50": Shape(2, 128, 174, 348, 16, 6, 16, 128, gated=False),
}
"""Base ×2 at batch 32 and 4 of 64×64, Light ×2 at batch 32, denoising at batch 2 of 128×128."""


@dataclass(frozen=True)
class Case:
    """A kernel at a shape."""

    kernel: Any
    name: str
    types: Mapping[str, str]
    """Triton's name of the type of every argument that is no constant ("*bf16", "i32", ...)."""
    constants: Mapping[str, Any]
    """The values of the `tl.constexpr` arguments."""
    warps: int
    """Warps of a program."""
    programs: int
    unit: str
    """What is counted: a state update, an output, ..."""
    units: int
    """Units that the algorithm asks of the grid."""
    units_per_thread: float
    """Units of a thread none of whose lanes idles."""
    arithmetic: float
    """Floating-point and special instructions that a thread cannot do without for one unit."""
    trips: tuple[float, ...]
    """How often each loop runs, on average, in one run of the loop around it; in order of their first instructions."""
    bytes: int
    """Bytes the grid must read and write, each once."""
    matrix: int = 0
    """Floating-point operations on the matrix units."""
    stages: int | None = None
    """Loads in flight of Triton's pipelined loops; None is Triton's default."""
    registers: int | None = None
    """A thread's at most, if that is set."""


@dataclass(frozen=True)
class Cost:
    """What a case costs; times in ms on an H200."""

    shape: str
    kernel: str
    registers: int
    stack: int
    shared: int
    unit: str
    instructions: dict[str, float]
    """Of one thread for one unit, by kind, what is outside of loops included."""
    issue_ms: float
    special_ms: float
    matrix_ms: float
    bytes_ms: float
    least_issue_ms: float
    """Of the arithmetic alone."""
    warps: float = float("nan")
    """That a multiprocessor runs at once; this and what follows only if simulated."""
    simulated_ms: float = float("nan")
    waits: Mapping[str, float] = field(default_factory=dict)
    """What shares of its time a warp alone waits for what."""

    @property
    def total(self) -> float:
        """Instructions for one unit."""
        return sum(self.instructions.values())

    @property
    def times(self) -> dict[str, float]:
        """What could take longest."""
        return {
            "issue": self.issue_ms,
            "special": self.special_ms,
            "matrix": self.matrix_ms,
            "bytes": self.bytes_ms,
        }

    @property
    def binding(self) -> str:
        """What takes longest."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def ratio(self) -> float:
        """The predicted time over its floor, which is the same with the arithmetic alone."""
        return max(self.times.values()) / max(self.least_issue_ms, self.special_ms, self.matrix_ms, self.bytes_ms)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Compiled:
    """A kernel as the GPU gets it."""

    registers: int
    """A thread's."""
    stack: int
    """Bytes of local memory a thread has; more than 0 where registers were spilled."""
    shared: int
    """Bytes of shared memory a program has."""
    code: str
    """Its instructions, as nvdisasm prints them."""


def compile_kernel(case: Case, capability: int) -> Compiled:
    """Compile for a compute capability (80, 90, 100, ...)."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    values = {(names.index(name),): value for name, value in case.constants.items()}
    # PyTorch aligns its tensors, and Triton sees that when a kernel is called.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(case.kernel, signature, values, aligned)
    options = {"num_warps": case.warps} | ({} if case.stages is None else {"num_stages": case.stages})
    options |= {} if case.registers is None else {"maxnreg": case.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", "-hex", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    assert numbers is not None, report
    registers, stack, _ = (int(number) for number in numbers.groups())
    return Compiled(registers, stack, compiled.metadata.shared, code)


@dataclass(frozen=True)
class Instruction:
    """One of the code's, and how it is bound to those around it."""

    text: str
    """Name and operands."""
    following: tuple[int, ...]
    """What can run next, by place in the code."""
    stall: int
    """Cycles until then at least."""
    result: int | None
    """The scoreboard that waits for its result, of six."""
    read: int | None
    """The one that waits until it has read its operands."""
    waits: tuple[int, ...]
    """The scoreboards it waits for."""


def parse(code: str) -> list[Instruction]:
    """The instructions of nvdisasm's text, whose second number of each holds in its bits 41 to 57 what binds it."""
    lines: list[tuple[str, bool]] = []
    controls: list[int] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?\w+\s+)?(\w.*?)\s*;", line):
            lines.append((match[2], match[1] is not None))
        elif match := re.match(r"\s*/\* 0x([0-9a-f]+) \*/\s*$", line):
            controls.append(int(match[1], 16) >> 41)
    result = []
    for i, ((text, guarded), control) in enumerate(zip(lines, controls, strict=True)):
        ends = not guarded and re.match(r"(EXIT|RET|BRA\s+`)", text)
        targets = [labels[name] for name in re.findall(r"`\((\.L\w+)\)", text) if name in labels]
        following = tuple(j for j in [*targets, *([] if ends else [i + 1])] if j < len(lines))
        result_board, read_board = (board if board < 6 else None for board in (control >> 5 & 7, control >> 8 & 7))
        waits = tuple(board for board in range(6) if control >> (11 + board) & 1)
        result.append(Instruction(text, following, control & 15, result_board, read_board, waits))
    return result


def _reach(start: int, following: Sequence[Sequence[int]], without: int | None = None) -> set[int]:
    """What can run after `start`, itself included, on paths that do not touch `without`."""
    seen = {start} - {without}
    waiting = list(seen)
    while waiting:
        new = set(following[waiting.pop()]) - seen - {without}
        seen |= new
        waiting += new
    return seen


def loops(code: list[Instruction]) -> dict[int, set[int]]:
    """The instructions of every loop by its first: of a branch back to where every path to that branch came through.

    So a jump back from code that was moved out of the way is none, nor is a loop that only waits.
    """
    following = [instruction.following for instruction in code]
    before: list[list[int]] = [[] for _ in following]
    for i, targets in enumerate(following):
        for j in targets:
            before[j].append(i)
    found: dict[int, set[int]] = {}
    for i in _reach(0, following):
        for start in following[i]:
            if start <= i and i not in _reach(0, following, start):
                found.setdefault(start, {start}).update(_reach(i, before, start))
    return {start: body for start, body in found.items() if not _waits([code[i].text for i in body])}


def _waits(body: list[str]) -> bool:
    """Whether a loop does nothing but wait, for a barrier or for memory of the matrix units."""
    names = {re.split(r"\W", text)[0] for text in body}
    waits = any("TRYWAIT" in text or "NANOSLEEP" in text for text in body)
    return waits and len(body) <= LONGEST_WAIT and not any(names & members for members in KINDS.values())


def count(code: str, trips: tuple[float, ...]) -> dict[str, float]:
    """The instructions a thread executes, by kind, if its loops run `trips` times, and those that only wait once.

    Raises:
        ValueError: the code has another number of loops.
    """
    instructions = parse(code)
    bodies = loops(instructions)
    if len(bodies) != len(trips):
        found = sorted((start, len(body)) for start, body in bodies.items())
        raise ValueError(f"the code has {len(bodies)} loops, expected {len(trips)}: (start, length) {found}")
    kinds = {name: kind for kind, members in KINDS.items() for name in members}
    counts: dict[str, float] = defaultdict(float)
    for i, instruction in enumerate(instructions):
        weight = 1.0
        for start, trip in zip(sorted(bodies), trips, strict=True):
            weight *= trip if i in bodies[start] else 1
        name = re.split(r"\W", instruction.text)[0]
        if name != "NOP":
            counts[kinds.get(name, "other")] += weight
    return counts


def measure(case: Case, shape: str, compiled: Compiled) -> Cost:
    """Count what the case's code costs at a shape.

    Warns:
        The case does not say how often the kernel's loops run: its counts, times and ratio are NaN.
    """
    try:
        counts = count(compiled.code, case.trips)
    except ValueError as error:
        warnings.warn(f"{shape}, {case.name}: {error}", stacklevel=2)
        counts = dict.fromkeys([*KINDS, "other"], float("nan"))
    warps = case.programs * case.warps
    return Cost(
        shape,
        case.name,
        compiled.registers,
        compiled.stack,
        compiled.shared,
        case.unit,
        {kind: number / case.units_per_thread for kind, number in counts.items()},
        issue_ms=sum(counts.values()) * warps / ISSUE_RATE * 1e3,
        special_ms=counts["special"] * warps / SPECIAL_RATE * 1e3,
        matrix_ms=case.matrix / MATRIX_RATE * 1e3,
        bytes_ms=case.bytes / BANDWIDTH * 1e3,
        least_issue_ms=case.arithmetic * case.units / 32 / ISSUE_RATE * 1e3,
    )
