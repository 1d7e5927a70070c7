"""Routing: classes, their order and their prompts against plain operations, exact reproducibility, builds for GPUs."""

import pytest
import torch
from torch import Tensor

from mambair_ds.kernels.routing import choose_class, class_order, class_prompt


def make_inputs(batch: int, length: int, classes: int, states: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, table, index and the gradient of the prompts."""
    generator = torch.Generator().manual_seed(length)
    logits = 3 * torch.randn(batch, length, classes, generator=generator)
    index = torch.randint(classes, (batch, length), generator=generator)
    table = torch.randn(classes, states, generator=generator)
    return logits, table, index, torch.randn(batch, length, states, generator=generator)


def gradients(logits: Tensor, table: Tensor, index: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, ...]:
    logits, table = logits.detach().requires_grad_(), table.detach().requires_grad_()
    prompt = class_prompt(logits, table, index, backend=backend)
    return prompt.detach(), *torch.autograd.grad(prompt, (logits, table), grad)


def on(device: str, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device if backend == "triton" else "cpu") for tensor in tensors)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_of_equal_probabilities_the_first_class_is_chosen(backend: str, device: str) -> None:
    rows = [[0.0, 2, 2, 1, 2], [3, 3, 3, 3, 3], [-1, -2, -3, -4, 0], [-50, 1, 1 - 1e-8, 1, -50], [1e4, -1e4, 0, 1e4, 0]]
    (logits,) = on(device, backend, torch.tensor([rows]))
    assert choose_class(logits, backend=backend).tolist() == [[1, 0, 4, 1, 0]]


def test_classes_that_round_to_one_probability_are_equal() -> None:
    # Different numbers with equal softmax: a plain arg max of the logits would choose the second class.
    logits = torch.tensor([[[-1e-9, 0.0, -30.0]]])
    assert logits.argmax(-1).item() == 1
    for backend in ("reference", "torch"):
        assert choose_class(logits, backend=backend).item() == 0


def test_triton_rounds_probabilities_like_the_others(device: str) -> None:
    logits = torch.tensor([[[-1e-9, 0.0, -30.0]]]).to(device)
    assert choose_class(logits, backend="triton").item() == 0


@pytest.mark.parametrize(("length", "classes"), [(1, 2), (17, 3), (300, 64), (50, 128), (20, 256)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_choice_equals_the_reference(length: int, classes: int, backend: str, device: str) -> None:
    (logits,) = on(device, backend, make_inputs(2, length, classes, 1)[0])
    assert torch.equal(choose_class(logits, backend=backend), choose_class(logits, backend="reference"))


@pytest.mark.parametrize("classes", [2, 64, 128, 256])
@pytest.mark.parametrize(
    ("backend", "length"),
    [
        *((backend, length) for backend in ("reference", "torch") for length in (1, 17, 300, 4097, 16384)),
        *(("triton", length) for length in (1, 17, 300)),
        *(pytest.param("triton", length, marks=pytest.mark.slow) for length in (4097, 16384)),
    ],
)
def test_order_is_the_stable_sort(length: int, classes: int, backend: str, device: str) -> None:
    (index,) = on(device, backend, make_inputs(1 if length > 1000 else 3, length, classes, 1)[2])
    order, inverse = class_order(index, classes, backend=backend)
    assert order.dtype == inverse.dtype == torch.int64
    assert torch.equal(order, torch.sort(index, dim=1, stable=True).indices)
    places = torch.arange(length, device=index.device).expand_as(index)
    assert torch.equal(inverse.gather(1, order), places)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_order_of_tokens_that_share_a_class_is_theirs(backend: str, device: str) -> None:
    (index,) = on(device, backend, torch.full((1, 300), 4))
    order, inverse = class_order(index, 5, backend=backend)
    assert order.tolist() == inverse.tolist() == [list(range(300))]


def test_reference_prompt_is_straight_through() -> None:
    logits, table, index, grad = (x.double() if x.is_floating_point() else x for x in make_inputs(1, 5, 4, 3))
    prompt, grad_logits, grad_table = gradients(logits, table, index, grad, "reference")
    torch.testing.assert_close(prompt, table[index])

    def soft(logits: Tensor, table: Tensor) -> Tensor:
        return logits.softmax(-1) @ table

    assert torch.autograd.gradcheck(soft, (logits.requires_grad_(), table.requires_grad_()))
    torch.testing.assert_close(grad_logits, torch.autograd.grad(soft(logits, table), logits, grad)[0])
    expected = torch.zeros_like(table).index_add_(0, index[0], grad[0])
    torch.testing.assert_close(grad_table, expected)


@pytest.mark.parametrize(
    ("batch", "length", "classes", "states"), [(2, 1, 2, 1), (2, 17, 5, 3), (1, 300, 64, 8), (1, 130, 128, 16)]
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_prompt_gradients_equal_the_float64_reference(
    batch: int, length: int, classes: int, states: int, backend: str, device: str
) -> None:
    inputs = on(device, backend, *make_inputs(batch, length, classes, states))
    actual = gradients(*inputs, backend)
    assert torch.equal(actual[0], inputs[1][inputs[2]])
    wide = (x.double() if x.is_floating_point() else x for x in inputs)
    for name, ours, exact in zip(("prompt", "logits", "table"), actual, gradients(*wide, "reference"), strict=True):
        error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
        assert error <= 2e-6, f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_table_in_bfloat16_gets_its_gradient_in_bfloat16(backend: str, device: str) -> None:
    logits, table, index, grad = on(device, backend, *make_inputs(1, 20, 6, 4))
    prompt, grad_logits, grad_table = gradients(logits, table.bfloat16(), index, grad.bfloat16(), backend)
    assert (prompt.dtype, grad_logits.dtype, grad_table.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    exact = gradients(logits.double(), table.double(), index, grad.double(), "reference")
    for ours, expected in zip((prompt, grad_logits, grad_table), exact, strict=True):
        assert (ours.double() - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_cpu_results_do_not_depend_on_batch_threads_or_time() -> None:
    logits, table, index, grad = make_inputs(3, 1100, 64, 8)
    threads = torch.get_num_threads()
    together = gradients(logits, table, index, grad, "torch")
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for first, second in zip(together, gradients(logits, table, index, grad, "torch"), strict=True):
                assert torch.equal(first, second)
    finally:
        torch.set_num_threads(threads)
    singles = [gradients(logits[i : i + 1], table, index[i : i + 1], grad[i : i + 1], "torch") for i in range(3)]
    assert torch.equal(torch.cat([single[1] for single in singles]), together[1])
    assert torch.equal(singles[0][2] + singles[1][2] + singles[2][2], together[2])


def test_two_triton_runs_agree_to_the_bit(device: str) -> None:
    inputs = on(device, "triton", *make_inputs(2, 300, 64, 8))
    for first, second in zip(gradients(*inputs, "triton"), gradients(*inputs, "triton"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operators_pass_torchs_own_checks(backend: str, device: str) -> None:
    logits, table, index, _ = on(device, backend, *make_inputs(2, 7, 5, 3))
    choose_class(logits, backend=backend)  # registers them
    name = {"torch": "cpu", "triton": "triton"}[backend]
    # Triton's kernels launched by the interpreter cannot be traced by the compiler's dispatch test.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests += ("test_aot_dispatch_dynamic",) if backend == "torch" else ()
    operators = torch.ops.mambair_ds
    torch.library.opcheck(getattr(operators, f"choose_class_{name}").default, (logits,), test_utils=tests)
    torch.library.opcheck(getattr(operators, f"class_order_{name}").default, (index, 5), test_utils=tests)
    arguments = (logits.requires_grad_(), table.requires_grad_(), index)
    torch.library.opcheck(getattr(operators, f"class_prompt_{name}").default, arguments, test_utils=tests)


def test_what_does_not_fit_is_named() -> None:
    logits, table, index, _ = make_inputs(2, 7, 5, 3)
    with pytest.raises(ValueError, match=r"logits has shape \(7, 5\)"):
        choose_class(logits[0])
    with pytest.raises(ValueError, match=r"logits is torch\.float64, expected torch\.float32"):
        choose_class(logits.double(), backend="torch")
    with pytest.raises(ValueError, match=r"index is torch\.int32 of shape"):
        class_order(index.int(), 5)
    with pytest.raises(ValueError, match="257 classes, expected 1 to 256"):
        class_order(index, 257)
    with pytest.raises(ValueError, match="index reaches from 1 to 4, expected 0 to 2"):
        class_order(index, 3, backend="torch")
    with pytest.raises(ValueError, match="do not fit"):
        class_prompt(logits, table[:4], index)
    with pytest.raises(ValueError, match="no backend 'cuda'; there are reference, torch, triton"):
        class_order(index, 5, backend="cuda")
