"""Inputs of the selective scan in the ranges a network has, and the comparison of every gradient with the reference."""

import torch
from torch import Tensor

from mambair_ds.kernels.selective_scan import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "prompt")


def make_inputs(batch: int, length: int, channels: int, states: int, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D and delta_bias, float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rates = torch.arange(1, states + 1).log() + 0.05 * normal(channels, states)
    return [
        normal(batch, length, channels),
        0.5 * normal(batch, length, channels),
        -rates.exp(),
        normal(batch, length, states),
        normal(batch, length, states),
        1 + 0.05 * normal(channels),
        normal(channels) - 4,
    ]


def make_route(batch: int, length: int, states: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A prompt and an order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)])
    return torch.randn(batch, length, states, generator=generator), order


def run(inputs: list[Tensor], softplus: bool, backend: str, order: Tensor | None = None) -> dict[str, Tensor]:
    """y and the gradients of all inputs, by name, for a fixed gradient of y; the eighth input is the prompt."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    prompt = inputs[7] if len(inputs) > 7 else None
    y = selective_scan(*inputs[:7], delta_softplus=softplus, prompt=prompt, order=order, backend=backend)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return {"y": y.detach(), **dict(zip(NAMES, torch.autograd.grad(y, inputs, grad_y), strict=False))}


def assert_matches_reference(
    inputs: list[Tensor], softplus: bool, backend: str, tolerance: float, order: Tensor | None = None
) -> None:
    """Compare with the float64 reference; `tolerance` is relative to each tensor's largest absolute value."""
    actual = run(inputs, softplus, backend, order)
    expected = run([x.double() for x in inputs], softplus, "reference", order)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        scale = expected[name].abs().max().clamp(min=1e-3)
        error = ((value.double() - expected[name]).abs().max() / scale).item()
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest value"
