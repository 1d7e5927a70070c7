"""Pixel losses against their formulas."""

import pytest
import torch

from mambair_ds.config import LossConfig
from mambair_ds.training.losses import pixel_loss


@pytest.mark.parametrize(
    ("kind", "expected"), [("L1Loss", 2.0), ("MSELoss", 5.0), ("CharbonnierLoss", (1.25**0.5 + 9.25**0.5) / 2)]
)
def test_losses_are_means_over_every_element_times_the_weight(kind: str, expected: float) -> None:
    output, gt = torch.tensor([1.0, 5.0]).view(1, 1, 1, 2), torch.tensor([2.0, 2.0]).view(1, 1, 1, 2)
    config = LossConfig.model_validate({"type": kind, "eps": 0.25, "loss_weight": 3})
    assert pixel_loss(config, output, gt).item() == pytest.approx(3 * expected)


def test_the_loss_of_bf16_output_is_taken_in_float32() -> None:
    output = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    loss = pixel_loss(LossConfig(type="L1Loss"), output, torch.full((1, 1, 64, 64), 1.0001))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-4, rel=1e-2)
