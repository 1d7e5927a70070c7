"""The step with the mean, in Triton against PyTorch's Adam in float64."""

import pytest
import torch

from mambair_ds.kernels.adam import Rule, Tensors, adam_step

SHAPES = [(1,), (17, 300), (), (2048,), (4097,), (0,)]


def _tensors(device: str, dtype: torch.dtype) -> Tensors:
    torch.manual_seed(0)
    groups = [[torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in SHAPES] for _ in range(5)]
    groups[3] = [x.square() for x in groups[3]]
    return Tensors(*groups, [torch.tensor(3.0, device=device) for _ in SHAPES])


def _all(tensors: Tensors) -> list[torch.Tensor]:
    return [x for group in vars(tensors).values() for x in group]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("flag", [None, 0.0])
def test_a_step_in_triton_is_that_of_pytorch_in_float64(device: str, decoupled: bool, flag: float | None) -> None:
    rule = Rule(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, decoupled=decoupled, decay=0.9)
    skipped = None if flag is None else torch.tensor(flag, device=device)
    ours, exact = _tensors(device, torch.float32), _tensors(device, torch.float64)
    before = [x.clone() for x in ours.weights]
    for _ in range(2):
        adam_step(ours, rule, skipped, backend="triton")
        adam_step(exact, rule, None, backend="reference")
    for mine, other in zip(_all(ours), _all(exact), strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-5, atol=2e-6)
    assert not any(torch.equal(a, b) for a, b in zip(before, ours.weights, strict=True) if a.numel())


def test_a_skipped_step_in_triton_changes_nothing_even_the_first(device: str) -> None:
    rule = Rule(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, decoupled=False, decay=0.9)
    tensors = _tensors(device, torch.float32)
    for step, gradient in zip(tensors.steps, tensors.gradients, strict=True):
        step.zero_()
        gradient.fill_(float("nan"))
    before = [x.clone() for x in _all(tensors)]
    adam_step(tensors, rule, torch.ones((), device=device), backend="triton")
    for mine, other in zip(_all(tensors), before, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_triton_refuses_other_dtypes_and_layouts(device: str) -> None:
    tensors = _tensors(device, torch.float64)
    rule = Rule(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, decoupled=False, decay=0.9)
    with pytest.raises(ValueError, match="expected contiguous float32"):
        adam_step(tensors, rule, None, backend="triton")
