"""The published recipe, assembled from this project's modules and published.py: what every speed claim is a ratio to.

Eager PyTorch in float32, with PyTorch's default TF32 settings (convolutions yes, matrix products no). Attention adds a
materialized bias and mask; tokens are ordered by a general sort and moved by gathers; convolutions are in PyTorch's own
layout, with permutes around them; routing noise is drawn by torch, layer by layer. The scan is mamba-ssm's CUDA kernel,
or, where that is not built, the float32 Triton scan on a GPU and a loop over tokens on a CPU (`scan_name` says which).
Adam is PyTorch's default one, and every step reads its loss back. The loader is `WholePictures` of data.py.

The network is the package's own with other operators put in, so that it has the published names and weights.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import published
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mambair_ds.config import LossConfig, NetworkConfig, OptimizerConfig
from mambair_ds.kernels.philox import KeyedNoise
from mambair_ds.kernels.selective_scan import selective_scan
from mambair_ds.models import attention, build_model, layout, state_space
from mambair_ds.training.losses import pixel_loss

Norm = tuple[Tensor, Tensor] | None


def scan_backend(device: torch.device) -> str:
    """The backend that stands for mamba-ssm's scan on `device`: "mamba_ssm" itself, "triton" or "reference"."""
    if device.type != "cuda":
        return "reference"
    return "mamba_ssm" if importlib.util.find_spec("selective_scan_cuda") else "triton"


def scan_name(device: torch.device) -> str:
    """What a report says of the baseline's scan."""
    return {
        "mamba_ssm": "mamba-ssm's CUDA scan",
        "triton": "our float32 Triton scan: mamba-ssm's CUDA scan is not built here",
        "reference": "a loop over tokens, as mamba-ssm's Python reference: its CUDA scan needs a GPU",
    }[scan_backend(device)]


def build(network: NetworkConfig, device: torch.device) -> nn.Module:
    """The network with the baseline's scan, and convolutions that read (B, C, H, W) as it stands."""
    model = build_model(network, scan_backend(device)).to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(_own_layout)
    return model


@contextlib.contextmanager
def published_operators() -> Iterator[None]:
    """Within, every network of this process computes as the published code does."""
    with contextlib.ExitStack() as stack:
        for module, operators in _OPERATORS.items():
            stack.enter_context(mock.patch.multiple(module, **operators))
        yield


class Step:
    """The published training step: a network, Adam, and the loss read back each time."""

    def __init__(
        self, network: NetworkConfig, optimizer: OptimizerConfig, loss: LossConfig, device: torch.device
    ) -> None:
        """Freshly drawn weights (torch's global generator) on `device`."""
        self.model = build(network, device).train()
        self.loss = loss
        self.optimizer = torch.optim.Adam(self.model.parameters(), optimizer.lr, betas=optimizer.betas)

    def __call__(self, lq: Tensor, gt: Tensor) -> float:
        """One step on LQ (B, C, h, w) and GT (B, C, H, W) in [0, 1]; the loss before it."""
        with published_operators():
            self.optimizer.zero_grad()
            loss = pixel_loss(self.loss, self.model(lq.contiguous()), gt.contiguous())
            loss.backward()
            self.optimizer.step()
        return loss.item()


def step_flops(network: NetworkConfig, batch: int, side: int) -> float:
    """Floating-point operations of a training step's matrix products and convolutions, without the scan's."""
    with torch.device("meta"):
        model = build(network, torch.device("meta")).train()
        lq = torch.empty(batch, network.in_chans, side, side)
    with (
        published_operators(),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # which knows no meta tensors
        mock.patch.object(state_space, "selective_scan", lambda u, *_, **__: u),
        FlopCounterMode(display=False) as counter,
    ):
        model(lq).sum().backward()
    return counter.get_total_flops()


def _attend(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> Tensor:
    index, mask = _constants(*qkv.shape[1:3], window_size, shift, qkv.device, qkv.dtype)
    return published.attend(qkv, table, index, mask, window_size, shift)


@functools.cache
def _constants(
    height: int, width: int, window: int, shift: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return published.attention_constants(height, width, window, shift, torch.empty((), device=device, dtype=dtype))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, epilogue: str, gate: Tensor | None = None, norm: Norm = None
) -> Tensor:
    return published.convolve(x, weight, bias, epilogue, gate, *(norm or (None, None)))


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, norm: Norm, gelu: bool, residual: Tensor | None, skip: Tensor | None,
    skip_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    gamma, beta = norm or (None, None)
    return published.linear(x, weight, bias, gelu, gamma, beta, residual, skip, skip_scale)


def _soft(scores: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
    assert not isinstance(noise, KeyedNoise), "the published code draws its noise from torch's generator"
    logits = scores.log_softmax(-1)
    return (logits if noise is None else logits + noise).softmax(-1)


def _choose(scores: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
    return _soft(scores, noise).argmax(-1)


def _prompt(scores: Tensor, table: Tensor, index: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
    soft = _soft(scores, noise)
    hard = torch.zeros_like(soft).scatter_(-1, index[..., None], 1.0)
    return (hard - soft.detach() + soft) @ table


def _order(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    order = torch.sort(index, dim=-1, stable=True).indices
    return order, order.argsort(-1)


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, *, prompt: Tensor,
    order: Tensor, backend: str | None,
) -> Tensor:  # fmt: skip
    """Tokens are moved into their order in front of the scan, and back behind it."""
    u, delta, B, C = (x.gather(1, order[..., None].expand_as(x)) for x in (u, delta, B, C))
    y = selective_scan(u, delta, A, B, C + prompt, D, bias, backend=backend)
    return y.gather(1, order.argsort(-1)[..., None].expand_as(y))


def _own_layout(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


_OPERATORS: dict[ModuleType, dict[str, Any]] = {
    attention: {"window_attention": _attend},
    layout: {"depthwise_conv": _convolve, "linear": _linear},
    state_space: {
        "choose_class": _choose, "class_prompt": _prompt, "class_order": _order, "selective_scan": _scan,
    },
}  # fmt: skip
