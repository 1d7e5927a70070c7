"""Window attention: every backend against float64, shifted and not; exact reproducibility, refusals, torch's checks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mambair_ds.kernels.window_attention import window_attention
from mambair_ds.kernels.window_attention.reference import regions, relative_position_index

Sizes = tuple[int, int, int, int, int, int]
"""Batch, height, width, heads, width of a head, window size."""


def make_inputs(sizes: Sizes, shifted: bool, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """The operator's arguments, with logits of up to ten."""
    batch, height, width, heads, dim, w = sizes
    generator = torch.Generator().manual_seed(height + width)
    qkv = 1.5 * torch.randn(batch, height, width, 3 * heads * dim, generator=generator)
    table = torch.randn((2 * w - 1) ** 2, heads, generator=generator)
    return {
        "qkv": qkv.to(device, dtype),
        "table": table.to(device),
        "num_heads": heads,
        "window_size": w,
        "shift": w // 2 if shifted else 0,
    }


def run(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """The result and the gradients of qkv and table, by name, for a fixed gradient of the result."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("qkv", "table")}
    out = window_attention(**{**inputs, **leaves}, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True)),
    }


def assert_matches_reference(inputs: dict[str, Any], backend: str, tolerance: float) -> None:
    """Compare with the float64 reference; `tolerance` is relative to each tensor's largest absolute value."""
    actual = run(inputs, backend)
    expected = run({name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}, "reference")
    for name, value in actual.items():
        assert value.dtype == inputs["qkv" if name == "out" else name].dtype, name
        assert value.shape == expected[name].shape, name
        error = ((value.double() - expected[name]).abs().max() / expected[name].abs().max()).item()
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("shifted", [False, True])
def test_reference_gradients_equal_finite_differences(shifted: bool) -> None:
    inputs = make_inputs((1, 4, 2, 2, 2, 2), shifted, torch.float64)
    qkv, table = inputs.pop("qkv").requires_grad_(), inputs.pop("table").double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: window_attention(*x, **inputs, backend="reference"), (qkv, table))


@pytest.mark.parametrize("shifted", [False, True])
def test_reference_is_the_softmax_over_a_window_pixel_by_pixel(shifted: bool) -> None:
    inputs = make_inputs((1, 6, 9, 2, 3, 3), shifted)
    qkv, table, shift = inputs["qkv"][0].unflatten(-1, (3, 2, 3)), inputs["table"], inputs["shift"]
    out = window_attention(**inputs, backend="reference")[0].unflatten(-1, (2, 3))
    for row, column, head in [(0, 0, 0), (2, 5, 1), (5, 8, 0), (0, 8, 1), (4, 3, 0)]:
        top, left = (row - shift) % 6 // 3 * 3, (column - shift) % 9 // 3 * 3  # of the window in the rolled picture
        logits, values = [], []
        for i in range(3):
            for j in range(3):
                y, x = (top + i + shift) % 6, (left + j + shift) % 9
                down, across = (row - shift) % 6 - top - i, (column - shift) % 9 - left - j
                logit = qkv[row, column, 0, head] @ qkv[y, x, 1, head] / 3**0.5
                logit = logit + table[(down + 2) * 5 + across + 2, head]
                torn = abs(y - row) >= 3 or abs(x - column) >= 3  # brought together across the border
                logits.append(logit - 100 if torn else logit)
                values.append(qkv[y, x, 2, head])
        expected = torch.stack(logits).softmax(0) @ torch.stack(values)
        torch.testing.assert_close(out[row, column, head], expected)


def test_pixels_across_the_border_are_kept_apart_by_100_and_no_more() -> None:
    """With keys that outweigh the mask, the border is crossed: it is no -inf."""
    inputs = make_inputs((1, 4, 4, 1, 4, 4), True)
    inputs["table"].zero_()
    inputs["qkv"].zero_()
    inputs["qkv"][..., 0] = 20.0  # queries
    inputs["qkv"][0, 0, 0, 4] = 20.0  # the key of one pixel: a logit of 200
    inputs["qkv"][0, 0, 0, 8] = 1.0
    for backend in ("reference", "torch"):
        out = window_attention(**inputs, backend=backend)
        assert out[0, 3, 3, 0] == 1, backend


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(2, 8, 12, 2, 5, 4), (1, 32, 16, 3, 12, 16), (1, 8, 8, 2, 29, 8), (1, 18, 6, 1, 33, 6), (1, 6, 3, 2, 1, 3)],
)
def test_cpu_gradients_equal_the_reference(sizes: Sizes, shifted: bool) -> None:
    assert_matches_reference(make_inputs(sizes, shifted), "torch", 1e-5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 8, 4, 2, 5, 4),
        (1, 8, 16, 1, 29, 8),
        pytest.param((1, 16, 16, 1, 12, 16), marks=pytest.mark.slow),
        pytest.param((2, 32, 16, 2, 29, 16), marks=pytest.mark.slow),
        pytest.param((2, 20, 24, 3, 33, 4), marks=pytest.mark.slow),
        pytest.param((2, 48, 64, 6, 29, 16), marks=pytest.mark.gpu),
        pytest.param((2, 64, 64, 4, 12, 16), marks=pytest.mark.gpu),
        pytest.param((1, 128, 128, 6, 29, 16), marks=pytest.mark.gpu),
        pytest.param((3, 24, 40, 5, 48, 8), marks=pytest.mark.gpu),
    ],
)
def test_triton_gradients_equal_the_reference(sizes: Sizes, shifted: bool, device: str) -> None:
    assert_matches_reference(make_inputs(sizes, shifted, device=device), "triton", 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sizes", [(1, 4, 8, 2, 5, 4), pytest.param((2, 64, 64, 6, 29, 16), marks=pytest.mark.gpu)])
def test_bfloat16_in_and_out_with_float32_sums(sizes: Sizes, backend: str, device: str) -> None:
    inputs = make_inputs(sizes, True, torch.bfloat16, device if backend == "triton" else "cpu")
    assert_matches_reference(inputs, backend, 2**-6)  # weights and their gradients are rounded before the next product


def test_logits_far_apart_do_not_overflow() -> None:
    inputs = make_inputs((1, 8, 8, 2, 5, 4), True)
    inputs["qkv"] *= 100
    result = run(inputs, "torch")
    assert all(x.isfinite().all() for x in result.values())
    exact = window_attention(**{**inputs, "qkv": inputs["qkv"].double()}, backend="reference")
    assert (result["out"] - exact).norm() <= 1e-2 * exact.norm()  # logits of 1e5 have a rounding error of 1e-2


@pytest.mark.parametrize("shifted", [False, True])
def test_cpu_results_do_not_depend_on_threads_or_batch(shifted: bool) -> None:
    inputs = make_inputs((2, 12, 12, 3, 12, 4), shifted)
    together = run(inputs, "torch")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(x, together[name]) for name, x in run(inputs, "torch").items())
    finally:
        torch.set_num_threads(threads)
    grad = torch.randn(together["out"].shape, generator=torch.Generator().manual_seed(1))
    for i in range(2):
        qkv = inputs["qkv"][i : i + 1].requires_grad_()
        out = window_attention(**{**inputs, "qkv": qkv}, backend="torch")
        assert torch.equal(out, together["out"][i : i + 1])
        assert torch.equal(torch.autograd.grad(out, qkv, grad[i : i + 1])[0], together["qkv"][i : i + 1])


