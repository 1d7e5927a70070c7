"""Depthwise convolution, channels last, with what follows it in the network computed in the same pass."""

from typing import Literal, get_args

import torch
from torch import Tensor

from mambair_ds.kernels import load_backend, on_cpu

Epilogue = Literal["none", "gelu_residual", "sigmoid_gate", "norm_gate"]

_FILES = {"reference": "reference", "torch": "cpu", "triton": "triton"}


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epilogue: Epilogue = "none",
    gate: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve every channel with its own k×k kernel, zeros around the picture, and combine c, the result, with more.

    | epilogue | result | where |
    | --- | --- | --- |
    | none | c | |
    | gelu_residual | x + GELU(c), the exact GELU | ConvFFN |
    | sigmoid_gate | x · sigmoid(c) | the position encoding of the state space module |
    | norm_gate | gate · c, of the LayerNorm of x over its channels (eps 1e-5) in place of x | GatedMLP |

    Sums are float32 (float64 for a float64 `x` on the `reference` backend, the only one that takes float64). The
    backward pass of `torch` and `triton` computes c again instead of keeping it, and that of `triton` the normalized x.
    The zeros around the picture are zeros of the normalized one.

    Args:
        x: (B, H, W, C); float32, bfloat16 or float16.
        weight: (C, 1, k, k) with an odd k, as `torch.nn.Conv2d` has it.
        bias: (C,).
        gate: (B, H, W, C) for "norm_gate", else None.
        norm: weight and bias of the norm, (C,) each, for "norm_gate", else None.
        backend: "reference" (plain operations), "torch" (CPU) or "triton"; None takes "reference" for
            float64 and for small kernels on a CPU, else chooses by `x`'s device.

    Returns:
        (B, H, W, C) in `x`'s dtype. Gradients reach x, weight, bias, gate and norm, each in its own dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown epilogue or backend.
    """
    # On a CPU PyTorch's own backward pass is faster than ours for kernels of 3×3, and slower for 5×5.
    if backend is None and (x.dtype == torch.float64 or (on_cpu(x.device) and weight.shape[-1] <= 3)):
        backend = "reference"
    _check(x, weight, bias, epilogue, gate, norm, float64=backend == "reference")
    module = load_backend("depthwise_conv", _FILES, x.device.type, backend)
    return module.depthwise_conv(x, weight, bias, gate, norm, epilogue)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epilogue: str,
    gate: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    *,
    float64: bool,
) -> None:
    if epilogue not in get_args(Epilogue):
        raise ValueError(f"depthwise_conv: no epilogue {epilogue!r}; there are {', '.join(get_args(Epilogue))}")
    for name, value in {"gate": gate, "norm": norm}.items():
        if (value is not None) != (epilogue == "norm_gate"):
            raise ValueError(
                f"depthwise_conv: epilogue {epilogue!r} {'needs a' if value is None else 'takes no'} {name}"
            )
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"depthwise_conv: x has shape {tuple(x.shape)}, expected (batch, height, width, channels)")
    channels, k = x.shape[-1], weight.shape[-1]
    if weight.shape != (channels, 1, k, k) or k % 2 == 0:
        raise ValueError(
            f"depthwise_conv: weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k), k odd"
        )
    if bias.shape != (channels,):
        raise ValueError(f"depthwise_conv: bias has shape {tuple(bias.shape)}, expected ({channels},)")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"depthwise_conv: gate has shape {tuple(gate.shape)}, but x {tuple(x.shape)}")
    for name, tensor in zip(("norm's weight", "norm's bias"), norm or (), strict=False):
        if tensor.shape != (channels,):
            raise ValueError(f"depthwise_conv: {name} has shape {tuple(tensor.shape)}, expected ({channels},)")
    allowed = [torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if float64 else [])]
    norm_weight, norm_bias = norm or (x, x)
    tensors = {"x": x, "weight": weight, "bias": bias, "gate": x if gate is None else gate}
    for name, tensor in {**tensors, "norm's weight": norm_weight, "norm's bias": norm_bias}.items():
        if tensor.device != x.device:
            raise ValueError(f"depthwise_conv: {name} is on {tensor.device}, but x on {x.device}")
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype) for dtype in allowed)
            raise ValueError(f"depthwise_conv: {name} is {tensor.dtype}, expected {names}")
