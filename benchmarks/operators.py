"""Every operator of the network, forward and backward: its floor, ours, and what it replaces.

    python benchmarks/operators.py [--device cuda] [--shapes base,light] [--operators scan,routing] [--mamba-sdist DIR]

Ours is first compared with the published sequence in float32, values and gradients; a wrong one is not timed, and the
exit code is 1. Times are medians, ours and the peers' taking turns: on a GPU with cold caches and a queue so full that
launching is no part of them, on a CPU the time of all threads, which others disturb less. A floor is the longest
of bytes over a copy's bandwidth and operations, exponentials and matrix products over their rates, all measured in the
same run. Kept is what autograd saves besides the inputs. GPUs compute in bfloat16, CPUs in float32 and smaller batches.
"""

import argparse
import functools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from mambair_ds.training.launch import Launch, share_cores

share_cores(Launch("python", 0, 0, 1, 1))  # as a run does, before torch

import mamba_ssm_peer
import torch
import triton
from disassembly import SHAPES
from jobs import OPERATORS, Job, Maker, Side, Tensors, Work
from rates import Rates, measure_rates
from torch import Tensor

CPU_SHAPES = {"light": replace(SHAPES["light"], batch=2), "base": replace(SHAPES["base"], batch=1)}
CPU_JOBS = [*(("light", operator) for operator in OPERATORS), ("base", "scan")]
"""What a CPU does unless asked for more; Base's other operators take minutes."""
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""How far a tensor of ours may be off, relative to its norm."""
FLUSH, QUEUE = 2**28, 8
"""Float32 numbers that push all else out of the cache; how often they are written while the queue fills."""

TARGETS = {
    "scan": ("mamba-ssm", 2.0),
    "depthwise-5x5": ("published", 5.0),
    "depthwise-3x3": ("published", 5.0),
    "routing": ("published", 5.0),
    "attention": ("published", 3.0),
}
"""How many times faster than which peer ours must be on an H200, forward and backward together."""
SHARES = {"scan": ("floor", 0.5), "depthwise-5x5": ("bandwidth", 0.6), "depthwise-3x3": ("bandwidth", 0.6)}
"""What share of its floor, or of a copy's bandwidth, ours must reach there."""
CPU_TARGET = 100
"""How many times faster than the reference loop's the scan's backward pass must be on a CPU."""


@dataclass
class Row:
    """Results; pairs are forward and backward, times in ms, memory in bytes."""

    shape: str
    operator: str
    state: str = "ok"
    """Or what was wrong."""
    errors: dict[str, float] = field(default_factory=dict)
    """Of each output and gradient, relative to its norm."""
    floor: tuple[float, float] | None = None
    bandwidth: tuple[float, float] | None = None
    """The floor by the bytes alone."""
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By side: "ours" and the peers' names."""
    kept: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    """Allocated at most in both passes, besides the inputs; CUDA only."""
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the GPU ran for ours in the pass "forward" or "backward", and how long; CUDA only."""


def leaves(inputs: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """The same numbers, in another dtype if one is given, each to be differentiated."""
    real = {name: x.is_floating_point() for name, x in inputs.items()}
    return {name: x.detach().to(dtype if real[name] else None).requires_grad_(real[name]) for name, x in inputs.items()}


def forward(function: Callable[..., Any], inputs: Tensors) -> tuple[Tensor, ...]:
    """All outputs, in a tuple."""
    result = function(**inputs)
    return (result,) if isinstance(result, Tensor) else result


def backward(outputs: tuple[Tensor, ...], inputs: Tensors, grads: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of all inputs that have one."""
    smooth = [y for y in outputs if y.requires_grad]
    return torch.autograd.grad(smooth, [x for x in inputs.values() if x.requires_grad], grads)


