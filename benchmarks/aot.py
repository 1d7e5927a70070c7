"""What the Triton kernels cost, without a GPU: compiled ahead of time, disassembled, counted.

`python benchmarks/aot.py [--capability 90] [--dtype bf16] [--shape base] [--operator scan] [--json]` prints a table,
one row a kernel and shape: registers, spilled bytes and shared memory; the instructions a thread executes for one unit
of work, by kind; and the time that the issue of all instructions, the special functions alone and the bytes alone would
take on an H200. The largest of the three binds. Latency, occupancy and the load/store units are not modelled: the times
are floors.

An operator takes part by a function under `@register` that returns its kernels' `Case`s for a shape of a network. Not
usable in a process where Triton's interpreter is on.
"""

import argparse
import dataclasses
import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ISSUE_RATE = 132 * 4 * 1.98e9
"""Warp instructions an H200 issues a second."""
SPECIAL_RATE = 132 * 16 * 1.98e9 / 32
"""Warp instructions of its special-function units a second."""
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


@dataclass(frozen=True)
class Shape:
    """What a network asks of its kernels in a forward pass of one layer."""

    batch: int
    length: int
    """Tokens of a picture."""
    channels: int
    """Channels of the scan."""
    states: int
    """Numbers of a channel's state."""
    tokens: int
    """Classes of the router."""


SHAPES = {
    "base": Shape(32, 4096, 348, 16, 128),
    "light": Shape(32, 4096, 48, 8, 64),
    "sigma50": Shape(2, 16384, 348, 16, 128),
}
"""Base ×2 and Light ×2 at batch 32 of 64×64, denoising at batch 2 of 128×128."""


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
    """What is counted: a state update, an element, ..."""
    units_per_thread: int
    """Units of a thread none of whose lanes idles."""
    trips: tuple[int, ...]
    """How often each loop runs, within one run of the loop around it; in order of their first instructions."""
    bytes: int
    """Bytes the grid must read and write, each once."""


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
    bytes_ms: float

    @property
    def total(self) -> float:
        """Instructions for one unit."""
        return sum(self.instructions.values())

    @property
    def binding(self) -> str:
        """What takes longest."""
        times = {"issue": self.issue_ms, "special": self.special_ms, "bytes": self.bytes_ms}
        return max(times, key=lambda name: times[name])


_registry: dict[str, Callable[[Shape, str], list[Case]]] = {}


def register(cases: Callable[[Shape, str], list[Case]]) -> Callable[[Shape, str], list[Case]]:
    """Add an operator: `cases` takes a shape and Triton's name of the activations' type."""
    _registry[cases.__name__] = cases
    return cases


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


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, warps: int
) -> Compiled:
    """Compile for a compute capability (80, 90, 100, ...); `types`, `constants` and `warps` as in `Case`."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # PyTorch aligns its tensors, and Triton sees that when a kernel is called.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    assert numbers is not None, report
    registers, stack, shared = (int(number) for number in numbers.groups())
    return Compiled(registers, stack, shared, code)


def count(code: str, trips: tuple[int, ...]) -> Counter[str]:
    """The instructions a thread executes, by kind, if its loops, found by their backward branches, run `trips` times.

    Raises:
        ValueError: the code has another number of loops.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?([\w]+)(.*?);", line):
            target = re.search(r"`\((\.L\w+)\)", instruction[2])
            start = labels.get(target[1]) if target and instruction[1] == "BRA" else None
            if start is not None and start < len(names):
                loops[start] = len(names)
            names.append(instruction[1])
    if len(loops) != len(trips):
        raise ValueError(f"the code has {len(loops)} loops, expected {len(trips)}: {sorted(loops.items())}")
    kinds = {name: kind for kind, members in KINDS.items() for name in members}
    counts: Counter[str] = Counter()
    for i, name in enumerate(names):
        weight = 1
        for (start, end), trip in zip(sorted(loops.items()), trips, strict=True):
            weight *= trip if start <= i <= end else 1
        if name != "NOP":
            counts[kinds.get(name, "other")] += weight
    return counts


