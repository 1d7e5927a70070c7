"""The selective scan's Triton backend: on a GPU if there is one, else interpreted.

The interpreter takes about a second for a chunk of sixteen positions and two states, so sizes are small by default.
"""

import pytest
import torch
from scan_inputs import assert_matches_reference, make_inputs, make_route, run

from mambair_ds.kernels.selective_scan import selective_scan


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


def test_bfloat16_in_and_out_with_a_float32_state(device: str) -> None:
    inputs = [(x if x.ndim < 3 else x.bfloat16()).to(device) for x in make_inputs(1, 20, 7, 2)]
    result = run(inputs, True, "triton")
    assert [result[name].dtype for name in ("y", "u", "delta", "B", "C")] == [torch.bfloat16] * 5
    assert [result[name].dtype for name in ("A", "D", "delta_bias")] == [torch.float32] * 3
    assert_matches_reference(inputs, True, "triton", 2**-7)  # the interpreter cuts digits off instead of rounding


def test_two_runs_agree_to_the_bit(device: str) -> None:
    prompt, order = make_route(1, 20, 2)
    inputs = [x.to(device) for x in (*make_inputs(1, 20, 40, 2), prompt)]
    first, second = (run(inputs, True, "triton", order.to(device)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_operator_passes_torchs_own_checks(device: str) -> None:
    inputs = [x.to(device).requires_grad_() for x in make_inputs(1, 3, 2, 2)]
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
