"""What a GPU reaches at most, measured: the rates that the operators' floors are made of."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

CHAIN, TURNS, BLOCK = 64, 64, 1024


@triton.jit
def repeat(out, a, b, SPECIAL: tl.constexpr, CHAIN: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x = 2^-x or x = a·x + b, CHAIN·TURNS times in every element's register."""
    place = tl.arange(0, BLOCK)
    x = place * 1e-3
    for _turn in range(TURNS):
        for _link in tl.static_range(CHAIN):
            x = tl.exp2(-x) if SPECIAL else x * a + b
    tl.store(out + tl.program_id(0) * BLOCK + place, x)


@dataclass(frozen=True)
class Rates:
    """A second's worth of each."""

    bandwidth: float
    """Bytes of a large copy, those read and those written."""
    floats: float
    """Multiply-adds of float32, the product and the sum counted as one."""
    special: float
    """Exponentials base 2."""
    matrix: float
    """Floating-point operations of a bfloat16 matrix product."""


def measure_rates() -> Rates:
    """The rates of the current CUDA device; about a second."""
    programs = 64 * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    out = torch.empty(programs * BLOCK, device="cuda")
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()

    def chain(special: bool) -> float:
        return _seconds(lambda: repeat[(programs,)](out, 0.5, 1.5, special, CHAIN, TURNS, BLOCK))

    work = out.numel() * CHAIN * TURNS
    copy, product = _seconds(lambda: target.copy_(source)), _seconds(lambda: a @ b)
    return Rates(8 * source.numel() / copy, work / chain(False), work / chain(True), 2 * 8192**3 / product)


def _seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[2:])
