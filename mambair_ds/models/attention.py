"""Window attention with relative position bias and shifted windows (Liu et al. 2021, arXiv 2103.14030)."""

import functools

import torch
from torch import Tensor, nn

from mambair_ds.kernels.window_attention import window_attention


class WindowAttention(nn.Module):
    """The attention of one layer, after the projection to queries, keys and values."""

    def __init__(self, dim: int, window_size: int, num_heads: int, shifted: bool) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.shifted = window_size, num_heads, shifted
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, qkv: Tensor, rows: int, columns: int) -> Tensor:
        """Attend within windows.

        Args:
            qkv: (B·rows·columns, window_size², 3·dim).
            rows, columns: windows of a picture, down and across.

        Returns:
            (B·rows·columns, window_size², dim).
        """
        bias = spread_bias(self.relative_position_bias_table, self.window_size)[None]
        if self.shifted:
            bias = bias + seam_masks(self.window_size, bias.device)[:, None]
            kind = window_kinds(rows, columns, bias.device)
        else:
            kind = torch.zeros(rows * columns, dtype=torch.int64, device=bias.device)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        return self.proj(window_attention(qkv, bias, kind))


def spread_bias(table: Tensor, window_size: int) -> Tensor:
    """The bias of every query and key, (heads, w², w²), which is `table[relative_position_index(w)]`.

    Seen from one key, the queries of a window are a w×w patch of the (2w-1)×(2w-1) table, which moves with the key. As
    a sliding window its gradient is a fraction of that of an index.
    """
    side = 2 * window_size - 1
    patches = table.T.unflatten(1, (side, side)).unfold(1, window_size, 1).unfold(2, window_size, 1)
    return patches.flip((1, 2)).permute(0, 3, 4, 1, 2).flatten(3, 4).flatten(1, 2)


def relative_position_index(window_size: int) -> Tensor:
    """The row of the bias table for each query and key of a window: (Δrow+w-1)·(2w-1) + Δcolumn+w-1, (w², w²) int64."""
    row, column = torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down = row[:, None] - row[None] + window_size - 1
    across = column[:, None] - column[None] + window_size - 1
    return down * (2 * window_size - 1) + across


@functools.cache
def seam_masks(window_size: int, device: torch.device) -> Tensor:
    """What keeps apart the regions that the shift brings together: -100 between them, else 0; (4, w², w²).

    A picture rolled by half a window has a seam through its last row and its last column of windows. Kind 0 has none,
    1 a vertical seam (last column), 2 a horizontal one (last row), 3 both. The published mask is -100, not -inf.
    """
    with torch.inference_mode(False):  # the cached tensor must serve training too
        half = torch.arange(window_size, device=device) >= window_size // 2
        row, column = half[:, None].expand(-1, window_size).flatten(), half.repeat(window_size)
        below, beside = row[:, None] != row, column[:, None] != column
        apart = torch.stack([torch.zeros_like(below), beside, below, below | beside])
        return apart * -100.0


@functools.cache
def window_kinds(rows: int, columns: int, device: torch.device) -> Tensor:
    """The kind (see `seam_masks`) of each of rows × columns windows, (rows·columns,) int64."""
    with torch.inference_mode(False):
        last_row = torch.arange(rows, device=device) == rows - 1
        last_column = torch.arange(columns, device=device) == columns - 1
        return (2 * last_row[:, None] + 1 * last_column).flatten()
