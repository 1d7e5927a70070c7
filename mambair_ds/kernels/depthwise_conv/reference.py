"""The depthwise convolution in PyTorch's operations, differentiated by autograd: what the others are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambair_ds.kernels.depthwise_conv.operator import EPS


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, norm: tuple[Tensor, Tensor] | None, epilogue: str
) -> Tensor:
    """See `mambair_ds.kernels.depthwise_conv.depthwise_conv`; in float64 where `x` is float64, else in float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(dtype)
        if norm is not None:
            wide = F.layer_norm(wide, bias.shape, norm[0].to(dtype), norm[1].to(dtype), EPS)
        c = F.conv2d(
            wide.permute(0, 3, 1, 2),
            weight.to(dtype),
            bias.to(dtype),
            padding=weight.shape[-1] // 2,
            groups=x.shape[-1],
        ).permute(0, 2, 3, 1)
        if epilogue == "gelu_residual":
            c = wide + F.gelu(c)
        elif epilogue == "sigmoid_gate":
            c = wide * torch.sigmoid(c)
        elif gate is not None:
            c = gate.to(dtype) * c
    return c.to(x.dtype)
