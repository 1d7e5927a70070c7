"""A kernel's settings, one after the other: simulated, and timed where there is a GPU.

    python benchmarks/variants.py selective_scan UNROLL.ends=2,4,8 REGISTERS=208,232 [--shape base]

A setting is a constant of mambair_ds/kernels/OPERATOR/triton.py, or what a dictionary there has for a key; all
combinations of the values are built. The first line is the code as it is. Without a GPU the times are those of
`simulation.py`; with one, medians of what its profiler says of the operator's jobs, whose values are compared first.
"""

import argparse
import ast
import functools
import importlib
import itertools
import operator
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from aot import OPERATORS as KERNELS
from disassembly import SHAPES, compile_kernel
from jobs import OPERATORS, Maker
from operators import FLUSH, measure
from simulation import simulate

JOBS = {
    "selective_scan": ["scan"],
    "window_attention": ["attention"],
    "routing": ["routing"],
    "philox": ["routing"],
    "depthwise_conv": ["depthwise-5x5", "depthwise-3x3"],
    "linear": ["linear-qkv", "linear-gelu", "linear-add"],
}
"""The jobs that run an operator's kernels."""


@contextmanager
def changed(module: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """The module with other settings."""
    before: list[tuple[dict[int | str, Any], int | str, Any]] = []
    try:
        for name, value in settings.items():
            *keys, last = (int(key) if key.isdigit() else key for key in name.split("."))
            place = functools.reduce(operator.getitem, keys, cast(Any, vars(module)))
            before.append((place, last, place[last]))
            place[last] = value
        yield
    finally:
        for place, last, value in reversed(before):
            place[last] = value


def simulated(folder: str, shape: str) -> dict[str, float]:
    """Milliseconds by kernel of a folder; one that spills registers says how many bytes."""
    times: dict[str, float] = {}
    for case in importlib.import_module(f"cases.{folder}").cases(SHAPES[shape], "bf16", 90):
        compiled = compile_kernel(case, 90)
        spilled = f" ({compiled.stack} bytes spilled)" if compiled.stack else ""
        times[case.name + spilled] = simulate(case, compiled)[0]
    return times


def timed(folder: str, shape: str) -> dict[str, float]:
    """Milliseconds by job, pass and kernel, from a GPU.

    Raises:
        ValueError: a job's values are wrong.
    """
    flush = torch.empty(FLUSH, device="cuda")
    times: dict[str, float] = {}
    for name in JOBS[folder]:
        job = OPERATORS[name](SHAPES[shape], Maker("cuda", torch.bfloat16), None)
        job.peers.clear()
        row = measure(shape, name, job, flush, 0.05)
        if row.state != "ok":
            raise ValueError(f"{name}: {row.state}")
        for which, kernels in row.kernels.items():
            times |= {f"{name} {which} {kernel[:40]}": time for kernel, time in kernels.items() if time >= 1e-3}
        times |= {f"{name} forward": row.times["ours"][0], f"{name} backward": row.times["ours"][1]}
    return times


def main() -> int:
    """Print a table; 1 if a variant could not be built or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", choices=KERNELS)
    parser.add_argument("settings", nargs="+", metavar="NAME=VALUE,VALUE")
    parser.add_argument("--shape", choices=SHAPES, default="base")
    options = parser.parse_args()
    module = importlib.import_module(f"mambair_ds.kernels.{options.operator}.triton")
    names, values = zip(*(setting.split("=") for setting in options.settings), strict=True)
    choices = [[ast.literal_eval(value) for value in listed.split(",")] for listed in values]
    run = timed if torch.cuda.is_available() else simulated
    baseline = run(options.operator, options.shape)
    print(f"{options.shape}, ms {'timed' if run is timed else 'simulated'}\n\n| settings | kernel | ms | of before |")
    print("| --- | --- | --- | --- |")
    failed = False
    for combination in [None, *itertools.product(*choices)]:
        settings = {} if combination is None else dict(zip(names, combination, strict=True))
        title = ", ".join(f"{name} {value}" for name, value in settings.items()) or "as it is"
        try:
            with changed(module, settings):
                times = run(options.operator, options.shape) if settings else baseline
        except Exception as error:  # the other variants are still worth their time
            print(f"| {title} | {' '.join(repr(error).split())[:200]} | | |", flush=True)
            failed = True
            continue
        for kernel, time in times.items():
            if settings and time == baseline.get(kernel):
                continue  # has nothing to do with these settings
            ratio = f"{time / baseline[kernel]:.2f}" if kernel in baseline else ""
            print(f"| {title} | {kernel} | {time:.3f} | {ratio} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
