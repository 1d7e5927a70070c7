"""Window attention with relative position bias and shifted windows (Liu et al. 2021, arXiv 2103.14030)."""

import torch
from torch import Tensor, nn

from mambair_ds.kernels.window_attention import window_attention
from mambair_ds.models.layout import project


class WindowAttention(nn.Module):
    """The attention of one layer, after the projection to queries, keys and values."""

    def __init__(self, dim: int, window_size: int, num_heads: int, shifted: bool) -> None:
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.shift = window_size // 2 if shifted else 0
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, qkv: Tensor, residual: Tensor) -> Tensor:
        """Attend within windows and add the residual: (B, H, W, 3·dim) and (B, H, W, dim) to (B, H, W, dim)."""
        table = self.relative_position_bias_table
        y = window_attention(qkv, table, self.num_heads, self.window_size, self.shift)
        return project(self.proj, y, residual=residual)
