"""A whole training step (forward, backward, Adam) of two networks, with the fast scan and with the reference scan.

Every row of the Markdown table is measured in a process of its own, so that its peak memory is its own:

    python benchmarks/step.py [--repeats 7]

Seconds are the median, and in brackets the fastest, of the repeats after one step of warm-up; the reference scan gets
one repeat. CPU seconds are those of all threads, which other programs on the machine disturb less. Memory is the
largest resident size of the process, or what the GPU had allocated at most.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# A thread that waits must not hold the core that the one it waits for needs; read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from mambair_ds.config import load_config
from mambair_ds.kernels.philox import NoiseKey
from mambair_ds.models import build_model

CONFIGS = Path(__file__).parent.parent / "configs"
CASES = {"x2_light": (2, 64), "demo": (8, 32)}  # config: batch, side of the square LQ patches


def measure(config: str, backend: str | None, repeats: int) -> tuple[list[float], list[float], float]:
    """Wall and CPU seconds of every repeat, and the peak memory in MiB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, side = CASES[config]
    network = load_config(CONFIGS / f"{config}.yml").network
    torch.manual_seed(0)
    model = build_model(network, scan_backend=backend).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-4)
    lq = torch.rand(batch, network.in_chans, side, side, device=device)
    gt = torch.rand(batch, network.in_chans, side * network.upscale, side * network.upscale, device=device)
    wall, cpu = [], []
    for step in range(repeats + 1):
        began, began_cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        noise = NoiseKey(0, torch.arange(step * batch, (step + 1) * batch))
        (model(lq, noise) - gt).abs().mean().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return wall[1:], cpu[1:], peak


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7, help="steps timed with the fast scan")
    arguments = parser.parse_args()

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}, float32\n")
    print("| network | batch of LQ patches | scan | s a step | CPU s a step | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    context = multiprocessing.get_context("spawn")
    for config, (batch, side) in CASES.items():
        for backend, repeats in (("reference", 1), (None, arguments.repeats)):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                wall, cpu, peak = pool.submit(measure, config, backend, repeats).result()
            seconds = f"{statistics.median(wall):.3f} ({min(wall):.3f})"
            cells = (config, f"{batch} × {side}×{side}", backend or "fast", seconds, f"{min(cpu):.3f}", f"{peak:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
