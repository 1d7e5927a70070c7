"""Tiled inference against the published cut, and what it promises to any network."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import REFERENCE, build_tiny, recorded_routes, reference
from recipe import recipe_input

from mambair_ds.inference import restore

PUBLISHED = json.loads((REFERENCE / "tiled.json").read_text())


def _upsample(x):
    """A stand-in network in which every pixel knows the whole tile."""
    return F.interpolate(x, scale_factor=2, mode="nearest") + x.mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("max_batch", [1, 4])
def test_published_tiling(name, max_batch):
    expected = PUBLISHED[name]
    shapes = []

    def network(x):
        shapes.extend([1, *x.shape[1:]] for _ in x)
        assert len(x) <= max_batch
        return _upsample(x)

    out = restore(network, recipe_input(expected["in_shape"]), expected["scale"], max_batch=max_batch)
    assert list(out.shape) == expected["out_shape"]
    assert sorted(shapes) == sorted(expected["chop_shapes"])
    np.testing.assert_allclose(out[:, :, ::7, ::7].numpy(), reference("tiled")[f"{name}_s7"], rtol=0, atol=2e-6)
    assert out.double().sum().item() == pytest.approx(expected["sum"], rel=1e-6)
    assert out.double().square().sum().item() == pytest.approx(expected["sumsq"], rel=1e-6)


@pytest.mark.parametrize(
    "height, width, tile", [(1, 1, 1), (2, 3, 1), (7, 50, 4), (33, 9, 8), (20, 20, 7), (5, 5, 200)]
)
@pytest.mark.parametrize("self_ensemble", [False, True])
def test_tiles_of_any_size_put_the_picture_together_again(height, width, tile, self_ensemble):
    sides = []

    def network(x):
        sides.extend(x.shape[2:])
        return F.interpolate(x, scale_factor=3, mode="nearest")

    x = recipe_input((2, 3, height, width))
    out = restore(network, x, 3, tile=tile, self_ensemble=self_ensemble)
    np.testing.assert_allclose(out.numpy(), F.interpolate(x, scale_factor=3, mode="nearest").numpy(), atol=1e-6)
    assert max(sides) <= tile + 2 * (tile // 10)


def test_pictures_of_a_batch_do_not_mix():
    x = recipe_input((3, 3, 30, 50))
    out = restore(_upsample, x, 2, tile=20)
    alone = torch.cat([restore(_upsample, picture[None], 2, tile=20) for picture in x])
    np.testing.assert_allclose(out.numpy(), alone.numpy(), rtol=0, atol=1e-6)


def test_self_ensemble_is_the_mean_over_the_eight_symmetries():
    def crooked(x):  # prefers a direction, as networks do
        return x + 0.1 * x.roll(1, 2) + 0.2 * x.roll(2, 3)

    x = recipe_input((1, 3, 6, 9))
    expected = torch.zeros_like(x)
    for turns in range(4):
        for mirror in (False, True):
            turned = x.rot90(turns, (2, 3))
            turned = turned.flip(3) if mirror else turned
            y = crooked(turned)
            y = y.flip(3) if mirror else y
            expected += y.rot90(-turns, (2, 3)) / 8
    out = restore(crooked, x, 1, self_ensemble=True)
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=0, atol=1e-6)


def test_runs_in_evaluation_mode_and_puts_the_mode_back():
    model = build_tiny().train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    x = recipe_input((1, 3, 9, 5))
    out = restore(model, x, 2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(out, model.eval()(x))
    assert not out.requires_grad


def test_the_mode_comes_back_after_an_error():
    model = build_tiny().train()
    with pytest.raises(RuntimeError):
        restore(model, torch.zeros(1, 5, 8, 8), 2)
    assert model.training


def test_nothing_is_clamped():
    assert restore(lambda x: 3 * x - 1, torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), 1).flatten().tolist() == [-1, 2]


def test_a_picture_in_one_piece_and_overlap():
    model = build_tiny()
    x = recipe_input((1, 3, 30, 41))
    whole = restore(model, x, 2, tile=None)
    assert torch.equal(whole, model.eval()(x))
    sides = []

    def network(x):
        sides.append(tuple(x.shape[2:]))
        return _upsample(x)

    restore(network, x, 2, tile=16, overlap=3, max_batch=1)  # 2 x 3 tiles of 15 x 14
    assert sorted(set(sides)) == [(18, 17), (18, 20)]


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_batched_tiles_equal_tiles_one_by_one(self_ensemble):
    model = build_tiny()
    x = recipe_input((1, 3, 45, 37))
    batched = restore(model, x, 2, tile=16, self_ensemble=self_ensemble)
    single = restore(model, x, 2, tile=16, max_batch=1, self_ensemble=self_ensemble)
    np.testing.assert_allclose(batched.numpy(), single.numpy(), rtol=0, atol=2e-5)


def test_bf16_runs_the_network_in_bfloat16_and_stays_near_float32():
    model, kinds = build_tiny(), []
    x = recipe_input((1, 3, 24, 24))
    with recorded_routes(model) as routes:
        exact = restore(model, x, 2)
    model.layers[0].conv.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    # A token whose class flips by rounding moves the output far: both runs take the same routes.
    with recorded_routes(model, inject=routes):
        out = restore(model, x, 2, bf16=True)
    assert kinds == [torch.bfloat16]
    assert (out.float() - exact).norm() < 0.03 * exact.norm()
    assert torch.equal(restore(model, x, 2), exact)
