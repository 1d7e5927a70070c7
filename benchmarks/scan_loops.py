"""The scan's backward pass on a CPU against two plain loops: ours, and one that indexes position by position.

    OMP_NUM_THREADS=1 python benchmarks/scan_loops.py BATCH LENGTH CHANNELS STATES

The second is written as mamba-ssm's reference is: every index has a gradient of the whole sequence's size.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambair_ds.kernels.selective_scan import selective_scan


def indexed(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """The scan, without order and prompt."""
    step = F.softplus(delta + bias)
    decay, drive = torch.exp(step[..., None] * A), (step * u)[..., None] * B[:, :, None]
    state, outputs = torch.zeros_like(drive[:, 0]), []
    for i in range(u.shape[1]):
        state = decay[:, i] * state + drive[:, i]
        outputs.append((state * C[:, i, None]).sum(-1))
    return torch.stack(outputs, 1) + u * D


def backward(scan: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, tuple[Tensor, ...]]:
    """CPU seconds, and the gradients."""
    y = scan(*inputs)
    began = time.process_time()
    gradients = torch.autograd.grad(y, inputs, y.detach())
    return time.process_time() - began, gradients


def main() -> None:
    """Print a row."""
    batch, length, channels, states = map(int, sys.argv[1:])
    torch.manual_seed(0)
    inputs = [torch.randn(batch, length, channels), 0.5 * torch.randn(batch, length, channels)]
    inputs.append(-torch.arange(1.0, states + 1).repeat(channels, 1))
    inputs += [torch.randn(batch, length, states), torch.randn(batch, length, states)]
    inputs += [torch.ones(channels), torch.full((channels,), -4.0)]
    inputs = [x.requires_grad_() for x in inputs]
    ours = statistics.median(backward(selective_scan, inputs)[0] for _ in range(12))
    loop, _ = backward(lambda *x: selective_scan(*x, backend="reference"), inputs)
    slow, expected = backward(indexed, inputs)
    for actual, right in zip(backward(selective_scan, inputs)[1], expected, strict=True):
        assert (actual - right).norm() <= 1e-4 * right.norm(), "a gradient is wrong"
    print(
        f"{batch}, {length}, {channels}, {states}: ours {1e3 * ours:.1f} ms, loop that takes apart {loop:.3f} s ",
        end="",
    )
    print(f"({loop / ours:.0f} times), loop that indexes {slow:.1f} s ({slow / ours:.0f} times)")


if __name__ == "__main__":
    main()
