"""What the Triton kernels cost, without a GPU: compiled ahead of time, disassembled, counted.

`python benchmarks/aot.py [--capability 90] [--dtype bf16] [--shape base] [--operator selective_scan] [--json]` prints a
table, one row a kernel and shape: registers, spilled bytes and shared memory; the instructions a thread executes for
one unit of work, by kind; and the time that the issue of all instructions, the special functions alone, the matrix
units alone and the bytes alone would take on an H200. The largest of them binds; `ratio` is how much larger it is than
with the arithmetic that the algorithm needs and nothing else. These times are floors. With `--simulate` the rows say
instead what `simulation.py` makes of the code: the warps a multiprocessor runs at once, the time with all waiting, and
what a warp alone waits for.

An operator takes part by a file in benchmarks/cases/ whose `cases` returns its kernels for a shape of a network. Not
usable in a process where Triton's interpreter is on.
"""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path

from disassembly import KINDS, SHAPES, Case, Cost, compile_kernel, measure
from simulation import resident, simulate

OPERATORS = sorted(path.stem for path in (Path(__file__).parent / "cases").glob("[a-z]*.py"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10 (default 90)")
    parser.add_argument("--dtype", default="bf16", help="of the activations, bf16 or fp32 (default bf16)")
    parser.add_argument("--shape", choices=SHAPES, help="one shape instead of all")
    parser.add_argument("--operator", choices=OPERATORS, help="one operator instead of all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object a kernel instead of the table")
    how.add_argument("--simulate", action="store_true", help="times with all waiting, on an H200's multiprocessors")
    arguments = parser.parse_args()
    if arguments.simulate and arguments.capability != 90:
        parser.error("--simulate knows capability 90 alone")
    cases = [
        (shape, case)
        for shape in ([arguments.shape] if arguments.shape else SHAPES)
        for operator in ([arguments.operator] if arguments.operator else OPERATORS)
        for case in importlib.import_module(f"cases.{operator}").cases(SHAPES[shape], arguments.dtype)
    ]
    if arguments.simulate:
        print_simulated(cases)
        return
    rows = [measure(case, shape, compile_kernel(case, arguments.capability)) for shape, case in cases]
    if arguments.json:
        for row in rows:
            more = {"total": row.total, "binding": row.binding, "ratio": row.ratio}
            print(json.dumps({**dataclasses.asdict(row), **more}))
    else:
        print(f"sm_{arguments.capability}, {arguments.dtype}; rates of an H200; instructions a unit by kind\n")
        print_counted(rows)


def print_counted(rows: list[Cost]) -> None:
    """The table of instructions and of the times that follow from them."""
    kinds = [*KINDS, "other"]
    columns = ["shape", "kernel", "registers", "stack", "shared", "unit", *kinds, "all"]
    columns += ["issue ms", "special ms", "matrix ms", "bytes ms", "binding", "ratio"]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    for row in rows:
        cells = [row.shape, row.kernel, row.registers, row.stack, row.shared, row.unit]
        cells += [f"{row.instructions.get(kind, 0):.2f}" for kind in kinds]
        cells += [f"{row.total:.2f}", *(f"{time:.3f}" for time in row.times.values()), row.binding, f"{row.ratio:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


def print_simulated(cases: list[tuple[str, Case]]) -> None:
    """The table of times with all waiting; a kernel's counts are those of its floor."""
    print("| shape | kernel | registers | warps | floor ms | simulated ms | a warp alone waits |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape, case in cases:
        compiled = compile_kernel(case, 90)
        cost = measure(case, shape, compiled)
        time, waits = simulate(case, compiled)
        reasons = ", ".join(f"{name} {share:.0%}" for name, share in waits.items())
        cells = f"{shape} | {case.name} | {compiled.registers} | {resident(case, compiled):.3g}"
        print(f"| {cells} | {max(cost.times.values()):.3f} | {time:.3f} | {reasons} |", flush=True)


if __name__ == "__main__":
    main()
