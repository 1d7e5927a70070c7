"""The selective scan's CPU backend against the plain loop, forward and backward: `python benchmarks/scan.py`."""

import time

import torch

from mambair_ds.kernels.selective_scan import selective_scan

SHAPES = {"light ×2, batch 2": (2, 4096, 48, 8), "Base ×2, batch 1": (1, 4096, 348, 16)}


def measure(backend: str, shape: tuple[int, int, int, int], repeats: int) -> tuple[float, float]:
    """The best of `repeats` times, in seconds, of a forward and a backward pass at (B, L, D, N)."""
    batch, length, channels, states = shape
    u, delta = torch.randn(batch, length, channels), 0.5 * torch.randn(batch, length, channels)
    A = -torch.arange(1, states + 1.0).expand(channels, -1)
    B, C = torch.randn(batch, length, states), torch.randn(batch, length, states)
    D, bias = torch.ones(channels), torch.randn(channels) - 4
    inputs = [x.clone().requires_grad_() for x in (u, delta, A, B, C, D, bias)]
    u, delta, A, B, C, D, bias = inputs
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        y = selective_scan(u, delta, A, B, C, D, bias, backend=backend)
        middle = time.perf_counter()
        torch.autograd.grad(y, inputs, torch.ones_like(y))
        times.append((middle - start, time.perf_counter() - middle))
    forward, backward = zip(*times, strict=True)
    return min(forward), min(backward)


def main() -> None:
    """Print a Markdown table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| shape | backend | forward ms | backward ms | times faster (both) |")
    print("| --- | --- | --- | --- | --- |")
    for name, shape in SHAPES.items():
        slow = measure("reference", shape, 1)
        fast = measure("torch", shape, 10)
        for backend, (forward, backward) in (("reference", slow), ("torch", fast)):
            ratio = sum(slow) / (forward + backward)
            print(f"| {name} {shape} | {backend} | {forward * 1e3:.1f} | {backward * 1e3:.1f} | {ratio:.0f} |")


if __name__ == "__main__":
    main()
