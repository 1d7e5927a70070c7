"""The fused linear layer: Triton against float64, the plain operations as they were, determinism, refusals."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambair_ds.kernels.linear import linear

# What the network puts around its linear layers.
USES = ["", "norm", "norm gelu", "gelu", "residual", "norm residual", "residual skip", "norm gelu residual skip"]


def make_inputs(
    shape: tuple[int, ...], outputs: int, use: str, dtype: torch.dtype = torch.float32, bias: bool = True
) -> dict[str, Any]:
    """The operator's arguments; parameters are float32, as under mixed precision."""
    generator = torch.Generator().manual_seed(outputs)
    inputs, rows = shape[-1], shape[:-1]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    arguments: dict[str, Any] = {
        "x": (draw(*shape) + 1).to(dtype),
        "weight": draw(outputs, inputs) / inputs**0.5,
        "gelu": "gelu" in use,
    }
    if bias:
        arguments["bias"] = draw(outputs)
    if "norm" in use:
        arguments |= {"norm_weight": 1 + 0.3 * draw(inputs), "norm_bias": draw(inputs)}
    if "residual" in use:
        arguments["residual"] = draw(*rows, outputs).to(dtype)
    if "skip" in use:
        arguments |= {"skip": draw(*rows, outputs).to(dtype), "skip_scale": draw(outputs)}
    return arguments


def apply(inputs: dict[str, Any], backend: str | None) -> Tensor:
    others = {name: value for name, value in inputs.items() if not name.startswith("norm_")}
    norm = (inputs["norm_weight"], inputs["norm_bias"]) if "norm_weight" in inputs else None
    return linear(**others, norm=norm, backend=backend)


def run(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """The result and the gradients of all inputs, by name, for a fixed gradient of the result."""
    inputs = convert(inputs, lambda x: x.detach().requires_grad_())
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    y = apply(inputs, backend)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return {"y": y.detach(), **dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), grad_y), strict=True))}


