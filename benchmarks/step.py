"""A whole training step (forward, backward, Adam): ours against the published recipe of baseline.py, in one run.

Every row of the Markdown table is measured in a process of its own, so that its peak memory is its own:

    python benchmarks/step.py [--repeats 7] [--configs x2_light,demo] [--profile DIR]

On a CPU all rows have one batch; "fp32 ranks" divides it evenly among at most a rank a core, which add up their
gradients, and counts the slowest. On a GPU every row has its own best one: batches double until the rate no longer
grows by 3 % or the memory is full. Seconds are the median, and in brackets the fastest, of the repeats after the
warm-up; the baseline gets one repeat on a CPU. CPU seconds are those of all threads, which other programs disturb less.
Memory is the largest resident size of the process, or what the GPU had allocated at most. The floor is the time that
the step's matrix products and convolutions take at the rate of a large matrix product of that precision.
"""

import argparse
import functools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mambair_ds.training.launch import Launch, share_cores

share_cores(Launch("python", 0, 0, 1, 1))  # as a run does, before torch

import baseline
import torch
import torch.distributed as dist
from torch import Tensor

from mambair_ds.config import RunConfig, load_config
from mambair_ds.kernels.philox import NoiseKey
from mambair_ds.models import build_model
from mambair_ds.training.losses import pixel_loss
from mambair_ds.training.optimizer import Adam

_T = TypeVar("_T")
CONFIGS = Path(__file__).parent.parent / "configs"
CPU_CASES = {"x2_light": (2, 64), "demo": (8, 32)}  # config: batch, side of the square LQ patches
GPU_CASES = {"x2": 64, "x2_light": 64, "denoise_50": 128}  # config: side
WAYS = {"cpu": ("baseline", "fp32", "fp32 ranks"), "cuda": ("baseline", "fp32", "bf16", "bf16 compiled", "bf16 graphs")}


@dataclass(frozen=True)
class Result:
    """What one process measured."""

    batch: int
    wall: list[float]
    cpu: list[float]
    peak_mib: float

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.batch / statistics.median(self.wall)


def measure(config: str, way: str, batch: int, side: int, repeats: int) -> Result:
    """Time steps of one way at one batch."""
    device, take = _ready(config, way, batch, side)
    wall, cpu = [], []
    warm_up = 1 if device.type == "cpu" else 3
    for step in range(repeats + warm_up):
        began, began_cpu = time.perf_counter(), time.process_time()
        take(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return Result(batch, wall[warm_up:], cpu[warm_up:], peak)


def measure_ranks(config: str, way: str, batch: int, side: int, repeats: int) -> Result:
    """`measure` with as many ranks as divide the batch and have a core each."""
    cores = len(os.sched_getaffinity(0))
    ranks = max(count for count in range(1, cores + 1) if batch % count == 0)
    pool = ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, pool:
        run = functools.partial(
            _measure_rank, f"file://{folder}/ranks", ranks, cores // ranks, config, way, batch // ranks, side
        )
        results = list(pool.map(run, range(ranks), [repeats] * ranks))
    wall = [max(walls) for walls in zip(*(one.wall for one in results), strict=True)]
    cpu = [sum(cpus) for cpus in zip(*(one.cpu for one in results), strict=True)]
    return Result(batch, wall, cpu, sum(one.peak_mib for one in results))


def _measure_rank(
    meeting: str, ranks: int, threads: int, config: str, way: str, batch: int, side: int, rank: int, repeats: int
) -> Result:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    return measure(config, way, batch, side, repeats)


def _average_gradients(model: torch.nn.Module) -> None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    sums = torch.split(together / dist.get_world_size(), [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(sums, gradients, strict=True)])


def profile(config: str, way: str, batch: int, side: int, folder: Path) -> None:
    """Write one step's time line (for ui.perfetto.dev) and the operators and kernels that take longest."""
    device, take = _ready(config, way, batch, side)
    for step in range(3):
        take(step)
    with torch.profiler.profile() as profiler:
        take(3)
        if device.type == "cuda":
            torch.cuda.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{config}-{way.replace(' ', '-')}-{batch}x{side}"
    profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
    table = profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=30)
    (folder / f"{name}.txt").write_text(table)


