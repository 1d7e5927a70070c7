"""Learning rates against those recorded from the published schedulers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mambair_ds.config import TrainConfig
from mambair_ds.training.schedule import learning_rate

RECORDED = json.loads((Path(__file__).parents[1] / "data/reference/lr_sampler.json").read_text())["lr"]


def train_config(recorded: dict[str, Any], total_iter: int) -> TrainConfig:
    cosine = "periods" in recorded
    keys = ("periods", "eta_min", "restart_weights") if cosine else ("milestones", "gamma", "restarts")
    scheduler = {key: recorded[key] for key in keys if key in recorded}
    if "restarts" in recorded:
        scheduler["restart_weights"] = recorded["restart_weights"]
    scheduler["type"] = "CosineAnnealingRestartLR" if cosine else "MultiStepLR"
    return TrainConfig.model_validate(
        {
            "total_iter": total_iter,
            "optim": {"lr": recorded["lr"]},
            "scheduler": scheduler,
            "warmup_iter": max(recorded.get("warmup_iter", 0), 0),
            "pixel_loss": {"type": "L1Loss"},
        }
    )


@pytest.mark.parametrize("name", sorted(RECORDED.keys() - {"_note"}))
def test_rates_are_the_published_ones(name: str) -> None:
    recorded = RECORDED[name]
    used = {int(i): lr for i, lr in recorded["lr_used_at_iter"].items()}
    config = train_config(recorded["cfg"], max(used))
    for iteration, lr in used.items():
        # The published rate stays at (w - 1) / w after a multi-step warm-up: a bug that is not kept.
        if "QUIRK" in name and iteration >= config.warmup_iter:
            lr *= config.warmup_iter / (config.warmup_iter - 1)
        assert learning_rate(config, iteration) == pytest.approx(lr, rel=1e-12), iteration


def test_a_restart_sets_the_rate_whatever_the_milestones_had_done() -> None:
    cfg = {"lr": 1.0, "milestones": [10, 30], "gamma": 0.5, "restarts": [20], "restart_weights": [0.25]}
    config = train_config(cfg, 40)
    rates = [learning_rate(config, i) for i in (10, 11, 20, 21, 30, 31)]
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]
