"""The feed-forward blocks, each with a depthwise convolution: ConvFFN (Small, Base, Large) and GatedMLP (Light).

A block takes (B, H, W, dim), and the norm in front of it and the two ways around it, as its linear layers compute these
as well: f(norm(x)) + x + scale · skip.
"""

from torch import Tensor, nn

from mambair_ds.models.layout import convolve_depthwise, project


def _depthwise(channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


class ConvFFN(nn.Module):
    """f(x) = fc2(h + GELU(depthwise(h))) with h = GELU(fc1(x))."""

    def __init__(self, dim: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        # The nesting is that of the published names.
        self.dwconv = nn.ModuleDict({"depthwise_conv": nn.Sequential(_depthwise(hidden, kernel_size), nn.GELU())})
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm, skip: Tensor, scale: Tensor) -> Tensor:
        h = project(self.fc1, x, norm, gelu=True)
        h = convolve_depthwise(self.dwconv.get_submodule("depthwise_conv.0"), h, "gelu_residual")
        return project(self.fc2, h, residual=x, skip=skip, skip_scale=scale)


class GatedMLP(nn.Module):
    """f(x) = fc2(x1 · depthwise(LayerNorm(x2))) with x1, x2 the halves of GELU(fc1(x))."""

    def __init__(self, dim: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.sg = _SpatialGate(hidden // 2, kernel_size)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm, skip: Tensor, scale: Tensor) -> Tensor:
        h = self.sg(project(self.fc1, x, norm, gelu=True))
        return project(self.fc2, h, residual=x, skip=skip, skip_scale=scale)


class _SpatialGate(nn.Module):
    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = _depthwise(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return convolve_depthwise(self.conv, x2, "norm_gate", x1, self.norm)
