"""Learning rates as pure functions of the iteration, so that a resume has no scheduler state to restore.

Iterations count from 1. The values are those of the published schedulers: the rate at iteration i is the scheduler's
after i - 1 steps, so a milestone m takes effect at iteration m + 1, and a cosine restart shows one iteration late. One
published bug is left out: there, after a warm-up of w iterations, the rate stays at (w - 1) / w of nominal for ever.
"""

from __future__ import annotations

import itertools
import math

from mambair_ds.config import CosineConfig, MultiStepConfig, TrainConfig


def learning_rate(train: TrainConfig, iteration: int) -> float:
    """Rate of optimizer step number `iteration` (1-based)."""
    if iteration < train.warmup_iter:
        return train.optim.lr * iteration / train.warmup_iter
    epoch = iteration - 1
    if isinstance(train.scheduler, CosineConfig):
        return _cosine(train.scheduler, train.optim.lr, epoch)
    return _multi_step(train.scheduler, train.optim.lr, epoch)


def _multi_step(config: MultiStepConfig, lr: float, epoch: int) -> float:
    # A restart overrides a milestone of the same iteration, as published.
    start, weight = max(
        ((at, weight) for at, weight in zip(config.restarts, config.restart_weights, strict=True) if at <= epoch),
        default=(-1, 1.0),
    )
    drops = sum(start < milestone <= epoch for milestone in config.milestones)
    return lr * weight * config.gamma**drops


def _cosine(config: CosineConfig, lr: float, epoch: int) -> float:
    ends = list(itertools.accumulate(config.periods))
    index = next(i for i, end in enumerate(ends) if epoch <= end)
    progress = (epoch - (ends[index] - config.periods[index])) / config.periods[index]
    swing = config.restart_weights[index] * 0.5 * (lr - config.eta_min)
    return config.eta_min + swing * (1 + math.cos(math.pi * progress))
