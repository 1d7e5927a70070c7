"""The network where no published numbers reach: sizes, heads, ranges, initialization, noise and checkpointing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import build_tiny, recorded_routes, routers, tiny_network
from pydantic import ValidationError
from recipe import recipe_input

from mambair_ds.kernels.philox import NoiseKey
from mambair_ds.models import build_model
from mambair_ds.models.mambairv2 import MambaIRv2
from mambair_ds.models.state_space import Router

MEAN = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)


def _same(a, b, atol=1e-5):
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (3, 2), (5, 8), (8, 5), (13, 7), (16, 24)])
def test_any_size_equals_the_symmetrically_padded_picture(height, width):
    model = build_tiny(window_size=8).eval()
    x = recipe_input((2, 3, height, width))
    padding = [(0, 0), (0, 0), (0, -height % 8), (0, -width % 8)]
    padded = torch.from_numpy(np.pad(x.numpy(), padding, mode="symmetric"))
    with torch.no_grad():
        out = model(x)
        _same(out, model(padded)[:, :, : 2 * height, : 2 * width], atol=0)
    assert out.shape == (2, 3, 2 * height, 2 * width) and out.isfinite().all()


@pytest.mark.parametrize("upsampler, scale", [("pixelshuffle", 2), ("pixelshuffle", 3), ("pixelshuffle", 4),
                                              ("pixelshuffledirect", 3), ("nearest+conv", 4), ("", 1)])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["MambaIRv2", "MambaIRv2Light"])
def test_every_head_and_channel_count(kind, channels, upsampler, scale):
    model = build_tiny(type=kind, upsampler=upsampler, upscale=scale, in_chans=channels, mlp_ratio=2.0)
    x = recipe_input((1, channels, 6, 9))
    out = model(x)
    assert out.shape == (1, channels, 6 * scale, 9 * scale)
    out.square().mean().backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not silent, "parameters without a gradient"


def _features(model, x):
    """What goes into the head: the deep features plus the shallow ones."""
    kept = {}
    for name in ("conv_first", "conv_after_body"):
        getattr(model, name).register_forward_hook(lambda _, __, out, name=name: kept.update({name: out}))
    out = model(x)
    return kept["conv_first"] + kept["conv_after_body"], out


def test_nearest_conv_head():
    model = build_tiny(upsampler="nearest+conv", upscale=4).eval()
    keys = [key for key in model.state_dict() if not key.startswith(("layers", "norm", "patch", "rel"))]
    heads = ["conv_before_upsample.0", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    assert keys == [f"{conv}.{p}" for conv in ["conv_first", "conv_after_body", *heads] for p in ("weight", "bias")]
    p = model.state_dict()

    def conv(name, x):
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1)

    with torch.no_grad():
        features, out = _features(model, recipe_input((1, 3, 8, 8)))
        y = F.leaky_relu(conv("conv_before_upsample.0", features), 0.01)
        for name in ("conv_up1", "conv_up2"):
            y = F.leaky_relu(conv(name, y.repeat_interleave(2, 2).repeat_interleave(2, 3)), 0.2)
        y = conv("conv_last", F.leaky_relu(conv("conv_hr", y), 0.2)) + MEAN
    _same(out, y)


def test_head_without_upsampling_adds_to_the_input():
    model = build_tiny(upsampler="", upscale=1).eval()
    x = recipe_input((1, 3, 8, 8))
    with torch.no_grad():
        features, out = _features(model, x)
        _same(out, x + model.conv_last(features))


def test_3conv_is_the_bottleneck():
    model = build_tiny(resi_connection="3conv").eval()
    shapes = {key: tuple(value.shape) for key, value in model.layers[0].conv.state_dict().items()}
    assert shapes == {"0.weight": (3, 12, 3, 3), "0.bias": (3,), "2.weight": (3, 3, 1, 1), "2.bias": (3,),
                      "4.weight": (12, 3, 3, 3), "4.bias": (12,)}  # fmt: skip
    x = torch.randn(1, 12, 4, 4)
    p = model.conv_after_body.state_dict()
    y = F.leaky_relu(F.conv2d(x, p["0.weight"], p["0.bias"], padding=1), 0.2)
    y = F.leaky_relu(F.conv2d(y, p["2.weight"], p["2.bias"]), 0.2)
    _same(model.conv_after_body(x), F.conv2d(y, p["4.weight"], p["4.bias"], padding=1))


def test_img_range_stretches_the_normalized_picture():
    plain, stretched = build_tiny(img_range=1.0).eval(), build_tiny(img_range=3.0).eval()
    x = recipe_input((1, 3, 8, 8))
    with torch.no_grad():
        _same(stretched(x), (plain((x - MEAN) * 3 + MEAN) - MEAN) / 3 + MEAN)


def test_grey_pictures_have_no_mean():
    model = build_tiny(in_chans=1).eval()
    with torch.no_grad():
        for parameter in model.upsample.parameters():
            parameter.zero_()
        assert torch.equal(model(recipe_input((1, 1, 5, 5))), torch.zeros(1, 1, 10, 10))


def test_without_qkv_bias():
    keys = build_model(tiny_network(qkv_bias=False)).state_dict()
    assert not [key for key in keys if key.endswith("wqkv.bias")]


def test_a_wrong_description_is_refused():
    with pytest.raises(ValidationError, match="embed_dims"):
        build_model(tiny_network(embed_dims=12))


def test_evaluation_is_noise_free_and_training_is_not():
    model, x = build_tiny(), recipe_input((1, 3, 8, 8))
    with torch.no_grad():
        noisy = [model.train()(x) for _ in range(2)]
        calm = [model.eval()(x) for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.equal(*noisy)


def test_keyed_noise_depends_on_the_sample_not_on_the_batch():
    model, x = build_tiny().train(), recipe_input((2, 3, 8, 8))
    key = NoiseKey(seed=5, positions=torch.tensor([7, 2**40 + 3]))
    with torch.no_grad():
        with recorded_routes(model) as together:
            out = model(x, key)
        for i in range(2):
            with recorded_routes(model) as alone:
                alone_out = model(x[i : i + 1], NoiseKey(5, key.positions[i : i + 1]))
            assert all(torch.equal(a, t[i : i + 1]) for a, t in zip(alone, together, strict=True))
            _same(alone_out, out[i : i + 1])
        assert not torch.equal(model(x, NoiseKey(6, key.positions)), out)
    assert not torch.equal(together[0][0], together[0][1]) and not torch.equal(together[0], together[2])


@pytest.mark.parametrize("noise", [NoiseKey(3, torch.arange(2)), None], ids=["keyed", "published"])
def test_checkpointing_recomputes_and_changes_nothing(noise):
    results = []
    for use_checkpoint in (False, True, "selective"):
        model, x = build_tiny(use_checkpoint=use_checkpoint).train(), recipe_input((2, 3, 8, 8))
        torch.manual_seed(1)
        with recorded_routes(model) as decided:
            out = model(x, noise)
            out.square().mean().backward()
        assert len(decided) == (8 if use_checkpoint else 4)
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for a, *others in zip(*results, strict=True):
        assert all(torch.equal(a, b) for b in others)


def test_scan_backends_are_interchangeable():
    torch.manual_seed(0)
    network, x = tiny_network(), recipe_input((1, 3, 8, 8))
    model, on_reference = build_model(network).eval(), build_model(network, scan_backend="reference").eval()
    on_reference.load_state_dict(model.state_dict())
    assert {m.backend for m in on_reference.modules() if hasattr(m, "backend")} == {"reference"}
    with torch.no_grad():
        _same(model(x), on_reference(x))


def test_float64_on_the_reference_backends():
    model = build_model(tiny_network(), scan_backend="reference").eval()
    x = recipe_input((1, 3, 8, 8))
    with torch.no_grad(), recorded_routes(model) as routes:
        out = model(x)
    with torch.no_grad(), recorded_routes(model, inject=routes):
        exact = model.double()(x.double())
    assert exact.dtype == torch.float64
    _same(out, exact.float(), atol=1e-6)


def test_mixed_precision_keeps_the_scan_in_float32(monkeypatch):
    from mambair_ds.models import state_space

    seen = {}
    scan = state_space.selective_scan

    def spy(u, delta, A, B, C, D, bias, **rest):
        seen["autocast"] = torch.is_autocast_enabled("cpu")
        seen["rates"] = {A.dtype, D.dtype, bias.dtype}
        return scan(u, delta, A, B, C, D, bias, **rest)

    monkeypatch.setattr(state_space, "selective_scan", spy)
    model, x = build_tiny().train(), recipe_input((1, 3, 8, 8))
    key = NoiseKey(0, torch.arange(1))
    exact = model(x, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, key)
    out.mean().backward()
    assert seen == {"autocast": False, "rates": {torch.float32}}
    assert (out - exact).abs().mean() < 0.2 * exact.std()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    # Parameters in bfloat16 as a whole, as in pure bf16 training.
    half = build_tiny().bfloat16()(x, key)
    assert seen["rates"] == {torch.float32} and half.isfinite().all()


def test_inference_mode_leaves_nothing_behind_that_training_stumbles_over():
    model = build_tiny(window_size=6)  # a size of its own: the masks are made under inference mode first
    x = recipe_input((1, 3, 6, 6))
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).mean().backward()


def test_initialization():
    torch.manual_seed(0)
    config = tiny_network(embed_dim=48, inner_rank=32, num_tokens=64, d_state=8, window_size=16, num_heads=[4, 4])
    model = build_model(config)
    layer = model.layers[1].residual_group["layers"][1]
    scan, linear = layer.assm.selectiveScan, layer.wqkv

    for weight in (linear.weight, layer.assm.route[0].weight, layer.win_mhsa.relative_position_bias_table):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1) and weight.abs().max() < 0.12
    assert not linear.bias.any() and not layer.assm.route[2].bias.any()
    assert (layer.norm1.weight == 1).all() and not layer.norm1.bias.any()
    assert (layer.scale1 == 1e-4).all() and (layer.scale2 == 1e-4).all()

    def uniform(weight, bound):
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)

    uniform(layer.embeddingA.weight, 1 / 32)
    uniform(layer.assm.embeddingB.weight, 1 / 64)
    uniform(scan.x_proj_weight, 48**-0.5)
    uniform(scan.dt_projs_weight, 3**-0.5)
    uniform(model.conv_first.weight, 27**-0.5)
    assert torch.equal(scan.A_logs, torch.log(torch.arange(1.0, 9)).expand(48, 8))
    assert (scan.Ds == 1).all()
    step = F.softplus(scan.dt_projs_bias)
    assert step.min() >= 0.999e-3 and step.max() <= 1.001e-1
    assert step.log().mean().item() == pytest.approx(np.log(1e-2), abs=0.5)


def test_layers_know_their_place():
    model = build_model(tiny_network(depths=[2, 1, 3], num_heads=[2, 2, 2]))
    places = [module.index for module in model.modules() if hasattr(module, "index") and not callable(module.index)]
    assert places == list(range(6))
    assert len(routers(model)) == 6 and all(isinstance(router, Router) for router in routers(model))
    assert isinstance(model, MambaIRv2)
