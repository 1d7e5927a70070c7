"""The running mean of the weights against its definition."""

import torch

from mambair_ds.training.ema import Ema


def test_the_mean_follows_its_recurrence_in_float32() -> None:
    weights = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(2)}
    ema = Ema(weights, decay=0.75)
    for value in (5.0, 9.0):
        weights["a"].fill_(value)
        ema.update(weights, torch.zeros(()))
    assert torch.equal(ema.tensors["a"], torch.full((3,), 0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9))
    assert torch.equal(ema.tensors["b"], torch.zeros(2))


def test_a_skipped_step_leaves_the_mean() -> None:
    ema = Ema({"a": torch.full((3,), 0.1)}, decay=0.7)
    before = ema.tensors["a"].clone()
    ema.update({"a": torch.full((3,), 0.3)}, torch.ones(()))
    assert torch.equal(ema.tensors["a"], before)
