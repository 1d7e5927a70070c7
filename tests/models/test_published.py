"""The network against what the published code computed: names, outputs, routes and gradients."""

import functools
import json

import numpy as np
import pytest
import torch
from networks import REFERENCE, published, recorded_routes, reference
from recipe import load_recipe_weights, recipe_input

from mambair_ds.models import build_model

TOLERANCE = 2e-5
FORWARD = json.loads((REFERENCE / "forward.json").read_text())
VARIANT = {"ColorDN": "ColorDN_level15"}  # published configurations by the reference's names, where they differ


@functools.cache
def _model(name):
    model = build_model(published()["variants"][VARIANT.get(name, name)]["network_g"])
    digest, total = load_recipe_weights(model)
    assert digest == FORWARD[name]["sha256"]
    assert total == pytest.approx(FORWARD[name]["sum"], rel=1e-12)
    return model


@pytest.mark.parametrize("name", published()["variants"])
def test_state_dict_is_the_published_one(name):
    variant = published()["variants"][name]
    with torch.device("meta"):
        model = build_model(variant["network_g"])
    ours = [[key, list(tensor.shape), str(tensor.dtype)[6:]] for key, tensor in model.state_dict().items()]
    assert ours == published()["state_dicts"][variant["state_dict"]]
    assert sum(parameter.numel() for parameter in model.parameters()) == variant["total_params"]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("name", FORWARD)
def test_routes_and_outputs(name, case):
    recorded = reference(f"forward_{name}")
    routes = torch.from_numpy(recorded[f"route_{case}"].astype(np.int64))
    # Where the best two classes of a token nearly tie, rounding may decide: go on with the recorded class there.
    tie = FORWARD[name]["min_route_margin"][case] < 1e-5
    model = _model(name).eval()
    with torch.no_grad(), recorded_routes(model, inject=routes if tie else None) as decided:
        out = model(torch.from_numpy(recorded[f"in_{case}"]))
    differing = int((torch.stack(decided) != routes).sum())
    assert differing <= (2 if tie else 0), f"{differing} tokens are of another class"
    np.testing.assert_allclose(out.numpy(), recorded[f"out_{case}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case, shape", [("a", (1, 3, 48, 40)), ("b", (2, 3, 32, 32)), ("c", (1, 3, 16, 16))])
def test_gradients(case, shape):
    recorded = reference("grad_lightSR_x2")
    inject = None
    if case != "c":  # the same inputs as in the forward cases
        inject = torch.from_numpy(reference("forward_lightSR_x2")[f"route_{case}"].astype(np.int64))
    model = _model("lightSR_x2").eval()
    model.zero_grad()
    with recorded_routes(model, inject):
        out = model(recipe_input(shape))
    loss = (out - recipe_input(out.shape, seed=8)).abs().mean()
    loss.backward()
    np.testing.assert_allclose(out.detach().numpy(), recorded[f"{case}_out"], rtol=0, atol=TOLERANCE)
    assert loss.item() == pytest.approx(float(recorded[f"{case}_loss"]), abs=1e-6)
    gradients = {key: parameter.grad.double() for key, parameter in model.named_parameters()}
    assert set(gradients) == set(recorded[f"{case}_keys"])
    columns = (recorded[f"{case}_{column}"] for column in ("keys", "l2", "sum", "first8"))
    for key, l2, total, first8 in zip(*columns, strict=True):
        gradient = gradients[key]
        assert gradient.norm().item() == pytest.approx(l2, rel=1e-5), key
        assert gradient.sum().item() == pytest.approx(total, abs=1e-5 * l2), key
        ours = gradient.flatten()[:8].numpy()
        np.testing.assert_allclose(ours, first8[: len(ours)], rtol=0, atol=1e-5 * l2, err_msg=key)


def test_published_draw_of_routing_noise():
    recorded = reference("stochastic_lightSR_x2_seed0")
    torch.manual_seed(0)
    draw = torch.empty(1, 1024, 64).exponential_().flatten()
    if not np.array_equal(draw[:64].numpy(), recorded["first_layer_exponential_first64"]):
        pytest.skip("this torch draws other exponential numbers than torch 2.13 on a CPU")
    model = _model("lightSR_x2").train()
    torch.manual_seed(0)
    with torch.no_grad(), recorded_routes(model) as decided:
        out = model(torch.from_numpy(recorded["input"]))
    np.testing.assert_array_equal(torch.stack(decided).numpy(), recorded["route"])
    np.testing.assert_allclose(out.numpy(), recorded["output"], rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(recorded["input"]))
    np.testing.assert_allclose(out.numpy(), recorded["output_deterministic"], rtol=0, atol=TOLERANCE)
