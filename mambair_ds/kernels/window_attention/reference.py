"""Window attention in plain operations, differentiated by autograd: roll, cut into windows, attend, and back."""

import torch
from einops import rearrange
from torch import Tensor


def window_attention(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> Tensor:
    """See `mambair_ds.kernels.window_attention.window_attention`."""
    _, height, width, _ = qkv.shape
    w, dtype = window_size, torch.promote_types(qkv.dtype, torch.float32)
    rolled = qkv.to(dtype).roll((-shift, -shift), (1, 2))
    q, k, v = rearrange(
        rolled, "b (m i) (n j) (three heads d) -> three b (m n) heads (i j) d", three=3, heads=num_heads, i=w, j=w
    )
    bias = table.to(dtype)[relative_position_index(w).to(table.device)].permute(2, 0, 1)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    region = rearrange(regions(height, width, shift), "(m i) (n j) -> (m n) (i j)", i=w, j=w).to(qkv.device)
    logits = torch.where(region[:, None, :, None] == region[:, None, None], logits, logits - 100)
    out = logits.softmax(-1) @ v
    out = rearrange(out, "b (m n) heads (i j) d -> b (m i) (n j) (heads d)", m=height // w, i=w, j=w)
    return out.roll((shift, shift), (1, 2)).to(qkv.dtype)


def relative_position_index(window_size: int) -> Tensor:
    """The row of the bias table for each query and key of a window: (Δrow+w-1)·(2w-1) + Δcolumn+w-1, (w², w²) int64."""
    row, column = torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down = row[:, None] - row[None] + window_size - 1
    across = column[:, None] - column[None] + window_size - 1
    return down * (2 * window_size - 1) + across


def regions(height: int, width: int, shift: int) -> Tensor:
    """Which part of the picture each pixel of the rolled picture comes from, (H, W) int64.

    The roll moves `shift` rows from the top to the bottom, 2, `shift` columns from left to right, 1, or both, 3.
    """
    return 2 * (torch.arange(height) >= height - shift)[:, None] + 1 * (torch.arange(width) >= width - shift)
