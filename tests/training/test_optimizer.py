"""The optimizer of a run against torch.optim's, and its mean against the definition."""

from itertools import pairwise

import pytest
import torch

from mambair_ds.config import OptimizerConfig
from mambair_ds.training.optimizer import MEAN, Adam

SHAPES = [(3, 5), (7,), ()]


def _weights(seed: int) -> list[torch.nn.Parameter]:
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_weights_are_those_of_torch_and_the_mean_follows_them(kind: str, decay: float) -> None:
    ours, theirs = _weights(0), _weights(0)
    config = OptimizerConfig(type=kind, lr=0.1, weight_decay=0.01)
    optimizer = Adam(ours, config, decay)
    peer = getattr(torch.optim, kind)(theirs, lr=0.1, betas=config.betas, weight_decay=0.01, fused=True)
    history = [[weight.detach().clone() for weight in ours]]
    for step in range(3):
        for mine, other, gradient in zip(ours, theirs, _weights(step + 1), strict=True):
            mine.grad, other.grad = gradient.detach(), gradient.detach().clone()
        optimizer.step()
        peer.step()
        history.append([weight.detach().clone() for weight in ours])
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert set(optimizer.state[mine]) == {*peer.state[other], *([MEAN] if decay else [])}
        assert torch.equal(optimizer.state[mine]["exp_avg_sq"], peer.state[other]["exp_avg_sq"])
    if decay:
        means = history[0]
        for _, weights in pairwise(history):
            means = [decay * mean + (1 - decay) * weight for mean, weight in zip(means, weights, strict=True)]
        for mine, mean in zip(ours, means, strict=True):
            torch.testing.assert_close(optimizer.state[mine][MEAN], mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_a_skipped_step_changes_nothing(decay: float) -> None:
    weights = _weights(0)
    optimizer = Adam(weights, OptimizerConfig(lr=0.1), decay)
    for flag in (0.0, 1.0):
        before = [weight.detach().clone() for weight in weights]
        states = [{name: value.clone() for name, value in optimizer.state_of(weight).items()} for weight in weights]
        for weight in weights:
            weight.grad = torch.full_like(weight, float("nan") if flag else 1.0)
        optimizer.skipped = torch.tensor(flag)
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, weights, strict=True)]
        assert all(same) if flag else not any(same)
    for weight, state in zip(weights, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in optimizer.state[weight].items())
