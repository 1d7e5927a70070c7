"""Layouts: activations are (B, H, W, C), so that linear layers, norms and scans find a token's channels together."""

from torch import Tensor, nn

from mambair_ds.kernels.depthwise_conv import Epilogue, depthwise_conv


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a module for (B, C, H, W) to x (B, H, W, C). Nothing moves: a permuted view is PyTorch's channels_last."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def convolve_depthwise(conv: nn.Module, x: Tensor, epilogue: Epilogue, gate: Tensor | None = None) -> Tensor:
    """Apply a depthwise nn.Conv2d with zero padding to x (B, H, W, C), and then `depthwise_conv`'s epilogue."""
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    return depthwise_conv(x, conv.weight, conv.bias, epilogue, gate)
