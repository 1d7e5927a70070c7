"""The depthwise convolution: every backend against float64, exact reproducibility, refusals, builds for GPUs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambair_ds.kernels.depthwise_conv import depthwise_conv

EPILOGUES = ["none", "gelu_residual", "sigmoid_gate", "norm_gate"]


def make_inputs(shape: tuple[int, int, int, int], k: int, epilogue: str, dtype: torch.dtype = torch.float32) -> dict:
    """The operator's arguments; the gate is a half of a tensor, as in the network."""
    generator = torch.Generator().manual_seed(k)
    channels = shape[-1]
    inputs: dict[str, Any] = {
        "x": torch.randn(shape, generator=generator).to(dtype),
        "weight": torch.randn(channels, 1, k, k, generator=generator) / k,
        "bias": torch.randn(channels, generator=generator),
        "epilogue": epilogue,
    }
    if epilogue == "norm_gate":
        inputs["x"] = 3 * inputs["x"] + 1  # the norm has something to do
        inputs["norm_weight"] = torch.randn(channels, generator=generator)
        inputs["norm_bias"] = torch.randn(channels, generator=generator)
    if epilogue == "norm_gate":
        inputs["gate"] = torch.randn(*shape[:3], 2 * channels, generator=generator).to(dtype).chunk(2, -1)[0]
    return inputs


def apply(inputs: dict, backend: str) -> Tensor:
    inputs = dict(inputs)
    if "norm_weight" in inputs:
        inputs["norm"] = inputs.pop("norm_weight"), inputs.pop("norm_bias")
    return depthwise_conv(**inputs, backend=backend)


def operands(inputs: dict) -> tuple:
    """As the registered operators take them, which call the norm's epilogue as that without."""
    names = ("x", "weight", "bias", "gate", "norm_weight", "norm_bias")
    return *(inputs.get(name) for name in names), inputs["epilogue"].removeprefix("norm_")


def run(inputs: dict, backend: str) -> dict[str, Tensor]:
    """The result and the gradients of all inputs, by name, for a fixed gradient of the result."""
    inputs = {name: x.detach().requires_grad_() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    y = apply(inputs, backend)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return {"y": y.detach(), **dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), grad_y), strict=True))}


def convert(inputs: dict, change: Callable[[Tensor], Tensor]) -> dict:
    return {name: change(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def assert_matches_reference(inputs: dict, backend: str, tolerance: float) -> None:
    """Compare with the float64 reference; `tolerance` is relative to each tensor's largest absolute value."""
    actual = run(inputs, backend)
    expected = run(convert(inputs, lambda x: x.double()), "reference")
    for name, value in actual.items():
        assert value.dtype == (inputs["x"].dtype if name == "y" else inputs[name].dtype), name
        error, largest = (value.double() - expected[name]).abs().max().item(), expected[name].abs().max().item()
        assert error <= tolerance * largest, f"{name} is off by {error:.1e}, its largest value is {largest:.1e}"


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_reference_gradients_equal_finite_differences(epilogue: str) -> None:
    inputs = convert(make_inputs((1, 3, 2, 2), 3, epilogue), lambda x: x.double().requires_grad_())
    names = [name for name, x in inputs.items() if isinstance(x, Tensor)]
    tensors = [inputs[name] for name in names]

    def function(*tensors: Tensor) -> Tensor:
        return apply({**dict(zip(names, tensors, strict=True)), "epilogue": epilogue}, "reference")

    assert torch.autograd.gradcheck(function, tensors)


def test_reference_is_the_sum_over_the_kernel() -> None:
    inputs = make_inputs((1, 4, 3, 2), 3, "none")
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    expected = bias.expand(x.shape).clone()
    for row in range(4):
        for column in range(3):
            for i in range(max(0, row - 1), min(4, row + 2)):
                for j in range(max(0, column - 1), min(3, column + 2)):
                    expected[0, row, column] += weight[:, 0, i - row + 1, j - column + 1] * x[0, i, j]
    torch.testing.assert_close(apply(inputs, "reference"), expected)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    ("shape", "k"),
    [((2, 1, 1, 3), 1), ((2, 17, 35, 87), 5), ((1, 5, 3, 48), 3), ((1, 33, 9, 174), 3), ((1, 4, 4, 3), 7)],
)
def test_cpu_gradients_equal_the_reference(shape: tuple[int, int, int, int], k: int, epilogue: str) -> None:
    assert_matches_reference(make_inputs(shape, k, epilogue), "torch", 1e-5)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((1, 3, 2, 5), 3),
        pytest.param((1, 3, 5, 87), 5, marks=pytest.mark.slow),
        pytest.param((1, 18, 5, 33), 3, marks=pytest.mark.slow),
        pytest.param((2, 17, 35, 87), 5, marks=pytest.mark.gpu),
        pytest.param((2, 33, 50, 174), 3, marks=pytest.mark.gpu),
        pytest.param((1, 64, 64, 348), 5, marks=pytest.mark.gpu),
    ],
)
def test_triton_gradients_equal_the_reference(
    shape: tuple[int, int, int, int], k: int, epilogue: str, device: str
) -> None:
    assert_matches_reference(convert(make_inputs(shape, k, epilogue), lambda x: x.to(device)), "triton", 1e-5)


