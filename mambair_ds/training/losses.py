"""Pixel losses of the field, averaged over every element."""

from __future__ import annotations

import torch
from torch import Tensor

from mambair_ds.config import LossConfig


def pixel_loss(config: LossConfig, output: Tensor, gt: Tensor) -> Tensor:
    """Mean pixel loss times its weight.

    Args:
        config: which loss; CharbonnierLoss is sqrt(d² + eps) with eps as it stands, as in the published code.
        output, gt: (B, C, H, W), any float dtype; the loss is taken in float32.

    Returns:
        A float32 scalar.
    """
    difference = output.float() - gt.float()
    if config.type == "L1Loss":
        loss = difference.abs()
    elif config.type == "MSELoss":
        loss = difference.square()
    else:
        loss = torch.sqrt(difference.square() + config.eps)
    return config.loss_weight * loss.mean()
