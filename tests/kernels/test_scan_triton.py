"""The selective scan's Triton backend: on a GPU if there is one, else interpreted.

The interpreter takes about a second for a chunk of sixteen positions and two states, so sizes are small by default.
"""

import pytest
import torch
import triton
import triton.language as tl
from scan_inputs import assert_matches_reference, make_inputs, make_route, run

from mambair_ds.kernels.selective_scan import selective_scan
from mambair_ds.kernels.selective_scan import triton as scan
from mambair_ds.kernels.selective_scan.matrix_units import sum_lanes


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [
        (2, 1, 1, 5),
        (2, 19, 3, 2),
        (1, 17, 48, 8),
        (1, 14, 3, 16),
        (1, 100, 2, 2),
        (1, 80, 33, 1),
        pytest.param(1, 300, 48, 8, marks=pytest.mark.slow),
        pytest.param(2, 17, 87, 16, marks=pytest.mark.slow),
        pytest.param(1, 300, 174, 16, marks=pytest.mark.gpu),
        pytest.param(2, 4096, 48, 8, marks=pytest.mark.gpu),
        pytest.param(2, 4097, 348, 16, marks=pytest.mark.gpu),
    ],
)
def test_gradients_equal_the_reference(batch: int, length: int, channels: int, states: int, device: str) -> None:
    prompt, order = make_route(batch, length, states)
    inputs = [x.to(device) for x in (*make_inputs(batch, length, channels, states), prompt)]
    assert_matches_reference(inputs, True, "triton", 1e-5, order.to(device))


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"), [(2, 32, 3, 2), pytest.param(2, 4096, 348, 16, marks=pytest.mark.gpu)]
)
def test_prompt_and_order_may_be_left_out(batch: int, length: int, channels: int, states: int, device: str) -> None:
    prompt, order = (x.to(device) for x in make_route(batch, length, states))
    inputs = [x.to(device) for x in make_inputs(batch, length, channels, states)]
    assert_matches_reference(inputs, True, "triton", 1e-5)
    assert_matches_reference([*inputs, prompt], True, "triton", 1e-5)
    assert_matches_reference(inputs, True, "triton", 1e-5, order)


def test_without_softplus(device: str) -> None:
    inputs = make_inputs(1, 14, 5, 3)
    inputs[1], inputs[6] = inputs[1].abs(), torch.zeros(5)
    assert_matches_reference([x.to(device) for x in inputs], False, "triton", 1e-5)


def test_leaving_out_D_and_bias_means_zero(device: str) -> None:
    u, delta, A, B, C, _, _ = (x.to(device) for x in make_inputs(1, 14, 5, 3))
    y = selective_scan(u, delta, A, B, C, backend="triton")
    torch.testing.assert_close(y, selective_scan(u, delta, A, B, C, backend="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"), [(1, 20, 7, 2), pytest.param(2, 4096, 348, 16, marks=pytest.mark.gpu)]
)
def test_bfloat16_in_and_out_with_a_float32_state(
    batch: int, length: int, channels: int, states: int, device: str
) -> None:
    prompt, order = make_route(batch, length, states)
    inputs = [*make_inputs(batch, length, channels, states), prompt]
    inputs = [(x if x.ndim < 3 else x.bfloat16()).to(device) for x in inputs]
    result = run(inputs, True, "triton", order.to(device))
    assert [result[name].dtype for name in ("y", "u", "delta", "B", "C")] == [torch.bfloat16] * 5
    assert [result[name].dtype for name in ("A", "D", "delta_bias")] == [torch.float32] * 3
    # The interpreter cuts digits off instead of rounding, and on a GPU sums and products are in TF32.
    assert_matches_reference(inputs, True, "triton", 2**-7, order.to(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test above runs the units themselves")
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "routed"),
    [
        (2, 16, 4, 8, True),  # fewer channels than lanes
        (1, 21, 68, 8, True),  # two blocks, and an end within a chunk
        (1, 67, 4, 16, False),  # two segments
        pytest.param(2, 130, 132, 16, True, marks=pytest.mark.slow),
    ],
)
def test_matrix_units_take_the_products_of_16_bit_activations(
    batch: int,
    length: int,
    channels: int,
    states: int,
    routed: bool,
    monkeypatch: pytest.MonkeyPatch,
    matrix_units: None,
) -> None:
    monkeypatch.setattr(scan, "INTERPRETED", False)
    prompt, order = make_route(batch, length, states)
    inputs = [*make_inputs(batch, length, channels, states), *([prompt] if routed else [])]
    inputs = [x if x.ndim < 3 else x.bfloat16() for x in inputs]
    assert scan._suits_matrix_units(inputs[0], states)
    assert_matches_reference(inputs, True, "triton", 3 * 2**-8, order if routed else None)  # cut, not rounded, as above


def test_narrow_states_and_odd_channels_do_without_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "INTERPRETED", False)
    u = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    assert scan._suits_matrix_units(u, 8) and scan._suits_matrix_units(u.half(), 32)
    assert not any(scan._suits_matrix_units(x, n) for x, n in ((u, 4), (u, 12), (u[..., :6], 8), (u.float(), 8)))


@triton.jit
def _sum_eight(values, sums, GROUP: tl.constexpr, MATRIX: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, 32)
    eight, ones = (), ()
    for i in tl.static_range(8):
        eight = eight + (tl.load(values + 32 * i + lane),)  # noqa: RUF005
        ones = ones + ((lane // 4 == i).to(tl.float32),)  # noqa: RUF005
    zero = tl.zeros((32,), tl.float32)
    four = sum_lanes(eight, (zero, zero, zero, zero), ones, lane, GROUP, MATRIX)
    tl.store(sums + lane, four[0] + four[2])


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize("matrix", [False, True])
def test_sums_over_lanes_go_where_they_are_read(matrix: bool, group: int, device: str, matrix_units: None) -> None:
    values = torch.randint(-512, 512, (8, 32), generator=torch.Generator().manual_seed(0)).float().to(device)
    sums = torch.empty(32, device=device)
    _sum_eight[(1,)](values, sums, GROUP=group, MATRIX=matrix, num_warps=1)
    expected = torch.zeros(8, 4)
    expected[:, group] = values.sum(1).cpu()
    assert torch.equal(sums.cpu().view(8, 4), expected)  # integers below 2^10 are exact in TF32


def test_two_runs_agree_to_the_bit(device: str) -> None:
    prompt, order = make_route(1, 20, 2)
    inputs = [x.to(device) for x in (*make_inputs(1, 20, 40, 2), prompt)]
    first, second = (run(inputs, True, "triton", order.to(device)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_passes_torchs_own_checks(dtype: torch.dtype, device: str) -> None:
    inputs = [x.to(device, dtype if x.ndim == 3 else None).requires_grad_() for x in make_inputs(1, 3, 2, 2)]
    selective_scan(*inputs, backend="triton")  # registers it
    prompt, order = (x.to(device) for x in make_route(1, 3, 2))
    for route in ((None, None), (prompt.requires_grad_(), order)):
        torch.library.opcheck(
            torch.ops.mambair_ds.selective_scan_triton.default,
            (*inputs, *route, True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_the_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="runs on the CPU only under TRITON_INTERPRET=1"):
        selective_scan(*make_inputs(1, 2, 3, 4), backend="triton")
