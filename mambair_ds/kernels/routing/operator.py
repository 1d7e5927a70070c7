"""Turns a backend's functions into `torch.library` operators, the prompt differentiable."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Choose = Callable[[Tensor], Tensor]
Order = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Differentiate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Prompt = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_operators(
    backend: str, choose: Choose, order: Order, differentiate: Differentiate
) -> tuple[Choose, Order, Prompt]:
    """Register `mambair_ds::choose_class_<backend>`, `class_order_<backend>` and `class_prompt_<backend>`.

    Args:
        choose: logits (B, n, T) to index (B, n) int64.
        order: (index, the number of classes) to order and inverse, (B, n) int64.
        differentiate: (the prompts' gradient (B, n, N), logits, table, index) to the gradients of logits and table,
            both float32: with p = softmax(logits) and q = gradient · tableᵀ, p·(q − Σ p·q), and onehotᵀ · gradient.
    """

    @torch.library.custom_op(f"mambair_ds::choose_class_{backend}", mutates_args=())
    def choose_class(logits: Tensor) -> Tensor:
        return choose(logits.contiguous())

    @choose_class.register_fake
    def _(logits):  # type: ignore[no-untyped-def]
        return logits.new_empty(logits.shape[:2], dtype=torch.int64)

    @torch.library.custom_op(f"mambair_ds::class_order_{backend}", mutates_args=())
    def class_order(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        return order(index.contiguous(), classes)

    @class_order.register_fake
    def _(index, classes):  # type: ignore[no-untyped-def]
        return index.new_empty(index.shape), index.new_empty(index.shape)

    @torch.library.custom_op(f"mambair_ds::class_prompt_{backend}", mutates_args=())
    def class_prompt(logits: Tensor, table: Tensor, index: Tensor) -> Tensor:
        return F.embedding(index, table)

    @class_prompt.register_fake
    def _(logits, table, index):  # type: ignore[no-untyped-def]
        return table.new_empty((*index.shape, table.shape[1]))

    @torch.library.custom_op(f"mambair_ds::class_prompt_{backend}_backward", mutates_args=())
    def prompt_backward(grad: Tensor, logits: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (grad.float(), logits, table.float(), index)
        grad_logits, grad_table = differentiate(*(tensor.contiguous() for tensor in arguments))
        return grad_logits, grad_table.to(table.dtype)

    @prompt_backward.register_fake
    def _(grad, logits, table, index):  # type: ignore[no-untyped-def]
        return logits.new_empty(logits.shape), table.new_empty(table.shape)

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return *prompt_backward(grad, *ctx.saved_tensors), None

    class_prompt.register_autograd(backward, setup_context=setup_context)
    return choose_class, class_order, class_prompt