def errors(job: Job) -> dict[str, float]:
    """How far outputs and gradients at full size are off, relative to their norms, for the last two samples.

    The gradient that flows in is zero for the others, so that the parameters' gradients can be compared too.
    """
    last, inputs = slice(-2, None), leaves(job.ours.inputs)
    part = leaves({name: x[last] if name in job.activations else x for name, x in inputs.items()}, torch.float32)
    actual, expected = forward(job.ours.function, inputs), forward(job.expected, part)
    grads = [torch.zeros_like(y) for y in actual if y.requires_grad]
    for grad, y in zip(grads, (y for y in actual if y.requires_grad), strict=True):
        grad[last] = y.detach()[last]
    ours, theirs = backward(actual, inputs, grads), backward(expected, part, [grad[last].float() for grad in grads])
    pairs = {f"output {i}": (y[last], z) for i, (y, z) in enumerate(zip(actual, expected, strict=True))}
    names = [name for name, x in inputs.items() if x.requires_grad]
    for name, y, z in zip(names, ours, theirs, strict=True):
        pairs[f"gradient of {name}"] = y[last] if name in job.activations else y, z
    return {name: ((y.double() - z.double()).norm() / z.double().norm()).item() for name, (y, z) in pairs.items()}


def timed(run: Callable[[], Any], flush: Tensor | None) -> tuple[float, Any]:
    """Milliseconds, and the result; by the GPU's clock if there is a cache to flush, else of all threads."""
    if flush is None:
        began = time.process_time()
        result = run()
        return 1e3 * (time.process_time() - began), result
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(QUEUE):
        flush.zero_()
    flush.sum()  # leaves nothing in the cache that would have to be written back
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


def time_once(side: Side, inputs: Tensors, flush: Tensor | None) -> tuple[float, float]:
    """Forward and backward; the gradient that flows in is the output."""
    there, outputs = timed(lambda: forward(side.function, inputs), flush)
    grads = [y.detach() for y in outputs if y.requires_grad]
    return there, timed(lambda: backward(outputs, inputs, grads), flush)[0]


def time_sides(sides: list[Side], flush: Tensor | None, seconds: float) -> dict[str, tuple[float, float]]:
    """Medians of at least five runs in turns, for `seconds`; one run of what is too slow."""
    inputs = {side.name: leaves(side.inputs) for side in sides}
    slow, sides = [side for side in sides if side.once], [side for side in sides if not side.once]
    times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for side in 2 * sides:  # warm up
        time_once(side, inputs[side.name], flush)
    began = time.perf_counter()
    while len(times[sides[0].name]) < 5 or time.perf_counter() < began + seconds:
        for side in sides:
            times[side.name].append(time_once(side, inputs[side.name], flush))
    times |= {side.name: [time_once(side, inputs[side.name], flush)] for side in slow}
    return {
        name: (statistics.median(there), statistics.median(back))
        for name, (there, back) in ((name, zip(*runs, strict=True)) for name, runs in times.items())
    }


def time_kernels(side: Side, flush: Tensor) -> dict[str, dict[str, float]]:
    """What the GPU runs in each pass, with cold caches, in ms: medians of three runs."""
    inputs = leaves(side.inputs)
    runs: dict[str, list[dict[str, float]]] = {"forward": [], "backward": []}

    def profiled(name: str, run: Callable[[], Any]) -> Any:
        flush.zero_()
        flush.sum()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            result = run()
            torch.cuda.synchronize()
        times: dict[str, float] = defaultdict(float)
        for event in profiler.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                times[event.name] += event.time_range.elapsed_us() / 1e3
        runs[name].append(times)
        return result

    for _ in range(3):
        outputs = profiled("forward", lambda: forward(side.function, inputs))
        grads = [y.detach() for y in outputs if y.requires_grad]
        profiled("backward", functools.partial(backward, outputs, inputs, grads))
    return {
        name: {kernel: statistics.median(run.get(kernel, 0.0) for run in three) for kernel in three[0]}
        for name, three in runs.items()
    }


