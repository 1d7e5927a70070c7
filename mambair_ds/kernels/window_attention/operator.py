"""Turns a backend's forward and backward pass into one differentiable `torch.library` operator.

Besides the result the forward pass returns, for every pixel and head, the base-2 logarithm of the sum of its
exponentiated logits, from which the backward pass computes the weights again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, int, int, int], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int], tuple[Tensor, Tensor]]


def make_operator(name: str, forward: Forward, backward: Backward) -> Forward:
    """Register `mambair_ds::<name>` and its backward pass.

    Args:
        forward: (qkv, table, num_heads, window_size, shift) to the result, (B, H, W, C) in qkv's dtype, and the
            logarithms, (B, H, W, heads) float32. qkv is contiguous, here and below.
        backward: (gradient of the result, contiguous; the result; the logarithms; the arguments of `forward`) to the
            gradients of qkv and table, each of its input's shape and dtype.
    """

    @torch.library.custom_op(f"mambair_ds::{name}", mutates_args=())
    def attend(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
        return forward(qkv.contiguous(), table, num_heads, window_size, shift)

    @torch.library.custom_op(f"mambair_ds::{name}_backward", mutates_args=())
    def attend_backward(
        grad: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int
    ) -> tuple[Tensor, Tensor]:
        grad, qkv = grad.contiguous(), qkv.contiguous()
        return backward(grad, out, lse, qkv, table, num_heads, window_size, shift)

    @attend.register_fake
    def _(qkv, table, num_heads, window_size, shift):  # type: ignore[no-untyped-def]
        pixels = qkv.shape[:3]
        lse = qkv.new_empty((*pixels, num_heads), dtype=torch.float32)
        return qkv.new_empty((*pixels, qkv.shape[3] // 3)), lse

    @attend_backward.register_fake
    def _(grad, out, lse, qkv, table, num_heads, window_size, shift):  # type: ignore[no-untyped-def]
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (qkv, table))

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        qkv, table, *ctx.sizes = inputs
        ctx.set_materialize_grads(False)  # nobody differentiates the logarithms: no zeros for them
        ctx.save_for_backward(*output, qkv, table)

    def differentiate(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
        return *attend_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None

    attend.register_autograd(differentiate, setup_context=setup_context)
    return attend
