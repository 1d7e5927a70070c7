"""Window attention in plain operations: PyTorch's scaled_dot_product_attention, differentiated by autograd."""

import torch.nn.functional as F
from torch import Tensor


def window_attention(qkv: Tensor, bias: Tensor, kind: Tensor) -> Tensor:
    """See `mambair_ds.kernels.window_attention.window_attention`."""
    windows, tokens, _, heads, width = qkv.shape
    pictures = windows // len(kind)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, pictures, len(kind) * heads, tokens, width)
    mask = bias.to(qkv.dtype)[kind].flatten(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(windows, heads, tokens, width).transpose(1, 2).reshape(windows, tokens, heads * width)
