"""Window attention on the CPU: a few windows at a time, so that their logits stay in the cache.

PyTorch's own fast attention gives no gradient to a bias, and falls back to plain operations that write, read and keep
the logits of all windows: 32 MiB each time, in every layer, for two 64×64 pictures. Here the backward pass computes
the logits again instead.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHE = 2 * 2**20  # bytes of logits at a time: within a core's share of the cache, with room for their gradient


def window_attention(qkv: Tensor, bias: Tensor, kind: Tensor) -> Tensor:
    """See `mambair_ds.kernels.window_attention.window_attention`; computes in float32 at least."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        return _WindowAttention.apply(qkv.to(dtype), bias.to(dtype), kind).to(qkv.dtype)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, kind: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        windows, tokens, _, heads, width = qkv.shape
        kinds = kind.tolist() * (windows // len(kind))
        ctx.save_for_backward(qkv, bias)
        ctx.kinds = kinds
        out = qkv.new_empty(windows, tokens, heads, width)
        for part in _parts(qkv):
            q, k, v = _heads(qkv[part])
            weights = _weights(q, k, bias, kinds[part])
            out[part] = torch.bmm(weights, v).view(-1, heads, tokens, width).transpose(1, 2)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        qkv, bias = ctx.saved_tensors
        kinds = ctx.kinds
        windows, tokens, _, heads, width = qkv.shape
        grad_out = grad_out.view(windows, tokens, 1, heads, width)
        grad_qkv, grad_bias = torch.empty_like(qkv), torch.zeros_like(bias)
        for part in _parts(qkv):
            q, k, v = _heads(qkv[part])
            (grad,) = _heads(grad_out[part])
            weights = _weights(q, k, bias, kinds[part])
            grad_v = grad.transpose(1, 2) @ weights  # transposed, like grad_k: the faster order for a narrow head
            grad_weights = torch.bmm(grad, v.transpose(1, 2))
            grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            for window_kind, grad_window in zip(kinds[part], grad_logits.view(-1, *bias.shape[1:]), strict=True):
                grad_bias[window_kind] += grad_window
            scale = width**-0.5
            grad_q = (grad_logits @ k).mul_(scale)
            grad_k = (q.transpose(1, 2) @ grad_logits).mul_(scale)
            for i, g in enumerate((grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2))):
                grad_qkv[part, :, i] = g.unflatten(0, (-1, heads)).transpose(1, 2)
        return grad_qkv, grad_bias, None


def _parts(qkv: Tensor) -> list[slice]:
    """Cut the windows into runs whose logits fit the cache."""
    windows, tokens, _, heads, _ = qkv.shape
    step = max(1, _CACHE // (heads * tokens * tokens * qkv.element_size()))
    return [slice(i, i + step) for i in range(0, windows, step)]


def _heads(x: Tensor) -> tuple[Tensor, ...]:
    """(windows, tokens, k, heads, d) to k tensors (windows·heads, tokens, d)."""
    return x.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)


def _weights(q: Tensor, k: Tensor, bias: Tensor, kinds: list[int]) -> Tensor:
    """The attention weights, (windows·heads, tokens, tokens)."""
    logits = torch.cat([bias[kind] for kind in kinds])
    return logits.baddbmm_(q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)
