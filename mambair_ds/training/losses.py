"""Losses of the field, averaged over every element: on pixels, and on features and spectra if asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from mambair_ds.config import LossConfig, TrainConfig
from mambair_ds.training.perceptual import PerceptualLoss


class Losses:
    """All losses of a run."""

    def __init__(self, train: TrainConfig, device: torch.device) -> None:
        """Read the weights that they need.

        Raises:
            UserError: those of the perceptual loss cannot be read.
        """
        self._train = train
        self._perceptual = PerceptualLoss(train.perceptual_loss).to(device) if train.perceptual_loss else None
        given = {"l_pix": True, "l_percep": train.perceptual_loss, "l_fft": train.fft_loss}
        self.names = [name for name, config in given.items() if config]
        """What the losses are called in the log, in order."""

    def __call__(self, output: Tensor, gt: Tensor) -> Tensor:
        """The weighted losses, (number of names,) float32, of output and GT (B, C, H, W)."""
        parts = [pixel_loss(self._train.pixel_loss, output, gt)]
        if self._perceptual:
            parts.append(self._perceptual(output.float(), gt))
        if self._train.fft_loss:
            parts.append(self._train.fft_loss.loss_weight * fft_loss(output, gt))
        return torch.stack(parts)


def fft_loss(output: Tensor, gt: Tensor) -> Tensor:
    """Mean absolute difference of the real and imaginary parts of the two-dimensional Fourier transforms."""
    difference = torch.fft.rfft2(output.float() - gt.float())
    return torch.view_as_real(difference).abs().mean()


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
