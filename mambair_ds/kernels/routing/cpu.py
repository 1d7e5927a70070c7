"""Routing on the CPU: loops compiled by numba.

Results are equal to the bit on any number of threads, and a sample's do not depend on its batch: tasks are the same
whatever their number, and the table's gradient is summed in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"

import functools

import numpy as np
import torch
from torch import Tensor

from mambair_ds.kernels.cpu import jit, jit_reassociating, run_tasks
from mambair_ds.kernels.routing.operator import make_operators
from mambair_ds.kernels.selective_scan.cpu import exp2

TOKENS = 512

_LOG2E = np.float32(1.4426950408889634)


def choose(logits: Tensor) -> Tensor:
    """See `make_operators`. PyTorch's own: its softmax decides which probabilities are equal."""
    return logits.softmax(-1).argmax(-1)


@jit
def _order(sample, index, classes, order, inverse):
    classes_of = index[sample]
    place = np.zeros(classes + 1, np.int64)
    for i in range(len(classes_of)):
        place[classes_of[i] + 1] += 1
    for t in range(classes):
        place[t + 1] += place[t]
    for i in range(len(classes_of)):
        k = place[classes_of[i]]
        place[classes_of[i]] += 1
        order[sample, k] = i
        inverse[sample, i] = k


def order(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """See `make_operators`."""
    if index.min() < 0 or index.max() >= classes:
        raise ValueError(f"routing: index reaches from {index.min()} to {index.max()}, expected 0 to {classes - 1}")
    places, inverse = torch.empty_like(index), torch.empty_like(index)
    run_tasks(_order, len(index), index.numpy(), classes, places.numpy(), inverse.numpy())
    return places, inverse


@jit_reassociating
def _differentiate(task, grad, logits, table_t, index, grad_logits, part_table):
    _, length, classes = logits.shape
    blocks = (length + TOKENS - 1) // TOKENS
    sample, start = task // blocks, task % blocks * TOKENS
    part = part_table[task]
    soft = np.empty(classes, np.float32)
    inner = np.empty(classes, np.float32)
    for i in range(start, min(start + TOKENS, length)):
        x, g, row = logits[sample, i], grad[sample, i], part[index[sample, i]]
        largest = x[0]
        for t in range(classes):
            largest = max(largest, x[t])
        for t in range(classes):
            soft[t] = exp2((x[t] - largest) * _LOG2E)
            inner[t] = np.float32(0)
        for s in range(len(g)):
            row[s] += g[s]
            column, value = table_t[s], g[s]
            for t in range(classes):
                inner[t] += value * column[t]
        total = mean = np.float32(0)
        for t in range(classes):
            total += soft[t]
            mean += soft[t] * inner[t]
        scale = np.float32(1) / total
        mean *= scale
        out = grad_logits[sample, i]
        for t in range(classes):
            out[t] = soft[t] * scale * (inner[t] - mean)


def differentiate(grad: Tensor, logits: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """See `make_operators`."""
    blocks = -(-logits.shape[1] // TOKENS)
    grad_logits, part_table = torch.empty_like(logits), torch.zeros(len(logits) * blocks, *table.shape)
    tensors = (grad, logits, table.T.contiguous(), index, grad_logits, part_table)
    run_tasks(_differentiate, len(part_table), *(tensor.numpy() for tensor in tensors))
    # One after the other: torch's own sum may choose its order by shape and number of threads.
    samples = [functools.reduce(torch.add, sample) for sample in part_table.split(blocks)]
    return grad_logits, functools.reduce(torch.add, samples)


choose_class, class_order, class_prompt = make_operators("cpu", choose, order, differentiate)
