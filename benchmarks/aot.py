"""What the Triton kernels cost, without a GPU: compiled ahead of time, disassembled, counted.

`python benchmarks/aot.py [--capability 90] [--dtype bf16] [--shape base] [--operator selective_scan] [--json]` prints a
table, one row a kernel and shape: registers, spilled bytes and shared memory; the instructions a thread executes for
one unit of work, by kind; and the time that the issue of all instructions, the special functions alone, the matrix
units alone and the bytes alone would take on an H200. The largest of them binds; `ratio` is how much larger it is than
with the arithmetic that the algorithm needs and nothing else. These times are floors. With `--simulate` the rows say
instead what `simulation.py` makes of the code: the warps a multiprocessor runs at once, the time with all waiting, and
what a warp alone waits for.

An operator takes part by a file in benchmarks/cases/ whose `cases` returns its kernels for a shape of a network, a
dtype and a capability. Not usable in a process where Triton's interpreter is on.
"""

import argparse
import dataclasses
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from disassembly import KINDS, SHAPES, Cost, compile_kernel, measure
from simulation import resident, simulate

OPERATORS = sorted(path.stem for path in (Path(__file__).parent / "cases").glob("[a-z]*.py"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10 (default 90)")
    parser.add_argument("--dtype", default="bf16", help="of the activations, bf16 or fp32 (default bf16)")
    parser.add_argument("--shape", choices=SHAPES, help="one shape instead of all")
    parser.add_argument("--operator", choices=OPERATORS, help="one operator instead of all")
    parser.add_argument("--json", action="store_true", help="one JSON object a kernel instead of the table")
    parser.add_argument("--simulate", action="store_true", help="times with all waiting, on an H200's multiprocessors")
    arguments = parser.parse_args()
    if arguments.simulate and arguments.capability != 90:
        parser.error("--simulate knows capability 90 alone")
    cases = [
        (shape, case)
        for shape in ([arguments.shape] if arguments.shape else SHAPES)
        for operator in ([arguments.operator] if arguments.operator else OPERATORS)
        for case in importlib.import_module(f"cases.{operator}").cases(
            SHAPES[shape], arguments.dtype, arguments.capability
        )
    ]
    rows = []
    for shape, case in cases:
        compiled = compile_kernel(case, arguments.capability)
        rows.append(measure(case, shape, compiled))
        if arguments.simulate and not math.isnan(rows[-1].total):  # else `measure` has warned
            time, waits = simulate(case, compiled)
            rows[-1] = dataclasses.replace(rows[-1], warps=resident(case, compiled), simulated_ms=time, waits=waits)
    if arguments.json:
        for row in rows:
            more = {"total": row.total, "binding": row.binding, "ratio": row.ratio}
            print(json.dumps({**dataclasses.asdict(row), **more}))
        return
    print(f"sm_{arguments.capability}, {arguments.dtype}; rates of an H200; instructions a unit by kind\n")
    for line in simulated_table(rows) if arguments.simulate else counted_table(rows):
        print(line)


def counted_table(rows: list[Cost]) -> Iterator[str]:
    """Instructions, and the times that follow from them."""
    kinds = [*KINDS, "other"]
    columns = ["shape", "kernel", "registers", "stack", "shared", "unit", *kinds, "all"]
    columns += ["issue ms", "special ms", "matrix ms", "bytes ms", "binding", "ratio"]
    yield "| " + " | ".join(columns) + " |"
    yield "| --- " * len(columns) + "|"
    for row in rows:
        cells = [row.shape, row.kernel, row.registers, row.stack, row.shared, row.unit]
        cells += [f"{row.instructions.get(kind, 0):.2f}" for kind in kinds]
        cells += [f"{row.total:.2f}", *(f"{time:.3f}" for time in row.times.values()), row.binding, f"{row.ratio:.2f}"]
        yield "| " + " | ".join(map(str, cells)) + " |"


def simulated_table(rows: list[Cost]) -> Iterator[str]:
    """Times with all waiting, and the floors by counts."""
    yield "| shape | kernel | registers | warps | floor ms | simulated ms | a warp alone waits |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        reasons = ", ".join(f"{name} {share:.0%}" for name, share in row.waits.items())
        times = f"{max(row.times.values()):.3f} | {row.simulated_ms:.3f}"
        yield f"| {row.shape} | {row.kernel} | {row.registers} | {row.warps:.3g} | {times} | {reasons} |"


if __name__ == "__main__":
    main()
