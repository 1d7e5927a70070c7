"""The step on GPUs: one kernel over all tensors, which it finds by a table of their addresses."""

# mypy: disable-error-code="no-untyped-def"

import functools
import itertools
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.adam import Rule, Tensors

BLOCK = 1024
"""Elements of a program."""
WARPS = 4


@triton.jit(do_not_specialize=["tensors"])  # one kernel for any number of them
def step_blocks(
    addresses, blocks, corrections, skipped, tensors, lr, share1, share2, eps, weight_decay, share,
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one tensor. `addresses` is (5, tensors) int64: of weights, gradients, both moments and means.

    `blocks` is (programs, 3) int64: tensor, first element, elements of the tensor; `corrections` the two 1 - β^t;
    the shares are 1 - β1, 1 - β2 and 1 - decay.
    """
    block = blocks + tl.program_id(0) * 3
    tensor, first, size = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    if skipped is not None:
        size = tl.where(tl.load(skipped) == 0.0, size, 0)
    pointer = tl.pointer_type(tl.float32)
    element = first + tl.arange(0, BLOCK)
    inside = element < size
    weights = tl.load(addresses + tensor).to(pointer) + element
    gradients = tl.load(addresses + tensors + tensor).to(pointer) + element
    exp_avgs = tl.load(addresses + 2 * tensors + tensor).to(pointer) + element
    exp_avg_sqs = tl.load(addresses + 3 * tensors + tensor).to(pointer) + element
    means = tl.load(addresses + 4 * tensors + tensor).to(pointer) + element
    weight, mean = tl.load(weights, mask=inside), tl.load(means, mask=inside)
    g, m, v = tl.load(gradients, mask=inside), tl.load(exp_avgs, mask=inside), tl.load(exp_avg_sqs, mask=inside)
    if DECOUPLED:
        weight -= lr * weight_decay * weight
    else:
        g += weight_decay * weight
    m += share1 * (g - m)
    v += share2 * (g * g - v)
    root = tl.sqrt_rn(v) / tl.sqrt_rn(tl.load(corrections + 1))
    weight -= lr / tl.load(corrections) * m / (root + eps)
    tl.store(weights, weight, mask=inside)
    tl.store(exp_avgs, m, mask=inside)
    tl.store(exp_avg_sqs, v, mask=inside)
    tl.store(means, mean + share * (weight - mean), mask=inside)


def _copy(numbers: Iterable[int | float], dtype: torch.dtype, device: torch.device) -> Tensor:
    table = torch.tensor(tuple(numbers), dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


_table = functools.lru_cache(maxsize=64)(_copy)
"""Numbers on the device; a step's are mostly those of the step before."""


@functools.lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    starts = ((i, first, size) for i, size in enumerate(sizes) for first in range(0, size, BLOCK))
    return _copy(itertools.chain.from_iterable(starts), torch.int64, device)


def adam_step(tensors: Tensors, rule: Rule, skipped: Tensor | None) -> None:
    """See `mambair_ds.kernels.adam.adam_step`."""
    groups = (tensors.weights, tensors.gradients, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.means)
    for tensor in (*tensors.weights, *tensors.gradients):  # the others are made like the weights
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"adam: a tensor is {tensor.dtype} in {tensor.stride()}, expected contiguous float32")
    device = tensors.weights[0].device
    with torch.cuda.device_of(tensors.weights[0]):
        addresses = _table(tuple(x.data_ptr() for group in groups for x in group), torch.int64, device)
        blocks = _blocks(tuple(x.numel() for x in tensors.weights), device)
        torch._foreach_add_(tensors.steps, 1.0 if skipped is None else 1 - skipped)
        powers = _table(rule.betas, torch.float64, device) ** tensors.steps[0].double()
        step_blocks[len(blocks) // 3,](
            addresses, blocks, (1 - powers).float(), skipped, len(tensors.weights),
            rule.lr, 1 - rule.betas[0], 1 - rule.betas[1], rule.eps, rule.weight_decay, 1 - rule.decay,
            DECOUPLED=rule.decoupled, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
