"""A checkpoint of many ranks becomes a weight file."""

import pytest
import torch
from conftest import Workplace

from mambair_ds.convert import main
from mambair_ds.weights import read_weights


@pytest.mark.parametrize(("stage", "precision"), [(3, "fp32"), (1, "pure_bf16")])
def test_a_checkpoint_of_two_ranks_holds_the_weights_that_the_run_exported(
    workplace: Workplace, stage: int, precision: str
) -> None:
    settings = (f"train.zero_stage={stage}", f"train.precision={precision}", "train.ema_decay=0.9")
    done = workplace.train(*settings, ranks=2)
    assert done.returncode == 0, done.stderr
    run = workplace.folder / "experiments/tiny"
    out = workplace.folder / "weights.pth"
    assert main(["weights", str(run / "checkpoints/0000006"), "--out", str(out)]) == 0
    for key in ("params", "params_ema"):
        exported, converted = read_weights(run / "models/net_g_6.pth", key), read_weights(out, key)
        assert exported.keys() == converted.keys()
        assert all(torch.equal(tensor, converted[name]) for name, tensor in exported.items())
    assert "run tiny" in out.with_suffix(".md").read_text()
