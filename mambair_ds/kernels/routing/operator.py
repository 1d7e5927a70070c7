"""Turns a backend's functions into `torch.library` operators, the prompt differentiable.

An operator's arguments are tensors and numbers, so noise travels as four of them, a `Draw`: its values or None, and,
for noise that is drawn where it is used, positions or None, seed and stream (the seed as the int64 of the same bits).
With s the scores and g the noise, the kernels work on s + g: log_softmax(s) + g differs from it by one number a token,
which changes neither the softmax nor its gradient.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambair_ds.kernels.philox import KeyedNoise

Draw = tuple[Tensor | None, Tensor | None, int, int]
Choose = Callable[[Tensor, Draw], Tensor]
Order = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Differentiate = Callable[[Tensor, Tensor, Tensor, Tensor, Draw], tuple[Tensor, Tensor]]
ChooseClass = Callable[[Tensor, Tensor | KeyedNoise | None], Tensor]
ClassPrompt = Callable[[Tensor, Tensor, Tensor, Tensor | KeyedNoise | None], Tensor]


def make_operators(
    backend: str, choose: Choose, order: Order, differentiate: Differentiate
) -> tuple[ChooseClass, Order, ClassPrompt]:
    """Register `mambair_ds::choose_class_<backend>`, `class_order_<backend>` and `class_prompt_<backend>`.

    Args:
        choose: (scores (B, n, T), noise) to index (B, n) int64.
        order: (index, the number of classes) to order and inverse, (B, n) int64.
        differentiate: (the prompts' gradient (B, n, N), scores, table, index, noise) to the gradients of scores, in
            their dtype, and table, float32: with p = softmax(s + g) and q = gradient · tableᵀ, p·(q − Σ p·q), and
            onehotᵀ · gradient. The prompts' gradient has the table's dtype.
    """

    @torch.library.custom_op(f"mambair_ds::choose_class_{backend}", mutates_args=())
    def choose_class(scores: Tensor, noise: Tensor | None, positions: Tensor | None, seed: int, stream: int) -> Tensor:
        return choose(scores.contiguous(), _contiguous(noise, positions, seed, stream))

    @choose_class.register_fake
    def _(scores, noise, positions, seed, stream):  # type: ignore[no-untyped-def]
        return scores.new_empty(scores.shape[:2], dtype=torch.int64)

    @torch.library.custom_op(f"mambair_ds::class_order_{backend}", mutates_args=())
    def class_order(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        return order(index.contiguous(), classes)

    @class_order.register_fake
    def _(index, classes):  # type: ignore[no-untyped-def]
        return index.new_empty(index.shape), index.new_empty(index.shape)

    @torch.library.custom_op(f"mambair_ds::class_prompt_{backend}", mutates_args=())
    def class_prompt(
        scores: Tensor, table: Tensor, index: Tensor,
        noise: Tensor | None, positions: Tensor | None, seed: int, stream: int,
    ) -> Tensor:  # fmt: skip
        return F.embedding(index, table)

    @class_prompt.register_fake
    def _(scores, table, index, noise, positions, seed, stream):  # type: ignore[no-untyped-def]
        return table.new_empty((*index.shape, table.shape[1]))

    @torch.library.custom_op(f"mambair_ds::class_prompt_{backend}_backward", mutates_args=())
    def prompt_backward(
        grad: Tensor, scores: Tensor, table: Tensor, index: Tensor,
        noise: Tensor | None, positions: Tensor | None, seed: int, stream: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        grad, scores, table, index = (tensor.contiguous() for tensor in (grad, scores, table, index))
        draw = _contiguous(noise, positions, seed, stream)
        grad_scores, grad_table = differentiate(grad, scores, table, index, draw)
        return grad_scores, grad_table.to(table.dtype)

    @prompt_backward.register_fake
    def _(grad, scores, table, index, noise, positions, seed, stream):  # type: ignore[no-untyped-def]
        return scores.new_empty(scores.shape), table.new_empty(table.shape)

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        *tensors, ctx.seed, ctx.stream = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return *prompt_backward(grad, *ctx.saved_tensors, ctx.seed, ctx.stream), *(None,) * 5

    class_prompt.register_autograd(backward, setup_context=setup_context)

    def choose_class_of(scores: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
        return choose_class(scores, *_draw(noise, scores.device))

    def class_prompt_of(scores: Tensor, table: Tensor, index: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
        return class_prompt(scores, table, index, *_draw(noise, scores.device))

    return choose_class_of, class_order, class_prompt_of


def _draw(noise: Tensor | KeyedNoise | None, device: torch.device) -> Draw:
    if not isinstance(noise, KeyedNoise):
        return noise, None, 0, 0
    seed = noise.key.seed
    return None, noise.key.positions.to(device), seed - (seed >> 63 << 64), noise.stream


def _contiguous(noise: Tensor | None, positions: Tensor | None, seed: int, stream: int) -> Draw:
    noise = None if noise is None else noise.contiguous()
    return noise, None if positions is None else positions.contiguous(), seed % 2**64, stream