def measure(case: Case, shape: str, capability: int) -> Cost:
    """Compile and count."""
    compiled = compile_kernel(case.kernel, case.types, case.constants, capability, case.warps)
    counts = count(compiled.code, case.trips)
    warps = case.programs * case.warps
    return Cost(
        shape,
        case.name,
        compiled.registers,
        compiled.stack,
        compiled.shared,
        case.unit,
        {kind: number / case.units_per_thread for kind, number in counts.items()},
        issue_ms=counts.total() * warps / ISSUE_RATE * 1e3,
        special_ms=counts["special"] * warps / SPECIAL_RATE * 1e3,
        bytes_ms=case.bytes / BANDWIDTH * 1e3,
    )


@register
def scan(shape: Shape, dtype: str) -> list[Case]:
    """The selective scan's kernels, counted in state updates."""
    from mambair_ds.kernels.selective_scan import triton as scan

    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    b, length, d, n, wide = shape.batch, shape.length, shape.channels, shape.states, 2 if dtype == "bf16" else 4
    segments, tokens = cdiv(length, scan.SEGMENT), b * length
    pairs = tokens * n * 8
    entering = b * segments * d * n * 4
    states = b * cdiv(length, scan.CHUNK) * d * n * 4
    activation = tokens * d * wide
    blocks = cdiv(d, scan.WIDTHS["backward"])
    groups = scan.SEGMENT // scan.UNROLL
    chunks = scan.SEGMENT // scan.CHUNK
    moved = {
        "forward_ends": 2 * activation + pairs + entering,
        "forward_outputs": 3 * activation + pairs + entering + states,
        "backward_ends": 2 * activation + pairs + entering,
        "backward_inputs": 5 * activation + pairs + 3 * entering + states + blocks * pairs,
    }
    trips = {
        "forward_ends": (groups,),
        "forward_outputs": (chunks, scan.CHUNK // scan.UNROLL),
        "backward_ends": (groups,),
        "backward_inputs": (chunks, n),
    }
    activations = {"u", "delta", "y", "grad_y", "grad_u", "grad_delta"}
    scalars = {"length": "i32", "segments": "i32", "channels": "i32", "BC": "*i64"}
    sizes = {"channels": d, "N": n, "SEGMENT": scan.SEGMENT, "CHUNK": scan.CHUNK, "UNROLL": scan.UNROLL}

    def types(kernel: Any) -> dict[str, str]:
        return {x: scalars.get(x, f"*{dtype}" if x in activations else "*fp32") for x in kernel.arg_names}

    cases = []
    for name, bytes_ in moved.items():
        kernel = getattr(scan, name)
        width = scan.WIDTHS["backward" if name == "backward_inputs" else "forward"]
        constants = {**sizes, "WIDTH": width, "SOFTPLUS": True, "FULL": length % scan.CHUNK == 0}
        constants = {x: value for x, value in constants.items() if x in kernel.arg_names}
        programs = b * segments * cdiv(d, width)
        work = scan.SEGMENT * n * width // (32 * scan.WARPS)
        cases.append(
            Case(
                kernel, name, types(kernel), constants, scan.WARPS, programs, "state update", work, trips[name], bytes_
            )
        )
    constants = {"N": n, "WIDTH": 32, "REVERSE": True}
    programs, bytes_ = cdiv(d, 32) * n * b, 2 * entering + entering // n
    carry = scan.carry
    cases.append(
        Case(carry, "carry", types(carry), constants, scan.WARPS, programs, "segment", segments, (segments,), bytes_)
    )
    return cases


@register
def philox(shape: Shape, dtype: str) -> list[Case]:
    """The noise generator's two distributions, counted in elements; always float32."""
    from mambair_ds.kernels.philox import triton as philox

    elements = shape.batch * shape.length * shape.tokens
    types = {"seed": "i64", "stream": "i64", "positions": "*i64", "out": "*fp32", "count": "i32"}
    return [
        Case(
            philox.fill,
            f"philox {'normal' if normal else 'gumbel'}",
            types,
            {"NORMAL": normal, "BLOCK": philox.BLOCK},
            warps=4,
            programs=elements // (4 * philox.BLOCK),
            unit="element",
            units_per_thread=4 * philox.BLOCK // 128,
            trips=(),
            bytes=4 * elements,
        )
        for normal in (False, True)
    ]


@register
def depthwise_conv(shape: Shape, dtype: str) -> list[Case]:
    """The depthwise convolution's kernels on the scan's channels, counted in outputs."""
    from mambair_ds.kernels.depthwise_conv import triton as conv

    side, d = math.isqrt(shape.length), shape.channels
    activations = {"x", "other", "y", "grad", "gate", "grad_c", "extra"}
    integers = {"height", "width", "channels", "x_stride", "other_stride", "gate_stride"}
    wide = 2 if dtype == "bf16" else 4
    # How many activations each kernel reads and writes with each epilogue.
    uses = [
        (conv.convolve_tiles, 5, "gelu_residual", 2),
        (conv.convolve_tiles, 5, "gate", 3),
        (conv.convolve_tiles, 3, "sigmoid_gate", 2),
        (conv.convolve_tiles, 5, "add", 3),
        (conv.convolve_tiles, 3, "add", 3),
        (conv.differentiate_tiles, 5, "gelu_residual", 3),
        (conv.differentiate_tiles, 5, "gate", 5),
        (conv.differentiate_tiles, 3, "sigmoid_gate", 4),
    ]
    cases = []
    for kernel, k, epilogue, tensors in uses:
        constants = conv.constants(kernel.__name__.removesuffix("_tiles"), k, epilogue)
        rows, columns = conv.TILES[kernel.__name__.removesuffix("_tiles")]
        programs = shape.batch * -(-side // rows) * -(-side // columns) * -(-d // conv.WIDTH)
        types = {x: f"*{dtype}" if x in activations else "i32" if x in integers else "*fp32" for x in kernel.arg_names}
        name, work = f"{kernel.__name__} {k}×{k} {epilogue}", rows * columns * conv.WIDTH // (32 * conv.WARPS)
        moved = tensors * shape.batch * shape.length * d * wide
        cases.append(Case(kernel, name, types, constants, conv.WARPS, programs, "output", work, (rows,), moved))
    return cases


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10 (default 90)")
    parser.add_argument("--dtype", default="bf16", help="of the activations, bf16 or fp32 (default bf16)")
    parser.add_argument("--shape", choices=SHAPES, help="one shape instead of all")
    parser.add_argument("--operator", choices=_registry, help="one operator instead of all")
    parser.add_argument("--json", action="store_true", help="one JSON object a kernel instead of the table")
    arguments = parser.parse_args()
    shapes = [arguments.shape] if arguments.shape else list(SHAPES)
    operators = [arguments.operator] if arguments.operator else list(_registry)
    rows = [
        measure(case, shape, arguments.capability)
        for shape in shapes
        for operator in operators
        for case in _registry[operator](SHAPES[shape], arguments.dtype)
    ]
    if arguments.json:
        for row in rows:
            print(json.dumps({**dataclasses.asdict(row), "total": row.total, "binding": row.binding}))
        return
    kinds = [*KINDS, "other"]
    print(f"sm_{arguments.capability}, {arguments.dtype}; rates of an H200; instructions a unit by kind\n")
    print("| shape | kernel | registers | stack | shared | unit | " + " | ".join(kinds), end=" ")
    print("| all | issue ms | special ms | bytes ms | binding |")
    print("| --- " * (12 + len(kinds) - 1) + "|")
    for row in rows:
        mix = " | ".join(f"{row.instructions.get(kind, 0):.2f}" for kind in kinds)
        print(
            f"| {row.shape} | {row.kernel} | {row.registers} | {row.stack} | {row.shared} | {row.unit} | {mix}", end=" "
        )
        print(f"| {row.total:.2f} | {row.issue_ms:.3f} | {row.special_ms:.3f} | {row.bytes_ms:.3f} | {row.binding} |")


if __name__ == "__main__":
    main()
