"""Routing in PyTorch's operations, as published: what the other backends are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def choose_class(logits: Tensor) -> Tensor:
    """See `mambair_ds.kernels.routing.choose_class`."""
    return logits.softmax(-1).argmax(-1)


def class_order(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """See `mambair_ds.kernels.routing.class_order`."""
    order = torch.argsort(index, dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def class_prompt(logits: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """See `mambair_ds.kernels.routing.class_prompt`; by a dense (B, n, T) policy."""
    with torch.autocast(logits.device.type, enabled=False):
        soft = logits.softmax(-1)
        policy = F.one_hot(index, len(table)).to(soft.dtype) - soft.detach() + soft
        return (policy @ table.to(soft.dtype)).to(table.dtype)
