"""Exponential moving average of the weights.

Each rank averages what it holds: whole tensors at ZeRO stages 0 to 2, its own fragment of each at stage 3. No
communication happens until somebody asks the engine for the whole average.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """A float32 running mean of local parameter tensors, keyed by name."""

    def __init__(self, local: Mapping[str, Tensor], decay: float) -> None:
        """Start from the current weights.

        Args:
            local: this rank's tensors by name (`Engine.local_tensors`).
            decay: weight of the past in each update.
        """
        self.decay = decay
        self.tensors = {name: tensor.detach().float().clone() for name, tensor in local.items()}

    @torch.no_grad()
    def update(self, local: Mapping[str, Tensor], skipped: Tensor) -> None:
        """mean += (1 - decay) · (weights - mean), in place; nothing where `skipped`, 0.0 or 1.0, is 1.0."""
        means = list(self.tensors.values())
        steps = torch._foreach_sub([local[name].detach().float() for name in self.tensors], means)
        torch._foreach_mul_(steps, ((1 - self.decay) * (1 - skipped)).to(means[0].device, non_blocking=True))
        torch._foreach_add_(means, steps)
