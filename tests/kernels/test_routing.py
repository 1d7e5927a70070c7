"""Routing: classes, their order and their prompts against plain operations, exact reproducibility, noise by key."""

import pytest
import torch
from torch import Tensor

from mambair_ds.kernels.philox import KeyedNoise, NoiseKey, gumbel
from mambair_ds.kernels.routing import choose_class, class_order, class_prompt

KEY = NoiseKey(0xA99F31D0A4093822, torch.tensor([0x0370734413198A2E, 5, 2**40 + 3]))
NOISES = ["none", "given", "drawn"]


def make_inputs(batch: int, length: int, classes: int, states: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scores, table, index and the gradient of the prompts."""
    generator = torch.Generator().manual_seed(length)
    scores = 3 * torch.randn(batch, length, classes, generator=generator)
    index = torch.randint(classes, (batch, length), generator=generator)
    table = torch.randn(classes, states, generator=generator)
    return scores, table, index, torch.randn(batch, length, states, generator=generator)


def make_noise(kind: str, scores: Tensor) -> Tensor | KeyedNoise | None:
    keyed = KeyedNoise(NoiseKey(KEY.seed, KEY.positions[: len(scores)]), 2**31 + 7)
    drawn = gumbel(keyed.key, keyed.stream, tuple(scores.shape), scores.device, backend="reference")
    return {"none": None, "given": drawn, "drawn": keyed}[kind]


def gradients(
    scores: Tensor, table: Tensor, index: Tensor, grad: Tensor, backend: str, noise: Tensor | KeyedNoise | None = None
) -> tuple[Tensor, ...]:
    scores, table = scores.detach().requires_grad_(), table.detach().requires_grad_()
    prompt = class_prompt(scores, table, index, noise, backend=backend)
    return prompt.detach(), *torch.autograd.grad(prompt, (scores, table), grad)


def on(device: str, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device if backend == "triton" else "cpu") for tensor in tensors)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_of_equal_probabilities_the_first_class_is_chosen(backend: str, device: str) -> None:
    rows = [[0.0, 2, 2, 1, 2], [3, 3, 3, 3, 3], [-1, -2, -3, -4, 0], [-50, 1, 1 - 1e-8, 1, -50], [1e4, -1e4, 0, 1e4, 0]]
    (scores,) = on(device, backend, torch.tensor([rows]))
    assert choose_class(scores, backend=backend).tolist() == [[1, 0, 4, 1, 0]]
    flat = torch.zeros_like(scores)
    assert choose_class(flat, scores, backend=backend).tolist() == [[1, 0, 4, 1, 0]]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_classes_that_round_to_one_probability_are_equal(backend: str, device: str) -> None:
    # Different numbers with equal softmax: a plain arg max of the scores would choose the second class.
    (scores,) = on(device, backend, torch.tensor([[[-1e-9, 0.0, -30.0]]]))
    assert scores.argmax(-1).item() == 1
    assert choose_class(scores, backend=backend).item() == 0


@pytest.mark.parametrize(("length", "classes"), [(1, 2), (17, 3), (40, 64), (33, 128), (17, 256)])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_choice_equals_the_reference(length: int, classes: int, noise: str, backend: str, device: str) -> None:
    (scores,) = on(device, backend, make_inputs(2, length, classes, 1)[0])
    expected = choose_class(scores, make_noise("given" if noise == "drawn" else noise, scores), backend="reference")
    assert torch.equal(choose_class(scores, make_noise(noise, scores), backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_narrow_scores_are_compared_in_float32(dtype: torch.dtype, backend: str, device: str) -> None:
    (scores,) = on(device, backend, make_inputs(2, 60, 64, 1)[0])
    noise = make_noise("given", scores)
    narrow = scores.to(dtype)
    assert torch.equal(
        choose_class(narrow, noise, backend=backend), choose_class(narrow.float(), noise, backend="reference")
    )


@pytest.mark.parametrize("noise", ["none", "given"])
def test_near_ties_on_a_cpu_are_decided_as_published(noise: str) -> None:
    """The second best class is moved to within 1e-6 of the best, where rounding decides."""
    scores = 0.03 * make_inputs(1, 4096, 64, 1)[0]
    given = make_noise(noise, scores)
    noisy = scores.double() if given is None else scores.double() + given
    values, places = noisy.topk(2, -1)
    shift = values[..., :1] - values[..., 1:] + 2e-6 * torch.rand(1, 4096, 1, dtype=torch.float64) - 1e-6
    scores = scores.double().scatter_add(-1, places[..., 1:], shift).float()
    chosen = choose_class(scores, given, backend="reference")
    assert torch.equal(choose_class(scores, given, backend="torch"), chosen)
    exact = (scores.double() if given is None else scores.double() + given).argmax(-1)
    assert not torch.equal(chosen, exact)  # else the test shows nothing


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_noise_by_key_is_that_of_gumbel(backend: str, device: str) -> None:
    """To the bit, on the same backend, in the choice and in the gradients; what is neither stored nor passed on."""
    scores, table, index, grad = on(device, backend, *make_inputs(3, 20, 8, 4))
    key = NoiseKey(KEY.seed, KEY.positions.to(scores.device))
    keyed, other = KeyedNoise(key, 3), KeyedNoise(key, 4)
    given = gumbel(key, 3, (3, 20, 8), scores.device, backend=backend)
    chosen = choose_class(scores, keyed, backend=backend)
    assert torch.equal(chosen, choose_class(scores, given, backend=backend))
    assert not torch.equal(chosen, choose_class(scores, other, backend=backend))
    drawn = gradients(scores, table, index, grad, backend, keyed)
    for ours, expected in zip(drawn, gradients(scores, table, index, grad, backend, given), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0 if backend != "triton" else 2e-6)
    assert not torch.equal(drawn[1], gradients(scores, table, index, grad, backend, other)[1])
    alone = KeyedNoise(NoiseKey(KEY.seed, KEY.positions[1:2]), 3)
    assert torch.equal(choose_class(scores[1:2], alone, backend=backend), chosen[1:2])


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
    scores, table, index, grad = (x.double() if x.is_floating_point() else x for x in make_inputs(1, 5, 4, 3))
    noise = make_noise("given", scores)
    prompt, grad_scores, grad_table = gradients(scores, table, index, grad, "reference", noise)
    torch.testing.assert_close(prompt, table[index])

    def soft(scores: Tensor, table: Tensor) -> Tensor:
        return (scores + noise).softmax(-1) @ table

    assert torch.autograd.gradcheck(soft, (scores.requires_grad_(), table.requires_grad_()))
    torch.testing.assert_close(grad_scores, torch.autograd.grad(soft(scores, table), scores, grad)[0])
    expected = torch.zeros_like(table).index_add_(0, index[0], grad[0])
    torch.testing.assert_close(grad_table, expected)


@pytest.mark.parametrize(
    ("batch", "length", "classes", "states", "noise"),
    [
        (2, 1, 2, 1, "none"),
        (2, 17, 5, 3, "drawn"),
        (1, 290, 8, 8, "given"),
        (2, 40, 64, 8, "drawn"),
        (1, 33, 128, 16, "given"),
        (1, 20, 128, 16, "drawn"),
        (1, 17, 256, 16, "drawn"),
        pytest.param(2, 4097, 128, 16, "drawn", marks=pytest.mark.gpu),
        pytest.param(1, 16384, 128, 16, "none", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_prompt_gradients_equal_the_float64_reference(
    batch: int, length: int, classes: int, states: int, noise: str, backend: str, device: str
) -> None:
    inputs = on(device, backend, *make_inputs(batch, length, classes, states))
    actual = gradients(*inputs, backend, make_noise(noise, inputs[0]))
    assert torch.equal(actual[0], inputs[1][inputs[2]])
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = gradients(*wide, "reference", make_noise("given" if noise == "drawn" else noise, inputs[0]))
    for name, ours, expected in zip(("prompt", "scores", "table"), actual, exact, strict=True):
        error = ((ours.double() - expected).abs().max() / expected.abs().max()).item()
        assert error <= 2e-6, f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_in_narrow_dtypes_are_float32_inside(dtype: torch.dtype, backend: str, device: str) -> None:
    scores, table, index, grad = on(device, backend, *make_inputs(1, 40, 64, 8))
    scores, table, grad = scores.to(dtype), table.to(dtype), grad.to(dtype)
    actual = gradients(scores, table, index, grad, backend, make_noise("drawn", scores))
    assert {tensor.dtype for tensor in actual} == {dtype}
    exact = gradients(scores.double(), table.double(), index, grad.double(), "reference", make_noise("given", scores))
    for ours, expected in zip(actual, exact, strict=True):
        assert ((ours.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_table_and_scores_need_not_share_a_dtype(backend: str, device: str) -> None:
    scores, table, index, grad = on(device, backend, *make_inputs(1, 20, 8, 4))
    prompt, grad_scores, grad_table = gradients(scores, table.bfloat16(), index, grad.bfloat16(), backend)
    assert (prompt.dtype, grad_scores.dtype, grad_table.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    prompt, grad_scores, grad_table = gradients(scores.bfloat16(), table, index, grad, backend)
    assert (prompt.dtype, grad_scores.dtype, grad_table.dtype) == (torch.float32, torch.bfloat16, torch.float32)


def test_cpu_results_do_not_depend_on_batch_threads_or_time() -> None:
    scores, table, index, grad = make_inputs(3, 1100, 64, 8)
    threads = torch.get_num_threads()
    together = gradients(scores, table, index, grad, "torch")
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for first, second in zip(together, gradients(scores, table, index, grad, "torch"), strict=True):
                assert torch.equal(first, second)
    finally:
        torch.set_num_threads(threads)
    singles = [gradients(scores[i : i + 1], table, index[i : i + 1], grad[i : i + 1], "torch") for i in range(3)]
    assert torch.equal(torch.cat([single[1] for single in singles]), together[1])
    assert torch.equal(singles[0][2] + singles[1][2] + singles[2][2], together[2])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_runs_agree_to_the_bit(backend: str, device: str) -> None:
    inputs = on(device, backend, *make_inputs(2, 40, 64, 8))

    def run() -> tuple[Tensor, ...]:
        noise = make_noise("drawn", inputs[0])
        index = choose_class(inputs[0], noise, backend=backend)
        order = class_order(index, 64, backend=backend)
        return index, *order, *gradients(inputs[0], inputs[1], index, inputs[3], backend, noise)

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operators_pass_torchs_own_checks(backend: str, noise: str, device: str) -> None:
    scores, table, index, grad = on(device, backend, *make_inputs(2, 7, 8, 3))
    choose_class(scores, backend=backend)  # registers them
    name = {"torch": "cpu", "triton": "triton"}[backend]
    given = make_noise("given", scores) if noise == "given" else None
    positions = KEY.positions[:2].to(scores.device) if noise == "drawn" else None
    draw = (given, positions, -3, 5)
    # Triton's kernels launched by the interpreter cannot be traced by the compiler's dispatch test.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests += ("test_aot_dispatch_dynamic",) if backend == "torch" else ()

    def check(operator: str, *arguments: object) -> None:
        torch.library.opcheck(getattr(torch.ops.mambair_ds, f"{operator}_{name}").default, arguments, test_utils=tests)

    check("choose_class", scores, *draw)
    check("class_order", index, 8)
    check("class_prompt", scores.requires_grad_(), table.requires_grad_(), index, *draw)
    backward = getattr(torch.ops.mambair_ds, f"class_prompt_{name}_backward").default
    arguments = (grad, scores.detach(), table.detach(), index, *draw)
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_compiler_sees_through_noise_by_key() -> None:
    scores, table, _, grad = make_inputs(2, 9, 8, 3)

    def step(scores: Tensor, table: Tensor) -> Tensor:
        noise = KeyedNoise(NoiseKey(KEY.seed, KEY.positions[:2]), 1)
        return class_prompt(scores, table, choose_class(scores, noise), noise)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        inputs = (scores.detach().requires_grad_(), table.detach().requires_grad_())
        prompt = function(*inputs)
        results.append([prompt, *torch.autograd.grad(prompt, inputs, grad)])
    assert all(map(torch.equal, *results))


def test_what_does_not_fit_is_named() -> None:
    scores, table, index, _ = make_inputs(2, 7, 5, 3)
    with pytest.raises(ValueError, match=r"scores has shape \(7, 5\)"):
        choose_class(scores[0])
    with pytest.raises(ValueError, match=r"scores is torch\.float64, which only the reference backend takes"):
        choose_class(scores.double(), backend="torch")
    with pytest.raises(ValueError, match=r"scores is torch\.int64, expected a floating-point dtype"):
        choose_class(scores.long())
    with pytest.raises(
        ValueError, match=r"noise is torch\.float32 of shape \(7, 5\), expected torch\.float32 of shape"
    ):
        choose_class(scores, scores[0])
    with pytest.raises(ValueError, match=r"noise is torch\.bfloat16 of shape"):
        class_prompt(scores, table, index, scores.bfloat16())
    with pytest.raises(ValueError, match=r"positions is torch\.int64 of shape \(3,\), expected .* \(2,\)"):
        choose_class(scores, KeyedNoise(KEY, 0))
    with pytest.raises(ValueError, match=r"stream is -1"):
        class_prompt(scores, table, index, KeyedNoise(KEY, -1))
    with pytest.raises(ValueError, match=r"index is torch\.int32 of shape"):
        class_order(index.int(), 5)
    with pytest.raises(ValueError, match="257 classes, expected 1 to 256"):
        class_order(index, 257)
    with pytest.raises(ValueError, match="index reaches from 1 to 4, expected 0 to 2"):
        class_order(index, 3, backend="torch")
    with pytest.raises(ValueError, match="do not fit"):
        class_prompt(scores, table[:4], index)
    with pytest.raises(ValueError, match="no backend 'cuda'; there are reference, torch, triton"):
        class_order(index, 5, backend="cuda")