@pytest.mark.parametrize(
    ("shape", "k", "epilogue"), [((1, 33, 5, 33), 3, "sigmoid_gate"), ((1, 13, 9, 6), 5, "gelu_residual")]
)
def test_triton_walks_across_tiles_and_blocks_of_channels(
    shape: tuple[int, int, int, int], k: int, epilogue: str, device: str
) -> None:
    inputs = make_inputs(shape, k, epilogue)
    assert_matches_reference(convert(inputs, lambda x: x.to(device)), "triton", 1e-5)


@pytest.mark.parametrize(
    ("backend", "epilogue", "k"),
    [
        ("torch", "gelu_residual", 5),
        ("torch", "norm_gate", 5),
        ("triton", "gelu_residual", 3),
        ("triton", "norm_gate", 3),
    ],
)
def test_bfloat16_in_and_out_with_float32_sums(backend: str, epilogue: str, k: int, device: str) -> None:
    inputs = make_inputs((1, 4, 5, 6), k, epilogue, torch.bfloat16)
    inputs = convert(inputs, lambda x: x.to(device if backend == "triton" else "cpu"))
    assert_matches_reference(inputs, backend, 2**-6)  # the gradient of c is rounded on its way


def test_gelu_is_the_exact_one_in_its_tails(device: str) -> None:
    x = torch.zeros(1, 3, 3, 1, device=device)
    weight = torch.zeros(1, 1, 1, 1, device=device)
    for value in (-8.0, -3.0, -0.5, 0.0, 1e-3, 2.0, 9.0):
        bias = torch.tensor([value], device=device, requires_grad=True)
        y = depthwise_conv(x, weight, bias, "gelu_residual", backend="triton")[0, 1, 1, 0]
        exact = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        gelu = exact * 0.5 * torch.erfc(-exact / 2**0.5)
        (slope,) = torch.autograd.grad(gelu, exact)
        (grad,) = torch.autograd.grad(y, bias)
        assert abs(y.item() - gelu.item()) <= 1e-7 + 3e-6 * abs(gelu.item())
        assert abs(grad.item() - slope.item()) <= 5e-7