def _ready(config: str, way: str, batch: int, side: int) -> tuple[torch.device, Callable[[int], object]]:
    """The device, and what takes a step of one way on random pictures, by its number."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = load_config(CONFIGS / f"{config}.yml")
    torch.manual_seed(0)
    take = _ours(run, way, device) if way != "baseline" else _theirs(run, device)
    scale, channels = run.network.upscale, run.network.in_chans
    lq = torch.rand(batch, channels, side, side, device=device)
    gt = torch.rand(batch, channels, side * scale, side * scale, device=device)
    return device, lambda step: take(lq, gt, step)


def _theirs(run: RunConfig, device: torch.device) -> Callable[[Tensor, Tensor, int], object]:
    step = baseline.Step(run.network, run.train.optim, run.train.pixel_loss, device)
    return lambda lq, gt, _: step(lq, gt)


def _ours(run: RunConfig, way: str, device: torch.device) -> Callable[[Tensor, Tensor, int], object]:
    model = build_model(run.network).to(device).train()
    if way.endswith(("compiled", "graphs")):
        model.compile(mode="reduce-overhead" if way.endswith("graphs") else "default")
    optimizer = Adam(model.parameters(), run.train.optim, run.train.ema_decay)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=way.startswith("bf16"))

    def take(lq: Tensor, gt: Tensor, step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        if way.endswith("graphs"):
            torch.compiler.cudagraph_mark_step_begin()
        positions = torch.arange(step * len(lq), (step + 1) * len(lq), device=device)
        with mixed:
            output = model(lq, NoiseKey(0, positions))
        pixel_loss(run.train.pixel_loss, output, gt).backward()
        if dist.is_initialized():
            _average_gradients(model)
        optimizer.step()

    return take


def best_batch(config: str, way: str, side: int, repeats: int) -> Result | None:
    """The fastest of the batches 2, 4, 8, …; None if two do not fit."""
    best: Result | None = None
    for power in range(1, 9):
        try:
            result = _in_process(measure, config, way, 2**power, side, repeats)
        except torch.OutOfMemoryError:
            return best
        if best and result.rate < 1.03 * best.rate:
            return best if result.rate < best.rate else result
        best = result
    return best


def _in_process(run: Callable[..., _T], *arguments: object) -> _T:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    times = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(2 * side**3 / min(times))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7, help="steps timed of each")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a profile of every row there")
    parser.add_argument("--configs", help="some of the table's networks, separated by commas")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    cases = list(GPU_CASES if on_gpu else CPU_CASES)
    asked = arguments.configs.split(",") if arguments.configs else cases
    if unknown := set(asked) - set(cases):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(cases)}")

    where = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}, load {os.getloadavg()[0]:.1f}")
    print(f"The baseline's scan: {baseline.scan_name(device)}\n")
    print(
        "| network | LQ | step | batch | s a step | CPU s | samples/s | times baseline | MiB | MiB a sample | × floor |"
    )
    print("| --- " * 11 + "|")
    projected: list[str] = []
    for config in asked:
        run = load_config(CONFIGS / f"{config}.yml")
        network = run.network
        side = GPU_CASES[config] if on_gpu else CPU_CASES[config][1]
        reference: Result | None = None
        for way in WAYS[device.type]:
            if on_gpu:
                result = best_batch(config, way, side, arguments.repeats)
            else:
                repeats = 1 if way == "baseline" else arguments.repeats
                settings = config, way, CPU_CASES[config][0], side, repeats
                result = measure_ranks(*settings) if way.endswith("ranks") else _in_process(measure, *settings)
            if result is None:
                print(f"| {config} | {side}×{side} | {way} | two samples do not fit |{' - |' * 7}", flush=True)
                continue
            reference = result if way == "baseline" else reference
            dtype = torch.bfloat16 if "bf16" in way else torch.float32
            floor = baseline.step_flops(network, result.batch, side) / product_rate(dtype)
            cells = (
                config,
                f"{side}×{side}",
                way,
                str(result.batch),
                f"{statistics.median(result.wall):.3f} ({min(result.wall):.3f})",
                f"{min(result.cpu):.3f}",
                f"{result.rate:.4g}",
                f"{result.rate / reference.rate:.3g}" if reference else "-",
                f"{result.peak_mib:.0f}",
                f"{result.peak_mib / result.batch:.0f}",
                f"{min(result.wall) / floor:.2f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
            if arguments.profile and not way.endswith("ranks"):
                _in_process(profile, config, way, result.batch, side, arguments.profile)
            if run.task.kind == "denoise" and way != "baseline":
                total = run.train.total_iter * run.data.train.batch_size * 8
                projected.append(
                    f"{config}, {way}: {total:,} samples, as published, on 8 cards at {result.rate:.4g} a second each "
                    f"take {total / 8 / result.rate / 3600:.1f} h"
                )
    if projected:
        print("\n" + "\n".join(projected))


if __name__ == "__main__":
    main()
