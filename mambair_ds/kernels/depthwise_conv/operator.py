"""Turns a backend's two kernels into one differentiable `torch.library` operator.

With c the convolution of x and g the gradient of the result, the gradient of c is g times the epilogue's derivative,
and that of x is the convolution of c's gradient with the kernel turned by 180°, plus what reaches x past the
convolution. So the backward pass is one kernel for the gradients of c, weight, bias and gate, and the forward kernel
once more, with the epilogue "add".
"""

from collections.abc import Callable

import torch
from torch import Tensor

Convolve = Callable[[Tensor, Tensor, Tensor, Tensor | None, str], Tensor]
Differentiate = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, str], tuple[Tensor, Tensor | None, Tensor, Tensor]
]
Operator = Callable[[Tensor, Tensor, Tensor, Tensor | None, str], Tensor]


def make_operator(name: str, convolve: Convolve, differentiate: Differentiate) -> Operator:
    """Register `mambair_ds::<name>` and its backward pass.

    Args:
        convolve: (x, kernel, bias, other, epilogue) to y, (B, H, W, C) in x's dtype. `kernel` is (k, k, C) and `bias`
            (C,), both float32. The epilogues are those of `depthwise_conv`, where `other` is the gate, and "add":
            other + c. x and other may have any strides.
        differentiate: (g, x, kernel, bias, gate, epilogue) to c's gradient in x's dtype; what else needs the value of
            c, g · sigmoid(c) for "sigmoid_gate", g · c for "gate", else None; and the gradients of kernel and bias,
            float32.
    """

    @torch.library.custom_op(f"mambair_ds::{name}", mutates_args=())
    def conv(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, epilogue: str) -> Tensor:
        return convolve(x, _channels_last(weight), bias.float(), gate, epilogue)

    @torch.library.custom_op(f"mambair_ds::{name}_backward", mutates_args=())
    def conv_backward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, epilogue: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernel = _channels_last(weight)
        grad_c, extra, grad_kernel, grad_bias = differentiate(grad, x, kernel, bias.float(), gate, epilogue)
        past = {"gelu_residual": grad, "sigmoid_gate": extra}.get(epilogue)
        turned = kernel.flip(0, 1).contiguous()
        grad_x = convolve(grad_c, turned, torch.zeros_like(grad_bias), past, "none" if past is None else "add")
        grad_weight = grad_kernel.permute(2, 0, 1)[:, None].to(weight.dtype).contiguous()
        grad_gate = x.new_empty(0) if gate is None or extra is None else extra.to(gate.dtype)
        return grad_x, grad_weight, grad_bias.to(bias.dtype), grad_gate

    @conv.register_fake
    def _(x, weight, bias, gate, epilogue):  # type: ignore[no-untyped-def]
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @conv_backward.register_fake
    def _(grad, x, weight, bias, gate, epilogue):  # type: ignore[no-untyped-def]
        like = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias))
        return *like, x.new_empty(0) if gate is None else gate.new_empty(gate.shape)

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        *tensors, ctx.epilogue = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        *grads, grad_gate = conv_backward(grad, *ctx.saved_tensors, ctx.epilogue)
        return *grads, grad_gate if ctx.epilogue == "gate" else None, None

    conv.register_autograd(backward, setup_context=setup_context)
    return conv


def _channels_last(weight: Tensor) -> Tensor:
    """(C, 1, k, k) as a contiguous (k, k, C), float32."""
    return weight[:, 0].permute(1, 2, 0).float().contiguous()
