"""Turns a backend's forward and backward pass into one differentiable `torch.library` operator.

Only the inputs and, of a norm, two numbers a row are kept between the two. The residual's gradient is the result's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Absent = Tensor | None
Forward = Callable[
    [Tensor, Tensor, Absent, Absent, Absent, Absent, Absent, Absent, bool, torch.dtype, torch.dtype],
    tuple[Tensor, Tensor],
]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Absent, Absent, Absent, Absent, Absent, bool, torch.dtype],
    tuple[Tensor, Tensor, Absent, Absent, Absent, Absent, Absent],
]
Operator = Callable[
    [Tensor, Tensor, Absent, Absent, Absent, Absent, Absent, Absent, bool, torch.dtype], tuple[Tensor, Tensor]
]


def make_operator(name: str, forward: Forward, backward: Backward) -> Operator:
    """Register `mambair_ds::<name>` and its backward pass.

    Args:
        forward: (x, weight, bias, gamma, beta, residual, skip, scale, gelu, dtype, out_dtype) to y, (rows, out) in
            `out_dtype`, and the norm's statistics, (2, rows) float32, or (2, 0) without one; `dtype` is that of the
            product. x, residual and skip are (rows, channels), contiguous.
        backward: (gradient of y, the statistics, x, weight, bias, gamma, beta, skip, scale, gelu, dtype) to the
            gradients of x, weight, bias, gamma, beta, skip and scale, each of its input's shape and dtype, None for
            what is None.
    """

    def rows(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).contiguous()

    def result_dtype(dtype: torch.dtype, residual: Tensor | None) -> torch.dtype:
        return dtype if residual is None else torch.promote_types(dtype, residual.dtype)

    @torch.library.custom_op(f"mambair_ds::{name}", mutates_args=())
    def linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        skip: Tensor | None,
        scale: Tensor | None,
        gelu: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        out_dtype = result_dtype(dtype, residual)
        residual, skip = (None if t is None else rows(t) for t in (residual, skip))
        y, statistics = forward(rows(x), weight, bias, gamma, beta, residual, skip, scale, gelu, dtype, out_dtype)
        return y.view(*x.shape[:-1], len(weight)), statistics

    @torch.library.custom_op(f"mambair_ds::{name}_backward", mutates_args=())
    def linear_backward(
        grad: Tensor,
        statistics: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        skip: Tensor | None,
        scale: Tensor | None,
        gelu: bool,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        rows_of_skip = None if skip is None else rows(skip)
        grads = backward(rows(grad), statistics, rows(x), weight, bias, gamma, beta, rows_of_skip, scale, gelu, dtype)
        inputs = (x, weight, bias, gamma, beta, skip, scale)
        pairs = zip(grads, inputs, strict=True)
        return [g.view(t.shape) for g, t in pairs if g is not None and t is not None]

    @linear.register_fake
    def _(x, weight, bias, gamma, beta, residual, skip, scale, gelu, dtype):  # type: ignore[no-untyped-def]
        y = x.new_empty((*x.shape[:-1], len(weight)), dtype=result_dtype(dtype, residual))
        return y, x.new_empty((2, 0 if gamma is None else x.numel() // x.shape[-1]), dtype=torch.float32)

    @linear_backward.register_fake
    def _(grad, statistics, x, weight, bias, gamma, beta, skip, scale, gelu, dtype):  # type: ignore[no-untyped-def]
        inputs = (x, weight, bias, gamma, beta, skip, scale)
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs if t is not None]

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, weight, bias, gamma, beta, residual, skip, scale, ctx.gelu, ctx.dtype = inputs
        ctx.set_materialize_grads(False)  # nobody differentiates the statistics: no zeros for them
        ctx.save_for_backward(output[1], x, weight, bias, gamma, beta, skip, scale)
        ctx.residual_dtype = None if residual is None else residual.dtype

    def differentiate(ctx, grad, _grad_statistics):  # type: ignore[no-untyped-def]
        statistics, *inputs = ctx.saved_tensors
        present = iter(linear_backward(grad, statistics, *inputs, ctx.gelu, ctx.dtype))
        grads = [None if t is None else next(present) for t in inputs]
        residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
        return *grads[:5], residual, *grads[5:], None, None

    linear.register_autograd(differentiate, setup_context=setup_context)
    return linear