def memory(side: Side) -> tuple[int, int | None]:
    """Bytes kept between the passes, and at the peak."""
    inputs, kept = leaves(side.inputs), {}
    cuda = next(iter(inputs.values())).is_cuda
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # an output that kept itself would never be freed

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = forward(side.function, inputs)
    backward(outputs, inputs, [y.detach() for y in outputs if y.requires_grad])
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    return sum(size for place, size in kept.items() if place not in given), peak


def floor(work: Work, tokens: int, rates: Rates) -> tuple[float, float]:
    """The floor in ms, and that by the bytes alone."""
    moved = (2 * work.values + 8 * work.indices) / rates.bandwidth
    arithmetic = work.floats / rates.floats, work.special / rates.special, work.matrix / rates.matrix
    return 1e3 * tokens * max(moved, *arithmetic), 1e3 * tokens * moved


def measure(shape: str, operator: str, job: Job, flush: Tensor | None, seconds: float) -> Row:
    """Compare; if right, time and weigh."""
    row = Row(shape, operator, errors=errors(job))
    bound = BOUNDS[next(x.dtype for x in job.ours.inputs.values() if x.is_floating_point())]
    off = {name: error for name, error in row.errors.items() if not error <= bound}
    if off:
        row.state = "WRONG: " + ", ".join(f"{name} off by {error:.1e}" for name, error in off.items())
        return row
    row.times = time_sides([job.ours, *job.peers], flush, seconds)
    row.kernels = {} if flush is None else time_kernels(job.ours, flush)
    for side in (job.ours, *(peer for peer in job.peers if not peer.once)):
        row.kept[side.name], peak = memory(side)
        row.peak |= {} if peak is None else {side.name: peak}
    return row


