"""The linear layer in PyTorch's operations, differentiated by autograd: for CPUs, and to test the others against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See `mambair_ds.kernels.linear.linear`; `dtype` is that of the product."""
    if not torch.is_autocast_enabled(x.device.type):  # else autocast casts, in its own way
        weight = weight.to(dtype)
        bias, gamma, beta = (None if p is None else p.to(dtype) for p in (bias, gamma, beta))
    if gamma is not None:
        x = F.layer_norm(x, x.shape[-1:], gamma, beta)
    y = F.linear(x, weight, bias)
    if gelu:
        y = F.gelu(y)
    if residual is not None:
        y = y + residual
    if skip is not None and scale is not None:
        y = scale * skip + y
    return y.to(dtype if residual is None else torch.promote_types(dtype, residual.dtype))