@pytest.mark.parametrize("epilogue", EPILOGUES[:-1])  # PyTorch's norm adds its weight's gradient by threads
def test_cpu_results_do_not_depend_on_batch_threads_or_time(epilogue: str) -> None:
    inputs = make_inputs((3, 20, 35, 70), 5, epilogue)
    threads = torch.get_num_threads()
    together = run(inputs, "torch")
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for name, value in run(inputs, "torch").items():
                assert torch.equal(value, together[name]), name
    finally:
        torch.set_num_threads(threads)

    grad_y = torch.randn(together["y"].shape, generator=torch.Generator().manual_seed(1))
    singles = []
    for i in range(3):
        sample = convert(inputs, lambda x, i=i: (x[i : i + 1] if x.shape[0] == 3 else x).detach().requires_grad_())
        tensors = [x for x in sample.values() if isinstance(x, Tensor)]
        y = apply(sample, "torch")
        assert torch.equal(y, together["y"][i : i + 1])
        singles.append(torch.autograd.grad(y, tensors, grad_y[i : i + 1]))
    for k, name in enumerate(name for name in inputs if name != "epilogue"):
        parts = [single[k] for single in singles]
        joined = torch.cat(parts) if name in ("x", "gate") else parts[0] + parts[1] + parts[2]
        assert torch.equal(joined, together[name]), name


def test_two_triton_runs_agree_to_the_bit(device: str) -> None:
    inputs = convert(make_inputs((2, 3, 6, 5), 3, "norm_gate"), lambda x: x.to(device))
    first, second = run(inputs, "triton"), run(inputs, "triton")
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("epilogue", EPILOGUES[:-1])  # the norm stands before the operator there
def test_cpu_operator_passes_torchs_own_checks(epilogue: str) -> None:
    inputs = convert(make_inputs((1, 4, 3, 2), 3, epilogue), lambda x: x.requires_grad_())
    apply(inputs, "torch")  # registers it
    torch.library.opcheck(torch.ops.mambair_ds.depthwise_conv_cpu.default, operands(inputs))


def test_triton_operator_passes_torchs_own_checks(device: str) -> None:
    inputs = convert(make_inputs((1, 2, 2, 2), 3, "norm_gate"), lambda x: x.to(device).requires_grad_())
    apply(inputs, "triton")
    torch.library.opcheck(
        torch.ops.mambair_ds.depthwise_conv_triton.default,
        operands(inputs),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass() -> None:
    inputs = convert(make_inputs((1, 8, 8, 4), 5, "gelu_residual"), lambda x: x.requires_grad_())
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        apply(inputs, "torch")
    assert set(saved) <= {x.data_ptr() for x in inputs.values() if isinstance(x, Tensor)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epilogue": "relu"}, "no epilogue 'relu'; there are none, gelu_residual, sigmoid_gate, norm_gate"),
        ({"epilogue": "norm_gate"}, "epilogue 'norm_gate' needs a gate"),
        ({"gate": torch.zeros(1, 4, 3, 2)}, "epilogue 'none' takes no gate"),
        ({"epilogue": "norm_gate", "gate": torch.zeros(1, 4, 3, 2)}, "epilogue 'norm_gate' needs a norm"),
        ({"norm": (torch.ones(2), torch.zeros(2))}, "epilogue 'none' takes no norm"),
        (
            {"epilogue": "norm_gate", "gate": torch.zeros(1, 4, 3, 2), "norm": (torch.ones(2), torch.zeros(3))},
            r"norm's bias has shape \(3,\), expected \(2,\)",
        ),
        (
            {"epilogue": "norm_gate", "gate": torch.zeros(1, 4, 3, 1), "norm": (torch.ones(2), torch.zeros(2))},
            r"gate has shape \(1, 4, 3, 1\), but x \(1, 4, 3, 2\)",
        ),
        ({"x": torch.zeros(4, 3, 2)}, r"x has shape \(4, 3, 2\)"),
        ({"weight": torch.zeros(2, 1, 4, 4)}, r"weight has shape \(2, 1, 4, 4\), expected \(2, 1, k, k\), k odd"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), expected \(2,\)"),
        ({"bias": torch.zeros(2, device="meta")}, "bias is on meta, but x on cpu"),
        ({"x": torch.zeros(1, 4, 3, 2).double(), "backend": "torch"}, "x is torch.float64, expected torch.float32"),
        ({"backend": "cuda"}, "no backend 'cuda'; there are reference, torch, triton"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**{**make_inputs((1, 4, 3, 2), 3, "none"), **change})
