"""Turns a backend's two kernels into one differentiable `torch.library` operator.

With c the convolution of x and g the gradient of the result, the gradient of c is g times the epilogue's derivative,
and that of x is the convolution of c's gradient with the kernel turned by 180°, plus what reaches x past the
convolution. So the backward pass is one kernel for the gradients of c, weight, bias and gate, and the forward kernel
once more, with the epilogue "add". A norm in front makes a normalized picture that lives as long as the call: reading
it k times costs less than normalizing what each tile reads, borders of other tiles included.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Convolve = Callable[[Tensor, Tensor, Tensor, Tensor | None, str], Tensor]
Differentiate = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, str], tuple[Tensor, Tensor | None, Tensor, Tensor]
]
Normalize = Callable[[Tensor, Tensor, Tensor], Tensor]
NormalizeBackward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Operator = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, str], Tensor]

EPS = 1e-5
"""What is added to the variance in the norm."""


def make_operator(
    name: str,
    convolve: Convolve,
    differentiate: Differentiate,
    normalize: Normalize | None = None,
    normalize_backward: NormalizeBackward | None = None,
) -> Operator:
    """Register `mambair_ds::<name>` and its backward pass.

    Args:
        convolve: (x, kernel, bias, other, epilogue) to y, (B, H, W, C) in x's dtype. `kernel` is (k, k, C) and `bias`
            (C,), both float32. The epilogues are those of `depthwise_conv` without a norm, where `other` is the gate,
            and "add": other + c. x and other may have any strides.
        differentiate: (g, x, kernel, bias, gate, epilogue) to c's gradient in x's dtype; what else needs the value of
            c, g · sigmoid(c) for "sigmoid_gate", g · c for "gate", else None; and the gradients of kernel and bias,
            float32.
        normalize: (x, weight, bias) to the LayerNorm of x's channels, in x's dtype; weight and bias are float32.
            None for an operator that gets no norm.
        normalize_backward: (g, x, weight) to the gradients of x, in its dtype, of weight and of bias, in float32.
    """

    @torch.library.custom_op(f"mambair_ds::{name}", mutates_args=())
    def conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        epilogue: str,
    ) -> Tensor:
        if normalize and norm_weight is not None and norm_bias is not None:
            x = normalize(x, norm_weight.float(), norm_bias.float())
        return convolve(x, _channels_last(weight), bias.float(), gate, epilogue)

    @torch.library.custom_op(f"mambair_ds::{name}_backward", mutates_args=())
    def conv_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        epilogue: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        kernel, picture = _channels_last(weight), x
        if normalize and norm_weight is not None and norm_bias is not None:
            picture = normalize(x, norm_weight.float(), norm_bias.float())
        grad_c, extra, grad_kernel, grad_bias = differentiate(grad, picture, kernel, bias.float(), gate, epilogue)
        past = {"gelu_residual": grad, "sigmoid_gate": extra}.get(epilogue)
        turned = kernel.flip(0, 1).contiguous()
        grad_x = convolve(grad_c, turned, torch.zeros_like(grad_bias), past, "none" if past is None else "add")
        grad_weight = grad_kernel.permute(2, 0, 1)[:, None].to(weight.dtype).contiguous()
        grad_gate = x.new_empty(0) if gate is None or extra is None else extra.to(gate.dtype)
        grad_norm_weight, grad_norm_bias = x.new_empty(0), x.new_empty(0)
        if normalize_backward and norm_weight is not None and norm_bias is not None:
            grad_x, grad_norm_weight, grad_norm_bias = normalize_backward(grad_x, x, norm_weight.float())
            grad_norm_weight, grad_norm_bias = (
                grad_norm_weight.to(norm_weight.dtype),
                grad_norm_bias.to(norm_bias.dtype),
            )
        return grad_x, grad_weight, grad_bias.to(bias.dtype), grad_gate, grad_norm_weight, grad_norm_bias

    @conv.register_fake
    def _(x, weight, bias, gate, norm_weight, norm_bias, epilogue):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape)

    @conv_backward.register_fake
    def _(grad, x, weight, bias, gate, norm_weight, norm_bias, epilogue):  # type: ignore[no-untyped-def]
        tensors = (x, weight, bias, gate, norm_weight, norm_bias)
        return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        *tensors, ctx.epilogue = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        inputs = ctx.saved_tensors  # once: activation checkpointing allows no second look
        grads = conv_backward(grad, *inputs, ctx.epilogue)
        return *(g if t is not None else None for g, t in zip(grads, inputs, strict=True)), None

    conv.register_autograd(backward, setup_context=setup_context)
    return conv


def _channels_last(weight: Tensor) -> Tensor:
    """(C, 1, k, k) as a contiguous (k, k, C), float32."""
    return weight[:, 0].permute(1, 2, 0).float().contiguous()
