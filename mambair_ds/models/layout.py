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


def to_windows(x: Tensor, size: int) -> Tensor:
    """Cut (B, H, W, C) into windows (B·H/size·W/size, size², C), row by row."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.transpose(2, 3).reshape(-1, size * size, channels)


def from_windows(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """Undo `to_windows`."""
    x = x.view(-1, height // size, width // size, size, size, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])