def convert(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def assert_matches_reference(inputs: dict[str, Any], tolerance: float) -> None:
    """Compare Triton with the float64 reference; `tolerance` is relative to each tensor's largest absolute value."""
    actual = run(inputs, "triton")
    expected = run(convert(inputs, lambda x: x.double()), "reference")
    for name, value in actual.items():
        assert value.dtype == inputs["x" if name == "y" else name].dtype, name
        assert value.shape == expected[name].shape, name
        error = ((value.double() - expected[name]).abs().max() / expected[name].abs().max()).item()
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("use", USES)
def test_reference_gradients_equal_finite_differences(use: str) -> None:
    inputs = convert(make_inputs((2, 2, 3), 2, use), lambda x: x.double().requires_grad_())
    names = [name for name, x in inputs.items() if isinstance(x, Tensor)]

    def call(*tensors: Tensor) -> Tensor:
        return apply({**inputs, **dict(zip(names, tensors, strict=True))}, "reference")

    assert torch.autograd.gradcheck(call, [inputs[name] for name in names])


def test_on_a_cpu_it_is_what_the_modules_compute_to_the_bit() -> None:
    torch.manual_seed(0)
    norm, layer = torch.nn.LayerNorm(29), torch.nn.Linear(29, 58)
    x, scale = torch.randn(2, 5, 29), torch.randn(58)
    y, skip = torch.randn(2, 5, 58), torch.randn(2, 5, 58)
    expected = scale * skip + (F.gelu(layer(norm(x))) + y)
    options = {"gelu": True, "residual": y, "skip": skip, "skip_scale": scale}
    actual = linear(x, layer.weight, layer.bias, norm=(norm.weight, norm.bias), **options)
    assert torch.equal(actual, expected)


def sizes() -> Iterator[Any]:
    """Shapes of x, numbers of outputs, and uses."""
    for use in USES:
        yield (2, 3, 29), 58, use
        for shape, outputs in [((4097, 174), 522), ((300, 348), 174), ((2, 65, 65, 174), 348), ((300, 48), 144)]:
            yield pytest.param(shape, outputs, use, marks=pytest.mark.gpu)
    yield (1, 87), 29, USES[-1]
    for shape, outputs in [((3, 33, 29), 87), ((17, 174), 29), ((17, 210), 29)]:
        for use in ("norm", "norm gelu residual skip"):
            yield pytest.param(shape, outputs, use, marks=pytest.mark.slow)


@pytest.mark.parametrize(("shape", "outputs", "use"), sizes())
def test_triton_gradients_equal_the_reference(shape: tuple[int, ...], outputs: int, use: str, device: str) -> None:
    assert_matches_reference(convert(make_inputs(shape, outputs, use), lambda x: x.to(device)), 1e-5)


def test_rows_beyond_one_block_and_no_bias(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambair_ds.kernels.linear.triton.PROGRAMS", 4)  # so that ranges of rows take several steps
    inputs = make_inputs((70, 17), 70, "norm gelu residual skip", bias=False)
    assert_matches_reference(convert(inputs, lambda x: x.to(device)), 1e-5)


def test_inputs_that_fill_whole_tiles(device: str) -> None:
    assert_matches_reference(convert(make_inputs((17, 64), 64, "norm"), lambda x: x.to(device)), 1e-5)


@pytest.mark.parametrize(
    ("shape", "outputs", "use"),
    [
        ((70, 58), 65, "norm gelu"),
        ((2, 9, 24), 48, "residual skip"),
        pytest.param((4097, 174), 522, "norm", marks=pytest.mark.gpu),
        pytest.param((4097, 174), 348, "norm gelu", marks=pytest.mark.gpu),
        pytest.param((4097, 348), 174, "norm residual", marks=pytest.mark.gpu),
        pytest.param((4097, 348), 174, "residual skip", marks=pytest.mark.gpu),
    ],
)
def test_bfloat16_in_and_out_with_float32_sums(shape: tuple[int, ...], outputs: int, use: str, device: str) -> None:
    inputs = make_inputs(shape, outputs, use, torch.bfloat16)
    assert_matches_reference(convert(inputs, lambda x: x.to(device)), 2**-6)  # x̂, W γ and g' are rounded on their way


def test_a_row_far_from_zero_keeps_its_statistics(device: str) -> None:
    inputs = make_inputs((5, 29), 58, "norm")
    inputs["x"] += 1000
    assert_matches_reference(convert(inputs, lambda x: x.to(device)), 2e-3)  # float32 leaves 1000 + x about 6e-5


def test_gelu_is_the_exact_one_in_its_tails(device: str) -> None:
    values = torch.tensor([-60.0, -8.0, -4.0, -0.5, 0.0, 1e-3, 2.0, 9.0, 60.0])
    x, weight = torch.zeros(1, 1, device=device), torch.zeros(9, 1, device=device)
    bias = values.to(device).requires_grad_()
    y = linear(x, weight, bias, gelu=True, backend="triton")
    (slope,) = torch.autograd.grad(y.sum(), bias)
    exact = values.double().requires_grad_()
    gelu = exact * 0.5 * torch.erfc(-exact / 2**0.5)
    (exact_slope,) = torch.autograd.grad(gelu.sum(), exact)
    assert (y[0].double().cpu() - gelu).abs().max() <= 6e-7 + 9 * 2**-23
    assert (slope.double().cpu() - exact_slope).abs().max() <= 1e-6


def test_wide_rows_are_left_to_torch(device: str) -> None:
    inputs = convert(make_inputs((3, 520), 5, "norm gelu"), lambda x: x.to(device))
    assert_matches_reference(inputs, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_under_autocast_the_residual_decides_on_the_dtype(backend: str, device: str) -> None:
    place = device if backend == "triton" else "cpu"
    inputs = convert(make_inputs((2, 3, 29), 58, "norm residual"), lambda x: x.to(place))
    exact = apply(convert(inputs, lambda x: x.double()), "reference")
    with torch.autocast(place, torch.bfloat16):
        y = apply(inputs, backend)
        assert y.dtype == torch.float32
        inputs["residual"] = inputs["residual"].bfloat16()
        assert apply(inputs, backend).dtype == torch.bfloat16
        del inputs["residual"]
        assert apply(inputs, backend).dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() <= 2**-6 * exact.abs().max()


def test_two_triton_runs_agree_to_the_bit(device: str) -> None:
    inputs = convert(make_inputs((40, 29), 58, "norm gelu residual skip"), lambda x: x.to(device))
    first, second = run(inputs, "triton"), run(inputs, "triton")
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("use", ["", "norm gelu residual skip"])
def test_triton_operator_passes_torchs_own_checks(use: str, device: str) -> None:
    inputs = convert(make_inputs((2, 3, 5), 4, use, bias=bool(use)), lambda x: x.to(device).requires_grad_())
    apply(inputs, "triton")  # registers it
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual", "skip", "skip_scale")
    torch.library.opcheck(
        torch.ops.mambair_ds.linear_triton.default,
        (*(inputs.get(name) for name in names), inputs["gelu"], torch.float32),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_only_the_inputs_and_two_numbers_a_row_are_kept_for_the_backward_pass(device: str) -> None:
    inputs = convert(make_inputs((8, 4), 3, "norm gelu residual skip"), lambda x: x.to(device).requires_grad_())
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        apply(inputs, "triton")
    for tensor in inputs.values():
        saved.pop(tensor.data_ptr() if isinstance(tensor, Tensor) else 0, None)
    assert list(saved.values()) == [2 * 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": torch.zeros(2, 4)}, "skip and skip_scale come together"),
        ({"skip_scale": torch.zeros(4)}, "skip and skip_scale come together"),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4,\), expected \(out, in\)"),
        ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\), expected \(..., 3\)"),
        ({"x": torch.zeros(0, 3)}, r"x has shape \(0, 3\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), expected \(4,\)"),
        ({"norm": (torch.zeros(3), torch.zeros(4))}, r"norm's bias has shape \(4,\), expected \(3,\)"),
        ({"residual": torch.zeros(4)}, r"residual has shape \(4,\), expected \(2, 4\)"),
        ({"skip": torch.zeros(2, 3), "skip_scale": torch.zeros(4)}, r"skip has shape \(2, 3\), expected \(2, 4\)"),
        ({"residual": torch.zeros(2, 4, device="meta")}, "residual is on meta, but x on cpu"),
        ({"residual": torch.zeros(2, 4).int()}, "residual is torch.int32, expected torch.float32"),
        ({"x": torch.zeros(2, 3).double(), "backend": "triton"}, "x is torch.float64, expected torch.float32"),
        ({"backend": "cuda"}, "no backend 'cuda'; there are reference, torch, triton"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**{"x": torch.zeros(2, 3), "weight": torch.zeros(4, 3), **change})
