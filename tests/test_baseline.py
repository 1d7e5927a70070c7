"""The baseline of the speed claims computes what the published code did, and no operator of ours is left in it."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import published, recorded_routes, reference, tiny_network
from recipe import load_recipe_weights, recipe_input

from mambair_ds.config import LossConfig, NetworkConfig, OptimizerConfig


@pytest.fixture
def baseline(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("baseline")


def build(baseline, name):
    network = NetworkConfig.model_validate(published()["variants"][name]["network_g"])
    model = baseline.build(network, torch.device("cpu"))
    load_recipe_weights(model)
    return model


@pytest.mark.parametrize(
    ("name", "case"), [("lightSR_x2", "b"), pytest.param("SR_x2", "b", marks=pytest.mark.slow), ("SRSmall_x2", "b")]
)
def test_outputs_and_routes_are_the_recorded_ones(baseline, name, case):
    recorded, model = reference(f"forward_{name}"), build(baseline, name).eval()
    with torch.no_grad(), baseline.published_operators(), recorded_routes(model) as decided:
        out = model(torch.from_numpy(recorded[f"in_{case}"]))
    assert (torch.stack(decided).numpy() == recorded[f"route_{case}"]).all()
    np.testing.assert_allclose(out.numpy(), recorded[f"out_{case}"], rtol=0, atol=2e-5)


def test_gradients_are_the_recorded_ones(baseline):
    recorded, model = reference("grad_lightSR_x2"), build(baseline, "lightSR_x2").eval()
    with baseline.published_operators():
        out = model(recipe_input((1, 3, 16, 16)))
        (out - recipe_input(out.shape, seed=8)).abs().mean().backward()
    gradients = {key: parameter.grad.double() for key, parameter in model.named_parameters()}
    for key, l2, total in zip(*(recorded[f"c_{column}"] for column in ("keys", "l2", "sum")), strict=True):
        assert gradients[key].norm().item() == pytest.approx(l2, rel=1e-5), key
        assert gradients[key].sum().item() == pytest.approx(total, abs=1e-5 * l2), key


def test_the_published_draw_gives_the_recorded_training_output(baseline):
    recorded, model = reference("stochastic_lightSR_x2_seed0"), build(baseline, "lightSR_x2").train()
    torch.manual_seed(0)
    with torch.no_grad(), baseline.published_operators(), recorded_routes(model) as decided:
        out = model(torch.from_numpy(recorded["input"]))
    np.testing.assert_array_equal(torch.stack(decided).numpy(), recorded["route"])
    np.testing.assert_allclose(out.numpy(), recorded["output"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["MambaIRv2", "MambaIRv2Light"])
def test_a_step_uses_none_of_our_operators_and_puts_them_back(baseline, kind, monkeypatch):
    import mambair_ds.kernels as kernels
    from mambair_ds.models import layout

    used = set()
    load = kernels._import
    monkeypatch.setattr(kernels, "_import", lambda name, *rest: (used.add(name), load(name, *rest))[1])
    step = baseline.Step(
        NetworkConfig.model_validate(tiny_network(type=kind)),
        OptimizerConfig(lr=2e-3),
        LossConfig(type="L1Loss"),
        torch.device("cpu"),
    )
    lq, gt = recipe_input((1, 3, 8, 16)), recipe_input((1, 3, 16, 32), seed=8)
    before = layout.linear
    losses = [step(lq, gt) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert layout.linear is before
    assert used == {"selective_scan"}  # its reference


def test_the_floor_counts_every_product_of_a_step(baseline):
    def count(batch, **changes):
        network = tiny_network(type="MambaIRv2Light", depths=[1], num_heads=[2], **changes)
        return baseline.step_flops(NetworkConfig.model_validate(network), batch, 24)

    assert count(2, embed_dim=16) == pytest.approx(2 * count(1, embed_dim=16), rel=1e-4)  # the table is multiplied once
    assert 2 < count(1, embed_dim=32) / count(1, embed_dim=16) < 4
