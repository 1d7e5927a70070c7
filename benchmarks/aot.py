"""What the Triton kernels cost, without a GPU: compiled ahead of time, disassembled, counted.

`python benchmarks/aot.py [--capability 90] [--dtype bf16] [--shape base] [--operator selective_scan] [--json]` prints a
table, one row a kernel and shape: registers, spilled bytes and shared memory; the instructions a thread executes for
one unit of work, by kind; and the time that the issue of all instructions, the special functions alone, the matrix
units alone and the bytes alone would take on an H200. The largest of them binds; `ratio` is how much larger it is than
with the arithmetic that the algorithm needs and nothing else. Latency, occupancy and the load/store units are not
modelled: the times are floors.

An operator takes part by a file in benchmarks/cases/ whose `cases` returns its kernels for a shape of a network. Not
usable in a process where Triton's interpreter is on.
"""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path

from disassembly import KINDS, SHAPES, measure

OPERATORS = sorted(path.stem for path in (Path(__file__).parent / "cases").glob("[a-z]*.py"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10 (default 90)")
    parser.add_argument("--dtype", default="bf16", help="of the activations, bf16 or fp32 (default bf16)")
    parser.add_argument("--shape", choices=SHAPES, help="one shape instead of all")
    parser.add_argument("--operator", choices=OPERATORS, help="one operator instead of all")
    parser.add_argument("--json", action="store_true", help="one JSON object a kernel instead of the table")
    arguments = parser.parse_args()
    rows = [
        measure(case, shape, arguments.capability)
        for shape in ([arguments.shape] if arguments.shape else SHAPES)
        for operator in ([arguments.operator] if arguments.operator else OPERATORS)
        for case in importlib.import_module(f"cases.{operator}").cases(SHAPES[shape], arguments.dtype)
    ]
    if arguments.json:
        for row in rows:
            more = {"total": row.total, "binding": row.binding, "ratio": row.ratio}
            print(json.dumps({**dataclasses.asdict(row), **more}))
        return
    kinds = [*KINDS, "other"]
    print(f"sm_{arguments.capability}, {arguments.dtype}; rates of an H200; instructions a unit by kind\n")
    columns = ["shape", "kernel", "registers", "stack", "shared", "unit", *kinds, "all"]
    columns += ["issue ms", "special ms", "matrix ms", "bytes ms", "binding", "ratio"]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    for row in rows:
        cells = [row.shape, row.kernel, row.registers, row.stack, row.shared, row.unit]
        cells += [f"{row.instructions.get(kind, 0):.2f}" for kind in kinds]
        cells += [f"{row.total:.2f}", *(f"{time:.3f}" for time in row.times.values()), row.binding, f"{row.ratio:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
