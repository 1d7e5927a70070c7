"""Routing on the CPU: loops compiled by numba.

Results are equal to the bit on any number of threads, and a sample's do not depend on its batch: tasks are the same
whatever their number, and the table's gradient is summed in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"

import functools

import numpy as np
import torch
from torch import Tensor

from mambair_ds.kernels.cpu import exp2, jit, run_tasks, to_lanes
from mambair_ds.kernels.philox.cpu import gumbel
from mambair_ds.kernels.routing.operator import Draw, make_operators
from mambair_ds.kernels.routing.reference import probabilities
from mambair_ds.kernels.vectors import LANES, largest, load, spread, store, total

TOKENS = 512
CLOSE = np.float32(1e-5)
"""Two sums of score and noise nearer than this times their size may tie, or change places, once rounded as published.

The published logarithm of the softmax and the noise's addition round by at most some 2^-22 of the largest number that
occurs, the softmax by 2^-22 again; this is 20 times as much.
"""

_LOG2E = np.float32(1.4426950408889634)
_NEVER = np.float32(-1e30)


@jit
def _choose(task, scores, noise, has_noise, index):
    _, length, classes = scores.shape
    blocks = (length + TOKENS - 1) // TOKENS
    sample, start = task // blocks, task % blocks * TOKENS
    y = np.empty(classes, np.float32)
    for i in range(start, min(start + TOKENS, length)):
        x = scores[sample, i]
        for t in range(classes):
            y[t] = x[t] + noise[sample, i, t] if has_noise else x[t]
        most, size = y[0], np.float32(0)
        for t in range(classes):
            most = max(most, y[t])
            size = max(size, abs(x[t]))
        margin = most - CLOSE * (np.float32(1) + size + abs(most))
        first, last = classes, -1
        for t in range(classes):
            first = min(first, t if y[t] >= margin else classes)
            last = max(last, t if y[t] >= margin else -1)
        index[sample, i] = first if first == last else -1


def choose(scores: Tensor, draw: Draw) -> Tensor:
    """See `make_operators`. Tokens with a clear winner need no softmax; for the others PyTorch's own decides."""
    noise = _noise(scores, draw)
    scores = scores.float()
    index = torch.empty(scores.shape[:2], dtype=torch.int64)
    tensors = (scores, scores if noise is None else noise)
    tasks = len(scores) * -(-scores.shape[1] // TOKENS)
    run_tasks(_choose, tasks, *(tensor.numpy() for tensor in tensors), noise is not None, index.numpy())
    close = index < 0
    if close.any():
        index[close] = probabilities(scores[close], None if noise is None else noise[close]).argmax(-1)
    return index


def _noise(scores: Tensor, draw: Draw) -> Tensor | None:
    noise, positions, seed, stream = draw
    if positions is None:
        return noise
    return gumbel(seed, positions, stream, scores.shape[1] * scores.shape[2]).view(scores.shape)


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


@jit
def _differentiate(task, grad, scores, noise, has_noise, table_t, index, grad_scores, part_table):
    _, length, classes = scores.shape
    blocks = (length + TOKENS - 1) // TOKENS
    sample, start = task // blocks, task % blocks * TOKENS
    soft, inner = np.empty(classes, np.float32), np.empty(classes, np.float32)
    for i in range(start, min(start + TOKENS, length)):
        most = spread(_NEVER)
        for t in range(0, classes, LANES):
            x = load(scores, (sample, i, t))
            if has_noise:
                x += load(noise, (sample, i, t))
            store(soft, t, x)
            most = max(x, most)
        high = largest(most)
        sums, means = spread(np.float32(0)), spread(np.float32(0))
        for t in range(0, classes, LANES):
            x, y = exp2((load(soft, t) - high) * _LOG2E), spread(np.float32(0))
            for s in range(len(table_t)):
                y += load(table_t, (s, t)) * grad[sample, i, s]
            store(soft, t, x)
            store(inner, t, y)
            sums += x
            means += x * y
        scale = np.float32(1) / total(sums)
        mean = total(means) * scale
        for t in range(0, classes, LANES):
            store(grad_scores, (sample, i, t), load(soft, t) * scale * (load(inner, t) - mean))
        for s in range(len(table_t)):
            part_table[task, index[sample, i], s] += grad[sample, i, s]


def differentiate(grad: Tensor, scores: Tensor, table: Tensor, index: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """See `make_operators`."""
    noise, (batch, length, classes) = _noise(scores, draw), scores.shape
    wide = to_lanes(scores, float(_NEVER))
    blocks = -(-length // TOKENS)
    grad_scores, part_table = torch.empty(wide.shape), torch.zeros(batch * blocks, *table.shape)
    run_tasks(
        _differentiate, len(part_table), grad.float().contiguous().numpy(), wide,
        wide if noise is None else to_lanes(noise), noise is not None,
        to_lanes(table.T), index.numpy(), grad_scores.numpy(), part_table.numpy(),
    )  # fmt: skip
    # One after the other: torch's own sum may choose its order by shape and number of threads.
    samples = [functools.reduce(torch.add, sample) for sample in part_table.split(blocks)]
    return grad_scores[..., :classes].to(scores.dtype).contiguous(), functools.reduce(torch.add, samples)


choose_class, class_order, class_prompt = make_operators("cpu", choose, order, differentiate)
