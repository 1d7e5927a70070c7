"""Turns a backend's forward and backward pass into one differentiable `torch.library` operator.

Besides y the forward pass returns the states at the start of every chunk of the sequence, from which the backward pass
recomputes the others: memory stays linear in the length, and at 1/chunk of what keeping all states would take.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor]
]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool],
    list[Tensor],
]


def make_operator(
    name: str, forward: Forward, backward: Backward, chunk: int, kept_dtype: Callable[[torch.dtype], torch.dtype]
) -> Forward:
    """Register `mambair_ds::<name>` and its backward pass.

    Args:
        forward: (u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus) to y, (B, L, D) in u's dtype, and
            the states at the start of every chunk, (B, ceil(L / chunk), N, D).
        backward: (gradient of y, the states, the arguments of `forward`) to the gradients of u, delta, A, B, C, D,
            delta_bias and, where there is one, prompt, each of its input's shape and dtype.
        chunk: the positions a chunk has.
        kept_dtype: from u's dtype to that of these states.
    """

    @torch.library.custom_op(f"mambair_ds::{name}", mutates_args=())
    def scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        prompt: Tensor | None,
        order: Tensor | None,
        delta_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        return forward(u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus)

    @torch.library.custom_op(f"mambair_ds::{name}_backward", mutates_args=())
    def scan_backward(
        grad_y: Tensor,
        states: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        prompt: Tensor | None,
        order: Tensor | None,
        delta_softplus: bool,
    ) -> list[Tensor]:
        return backward(grad_y, states, u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus)

    @scan.register_fake
    def _(u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus):  # type: ignore[no-untyped-def]
        batch, length, channels = u.shape
        chunks = (length + chunk - 1) // chunk
        states = u.new_empty((batch, chunks, A.shape[1], channels), dtype=kept_dtype(u.dtype))
        return torch.empty_like(u, memory_format=torch.contiguous_format), states

    @scan_backward.register_fake
    def _(grad_y, states, u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus):  # type: ignore[no-untyped-def]
        inputs = (u, delta, A, B, C, D, delta_bias, prompt)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        *tensors, ctx.delta_softplus = inputs
        ctx.set_materialize_grads(False)  # nobody differentiates the states: no zeros for them
        ctx.save_for_backward(output[1], *tensors)

    def differentiate(ctx, grad_y, grad_states):  # type: ignore[no-untyped-def]
        gradients = scan_backward(grad_y, *ctx.saved_tensors, ctx.delta_softplus)
        return *gradients, *[None] * (10 - len(gradients))  # none for prompt where there is none, order, delta_softplus

    scan.register_autograd(differentiate, setup_context=setup_context)
    return scan
