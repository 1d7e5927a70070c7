"""What looks through the network's operators: torch.compile on any device; on a GPU also CUDA graphs."""

import copy

import pytest
import torch
from networks import build_tiny, recorded_routes, tiny_network
from recipe import recipe_input

from mambair_ds.kernels.philox import NoiseKey
from mambair_ds.models import build_model
from mambair_ds.models.mambairv2 import AttentiveLayer

BOTH = pytest.mark.parametrize("kind", ["MambaIRv2", "MambaIRv2Light"])


def step(model, run, x, noise):
    """The output and the gradients of one training step."""
    model.zero_grad()
    out = run(x, noise)
    out.float().square().mean().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("kind", "use_checkpoint", "mixed"),
    [
        ("MambaIRv2", False, True),
        ("MambaIRv2Light", True, False),
        pytest.param("MambaIRv2", True, False, marks=pytest.mark.slow),
        pytest.param("MambaIRv2Light", True, True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_is_one_graph_and_equals_the_eager_one(kind, use_checkpoint, mixed):
    model = build_tiny(type=kind, use_checkpoint=use_checkpoint, depths=[2], num_heads=[2]).train()
    x = recipe_input((2, 3, 8, 12))
    noise = NoiseKey(3, torch.tensor([5, 9]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        expected = step(model, model, x, noise)
        actual = step(model, compiled, x, noise)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if mixed else 1e-4, atol=1e-3 if mixed else 1e-6)


@BOTH
def test_under_autocast_layers_add_to_a_float32_stream(kind):
    model, dtypes = build_tiny(type=kind), []
    for layer in model.modules():
        if isinstance(layer, AttentiveLayer):
            layer.register_forward_hook(lambda _, inputs, output: dtypes.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(recipe_input((1, 3, 8, 8)))
    assert dtypes and set(dtypes) == {torch.float32}


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("mixed", [False, True])
def test_the_network_on_a_gpu_equals_the_reference_on_the_cpu(kind, mixed):
    model, x = build_tiny(type=kind, embed_dim=24).train(), recipe_input((2, 3, 24, 40))
    noise = NoiseKey(3, torch.tensor([5, 9]))
    with recorded_routes(model) as routes:
        expected = step(model, model, x, noise)
    on_gpu, key = copy.deepcopy(model).cuda(), NoiseKey(3, noise.positions.cuda())
    with (
        recorded_routes(on_gpu, [index.cuda() for index in routes]) as own,
        torch.autocast("cuda", torch.bfloat16, enabled=mixed),
    ):
        actual = step(on_gpu, on_gpu, x.cuda(), key)
    agree = [(a.cpu() == b).float().mean().item() for a, b in zip(own, routes, strict=True)]
    assert min(agree) > (0.9 if mixed else 0.995)
    for a, b in zip(actual, expected, strict=True):
        error = ((a.float().cpu() - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()
        assert error < (0.1 if mixed else 1e-3)


@pytest.mark.gpu
@BOTH
def test_two_steps_on_a_gpu_agree_to_the_bit(kind):
    torch.backends.cudnn.deterministic = True
    model, x = build_tiny(type=kind, embed_dim=24).cuda().train(), recipe_input((2, 3, 24, 40)).cuda()
    noise = NoiseKey(3, torch.tensor([5, 9], device="cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        for a, b in zip(step(model, model, x, noise), step(model, model, x, noise), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@BOTH
def test_a_step_is_captured_in_a_cuda_graph(kind):
    model, x = build_tiny(type=kind, embed_dim=24).cuda().train(), recipe_input((2, 3, 24, 40)).cuda()
    noise = NoiseKey(3, torch.tensor([5, 9], device="cuda"))
    expected = step(model, model, x, noise)
    model.zero_grad(set_to_none=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(x, noise).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        out = model(x, noise)
        out.square().mean().backward()
    graph.replay()
    torch.testing.assert_close(out.detach(), expected[0])
    for parameter, grad in zip(model.parameters(), expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.gpu
def test_the_published_base_network_trains_a_step_on_a_gpu():
    model = build_model(tiny_network(type="MambaIRv2", embed_dim=174, d_state=16, num_heads=[6, 6], window_size=16,
                                     inner_rank=64, num_tokens=128, mlp_ratio=2.0)).cuda().train()  # fmt: skip
    noise = NoiseKey(3, torch.arange(4, device="cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        grads = step(model, torch.compile(model, fullgraph=True), torch.rand(4, 3, 64, 64, device="cuda"), noise)
    assert all(grad.isfinite().all() for grad in grads)
