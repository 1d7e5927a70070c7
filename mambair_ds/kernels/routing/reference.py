"""Routing in PyTorch's operations, as published: what the other backends are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambair_ds.kernels.philox import KeyedNoise, gumbel


def choose_class(scores: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
    """See `mambair_ds.kernels.routing.choose_class`."""
    return probabilities(scores, noise).argmax(-1)


def class_order(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """See `mambair_ds.kernels.routing.class_order`."""
    order = torch.argsort(index, dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def class_prompt(scores: Tensor, table: Tensor, index: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
    """See `mambair_ds.kernels.routing.class_prompt`; by a dense (B, n, T) policy."""
    with torch.autocast(scores.device.type, enabled=False):
        soft = probabilities(scores, noise)
        policy = F.one_hot(index, len(table)).to(soft.dtype) - soft.detach() + soft
        return (policy @ table.to(soft.dtype)).to(table.dtype)


def probabilities(scores: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
    """The (noisy) probabilities of the classes, (..., T), in float32 at least."""
    with torch.autocast(scores.device.type, enabled=False):
        logits = F.log_softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
        if isinstance(noise, KeyedNoise):
            noise = gumbel(noise.key, noise.stream, tuple(scores.shape), scores.device, backend="reference")
        if noise is not None:
            logits = logits + noise
        return logits.softmax(-1)
