"""Layouts: activations are (B, H, W, C), so that linear layers, norms and scans find a token's channels together."""

from torch import Tensor, nn

from mambair_ds.kernels.depthwise_conv import Epilogue, depthwise_conv
from mambair_ds.kernels.linear import linear


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a module for (B, C, H, W) to x (B, H, W, C). Nothing moves: a permuted view is PyTorch's channels_last."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def convolve_depthwise(
    conv: nn.Module, x: Tensor, epilogue: Epilogue, gate: Tensor | None = None, norm: nn.LayerNorm | None = None
) -> Tensor:
    """Apply a depthwise nn.Conv2d with zero padding to x (B, H, W, C), and then `depthwise_conv`'s epilogue."""
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    return depthwise_conv(x, conv.weight, conv.bias, epilogue, gate, _parameters(norm))


def project(
    layer: nn.Module,
    x: Tensor,
    norm: nn.LayerNorm | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: Tensor | None = None,
) -> Tensor:
    """Apply an nn.Linear, or a 1×1 nn.Conv2d, to the channels of x (..., C), with what `linear` has around it."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight = layer.weight.flatten(1)
    return linear(
        x, weight, layer.bias, norm=_parameters(norm), gelu=gelu, residual=residual, skip=skip, skip_scale=skip_scale
    )  # fmt: skip


def _parameters(norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor] | None:
    return None if norm is None else (norm.weight, norm.bias)