@pytest.mark.parametrize("sizes", [(2, 4, 8, 2, 5, 4), pytest.param((8, 64, 64, 6, 29, 16), marks=pytest.mark.gpu)])
def test_two_triton_runs_agree_to_the_bit(sizes: Sizes, device: str) -> None:
    inputs = make_inputs(sizes, True, device=device)
    first, second = run(inputs, "triton"), run(inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_inputs_and_gradients(backend: str, device: str) -> None:
    inputs = make_inputs((1, 4, 4, 2, 3, 4), True, device=device if backend == "triton" else "cpu")
    wide = torch.cat([inputs["qkv"]] * 2, -1)[..., : inputs["qkv"].shape[-1]].transpose(1, 2).requires_grad_()
    out = window_attention(**{**inputs, "qkv": wide}, backend=backend).transpose(1, 2)
    expected = window_attention(**{**inputs, "qkv": wide.contiguous()}, backend="reference").transpose(1, 2)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), wide)[0] for y in (out, expected)))


def test_cpu_operator_passes_torchs_own_checks() -> None:
    inputs = make_inputs((1, 4, 2, 2, 3, 2), True)
    window_attention(**inputs, backend="torch")  # registers it
    arguments = (inputs["qkv"].requires_grad_(), inputs["table"].requires_grad_(), 2, 2, 1)
    torch.library.opcheck(torch.ops.mambair_ds.window_attention_cpu.default, arguments)


def test_triton_operator_passes_torchs_own_checks(device: str) -> None:
    inputs = make_inputs((1, 4, 4, 1, 3, 4), True, device=device)
    window_attention(**inputs, backend="triton")
    torch.library.opcheck(
        torch.ops.mambair_ds.window_attention_triton.default,
        (inputs["qkv"].requires_grad_(), inputs["table"].requires_grad_(), 1, 4, 2),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_one_number_a_pixel_and_head_is_kept_besides_inputs_and_result() -> None:
    inputs = make_inputs((1, 8, 8, 2, 5, 4), True)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    leaves = {name: inputs[name].requires_grad_() for name in ("qkv", "table")}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = window_attention(**{**inputs, **leaves}, backend="torch")
    known = {out.data_ptr(), *(x.data_ptr() for x in leaves.values())}
    assert sum(x.numel() for x in saved if x.data_ptr() not in known) == 8 * 8 * 2


def test_regions_and_relative_positions() -> None:
    assert regions(4, 4, 0).eq(0).all()
    assert regions(4, 4, 1).tolist() == [[0, 0, 0, 1]] * 3 + [[2, 2, 2, 3]]
    index = relative_position_index(3)
    assert index.shape == (9, 9) and index[0, 0] == 12 and index[8, 0] == 24 and index[1, 0] == 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(4, 4, 12)}, r"qkv has shape \(4, 4, 12\), expected \(batch, height, width, 3·C\)"),
        ({"num_heads": 5}, "12 channels are no multiple of 3 × 5 heads"),
        ({"qkv": torch.zeros(1, 6, 4, 12)}, "6×4 pixels do not divide into windows of 4"),
        ({"shift": 1}, "shift is 1, expected 0 or 2"),
        ({"table": torch.zeros(49, 3)}, r"table has shape \(49, 3\), expected \(49, 2\)"),
        ({"table": torch.zeros(49, 2, device="meta")}, "table is on meta, but qkv on cpu"),
        (
            {"qkv": torch.zeros(1, 4, 4, 12).double(), "backend": "torch"},
            "qkv is torch.float64, expected torch.float32",
        ),
        ({"window_size": 2, "shift": 1, "table": torch.zeros(9, 2), "backend": "triton"}, "windows of 4, 8 and 16"),
        ({"backend": "cuda"}, "no backend 'cuda'; there are reference, torch, triton"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_attention(**{**make_inputs((1, 4, 4, 2, 2, 4), False), **change})