def hardware(device: str) -> str:
    """What it ran on, in one line."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        return f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}, {versions}, bfloat16"
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(": ")[1] for line in described.splitlines() if line.startswith("model name")), "CPU")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model} ({capability}), {torch.get_num_threads()} threads, {versions}, float32"


def table(rows: list[Row]) -> list[str]:
    """Markdown, a line for each operator, shape and peer."""
    head = ["shape", "operator", "floor ms", "ours ms", "of floor", "peer", "peer ms", "times faster"]
    head += ["kept MiB, ours", "peer", "peak MiB, ours", "peer"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]

    def pair(times: tuple[float, float] | None) -> str:
        return "–" if times is None else f"{times[0]:.3g} + {times[1]:.3g}"

    def size(sizes: dict[str, int], name: str) -> str:
        return f"{sizes[name] / 2**20:.1f}" if name in sizes else "–"

    for row in rows:
        if row.state != "ok":
            lines.append(f"| {row.shape} | {row.operator} | {row.state} {'| ' * (len(head) - 2)}|")
        for peer in [name for name in row.times if name != "ours"]:
            ours, theirs = row.times["ours"], row.times[peer]
            share = "–" if row.floor is None else f"{sum(row.floor) / sum(ours):.0%}"
            faster = f"{sum(theirs) / sum(ours):.1f} ({theirs[0] / ours[0]:.1f}, {theirs[1] / ours[1]:.1f})"
            cells = [row.shape, row.operator, pair(row.floor), pair(ours), share, peer, pair(theirs), faster]
            cells += [size(sizes, name) for sizes in (row.kept, row.peak) for name in ("ours", peer)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def kernel_table(rows: list[Row]) -> list[str]:
    """Markdown, a line for each of our kernels and what PyTorch runs beside them; what takes under 1 us is left out."""
    lines = ["| shape | operator | pass | kernel | ms |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row.shape} | {row.operator} | {name} | {kernel[:60]} | {time:.3f} |"
        for row in rows
        for name, times in row.kernels.items()
        for kernel, time in sorted(times.items(), key=lambda item: -item[1])
        if time >= 1e-3
    ]
    return [*lines, ""] if len(lines) > 2 else []


def judge(rows: list[Row], device: str) -> list[str]:
    """A line for every target: what was asked, what was reached."""
    lines = []

    def add(row: Row, what: str, reached: float, asked: float) -> None:
        verdict = "met" if reached >= asked else "not met"
        lines.append(f"- {row.shape} {row.operator}: {what} {reached:.3g}, target {asked:g}: {verdict}")

    for row in (row for row in rows if row.state == "ok"):
        ours = row.times["ours"]
        peer, times = TARGETS.get(row.operator, ("", 0.0))
        of, share = SHARES.get(row.operator, ("", 0.0))
        least = {"floor": row.floor, "bandwidth": row.bandwidth}.get(of)
        if device == "cuda" and peer in row.times:
            add(row, f"times faster than {peer}:", sum(row.times[peer]) / sum(ours), times)
        if device == "cuda" and least is not None:
            add(row, f"share of the {of}:", sum(least) / sum(ours), share)
        if device == "cpu" and row.operator == "scan":
            loop = row.times["reference loop"][1] / ours[1]
            add(row, "backward, times faster than the reference loop:", loop, CPU_TARGET)
    return lines


def main(arguments: list[str]) -> int:
    """Measure what is asked for and write operators.json and operators.md; 0 if all of it was right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", type=lambda names: names.split(","), help=f"of {','.join(SHAPES)}")
    parser.add_argument("--operators", type=lambda names: names.split(","), help=f"of {','.join(OPERATORS)}")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the runs of one operator at one shape")
    parser.add_argument("--mamba-sdist", type=Path, help="unpacked source of mamba-ssm, to build its scan from")
    options = parser.parse_args(arguments)

    cuda = options.device == "cuda"
    shapes = SHAPES if cuda else CPU_SHAPES
    jobs = [(shape, operator) for shape in shapes for operator in OPERATORS] if cuda or options.shapes else CPU_JOBS
    for asked, there in ((options.shapes, shapes), (options.operators, OPERATORS)):
        if unknown := set(asked or ()) - set(there):
            parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    jobs = [(shape, operator) for shape, operator in jobs if shape in (options.shapes or shapes)]
    jobs = [(shape, operator) for shape, operator in jobs if operator in (options.operators or OPERATORS)]

    facts = [hardware(options.device), f"`python benchmarks/operators.py {shlex.join(arguments)}`"]
    rates = flush = mamba = None
    if cuda:
        rates, flush, mamba = (
            measure_rates(),
            torch.empty(FLUSH, device="cuda"),
            mamba_ssm_peer.load(options.mamba_sdist),
        )
        facts.append(f"copy {rates.bandwidth / 1e12:.2f} TB/s, {rates.floats / 1e12:.1f}e12 multiply-adds/s, ")
        facts[-1] += f"{rates.special / 1e12:.2f}e12 exponentials/s, matrix products {rates.matrix / 1e12:.0f} TFLOP/s"
        facts.append(f"mamba-ssm's scan: {mamba if isinstance(mamba, str) else 'measured'}")
    print("\n\n".join(facts), flush=True)

    rows = []
    for shape, operator in jobs:
        try:
            make = Maker(options.device, torch.bfloat16 if cuda else torch.float32)
            job = OPERATORS[operator](shapes[shape], make, mamba if isinstance(mamba, ModuleType) else None)
            row = measure(shape, operator, job, flush, options.seconds)
            if rates is not None:
                tokens = shapes[shape].batch * shapes[shape].length
                floors = [floor(work, tokens, rates) for work in (job.forward, job.backward)]
                row.floor, row.bandwidth = ((floors[0][i], floors[1][i]) for i in range(2))
        except Exception as error:  # the others are still worth their time
            traceback.print_exc()
            row = Row(shape, operator, "FAILED: " + " ".join(repr(error).split())[:200])
        rows.append(row)
        print(f"{shape} {operator}: {row.state} {row.times}", flush=True)

    report = "\n".join(
        ["\n\n".join(facts), "", *table(rows), "", *kernel_table(rows), *judge(rows, options.device), ""]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "operators.md").write_text(report)
    results = {"facts": facts, "rates": rates and asdict(rates), "rows": [asdict(row) for row in rows]}
    (options.out / "operators.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{report}")
    return int(any(row.state != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
