"""A linear layer with the LayerNorm in front of it and the GELU or the additions behind it, in one pass over memory."""

import torch
from torch import Tensor

from mambair_ds.kernels import load_backend

_FILES = {"reference": "reference", "torch": "reference", "triton": "triton"}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = GELU(LayerNorm(x) · weightᵀ + bias) + residual + skip_scale · skip, each part where it is asked for.

    The product is computed in autocast's dtype where autocast is on, else in `x`'s, to which the parameters are cast;
    statistics, sums and what follows the product are float32 in `triton` (and never float64). Its backward pass
    computes everything again from the inputs.

    Args:
        x: (..., in), float32, bfloat16 or float16; float64 on `reference` and `torch`.
        weight: (out, in), as `torch.nn.Linear` has it.
        bias: (out,) or None.
        norm: weight and bias, (in,) each, of a LayerNorm with epsilon 1e-5 over x's last dimension; None is none.
        gelu: whether the exact GELU follows.
        residual: (..., out), added.
        skip: (..., out), added after multiplication with `skip_scale`, (out,). Both or none.
        backend: "reference" or "torch" (plain operations, the same ones) or "triton"; None chooses by `x`'s device.

    Returns:
        (..., out) in the dtype of the product, or in that of the residual if that is wider. Gradients reach every
        tensor, each in its own dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, one of skip and skip_scale without the other, or an
            unknown backend.
    """
    module = load_backend("linear", _FILES, x.device.type, backend)
    _check(x, weight, bias, norm, residual, skip, skip_scale, float64=_FILES["reference"] in module.__name__)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    gamma, beta = (None, None) if norm is None else norm
    return module.linear(x, weight, bias, gamma, beta, residual, skip, skip_scale, gelu, dtype)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    skip: Tensor | None,
    skip_scale: Tensor | None,
    *,
    float64: bool,
) -> None:
    if (skip is None) != (skip_scale is None):
        raise ValueError("linear: skip and skip_scale come together, one of them is None")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"linear: weight has shape {tuple(weight.shape)}, expected (out, in)")
    width, depth = weight.shape
    if x.ndim == 0 or x.shape[-1] != depth or x.numel() == 0:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, expected (..., {depth}) as weight's rows have")
    gamma, beta = (None, None) if norm is None else norm
    outputs = (*x.shape[:-1], width)
    tensors = {
        "x": (x, x.shape),
        "weight": (weight, weight.shape),
        "bias": (bias, (width,)),
        "norm's weight": (gamma, (depth,)),
        "norm's bias": (beta, (depth,)),
        "residual": (residual, outputs),
        "skip": (skip, outputs),
        "skip_scale": (skip_scale, (width,)),
    }
    allowed = [torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if float64 else [])]
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"linear: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"linear: {name} is on {tensor.device}, but x on {x.device}")
        if tensor.dtype not in allowed:
            raise ValueError(f"linear: {name} is {tensor.dtype}, expected {', '.join(map(str, allowed))}")
