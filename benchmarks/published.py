"""What the public MambaIRv2 code does for each operator's job, as a plain sequence of PyTorch's operations.

Written after the paper and the published network's behavior, in whatever dtype the inputs have. Where there are several
ways to write a step, this is a fast one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(qkv: Tensor, table: Tensor, index: Tensor, mask: Tensor, window: int, shift: int) -> Tensor:
    """Roll, cut into windows, attend with a materialized bias and mask, put together, roll back."""
    batch, height, width, _ = qkv.shape
    heads, tokens = table.shape[1], window**2
    x = cut(qkv.roll((-shift, -shift), (1, 2)), window)
    q, k, v = x.view(len(x), tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    logits = logits + table[index.flatten()].view(tokens, tokens, heads).permute(2, 0, 1).contiguous()
    logits = logits.view(batch, -1, heads, tokens, tokens) + mask[:, None]
    y = (logits.flatten(0, 1).softmax(-1) @ v).transpose(1, 2)
    y = y.reshape(batch, height // window, width // window, window, window, -1).transpose(2, 3)
    return y.reshape(batch, height, width, -1).roll((shift, shift), (1, 2))


def attention_constants(height: int, width: int, window: int, shift: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The bias table's row for each pair of tokens in a window, and the mask of each window of a rolled picture."""
    place = torch.arange(window, device=like.device)
    delta = place[:, None] - place + window - 1
    index = delta[:, None, :, None] * (2 * window - 1) + delta[None, :, None, :]
    rows, columns = (_strips(side, window, shift, like.device) for side in (height, width))
    region = cut((3 * rows[:, None] + columns)[None, :, :, None], window)
    return index.flatten(0, 1).flatten(1), torch.where(region == region.mT, 0.0, -100.0).to(like)


def _strips(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which of the three parts that rolling brings together a row or column is of."""
    place = torch.arange(side, device=device)
    return 1 * (place >= side - window) + 1 * (place >= side - shift)


def cut(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) to (windows, window², C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window**2, channels)


def route(scores: Tensor, table: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A hard Gumbel softmax, its product with the prompts, and a sort of the tokens by class: prompt and order."""
    soft = (scores.log_softmax(-1) + noise).softmax(-1)
    index = soft.argmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, index[..., None], 1.0)
    policy = hard - soft.detach() + soft
    return policy.to(table.dtype) @ table, torch.sort(index, dim=-1, stable=True).indices


def route_and_move(scores: Tensor, table: Tensor, rows: Tensor, result: Tensor) -> tuple[Tensor, ...]:
    """`route` in float32 with torch's noise, then the scan's input into the order and its result out of it."""
    scores = scores.float()
    prompt, order = route(scores, table, -torch.empty_like(scores).exponential_().log())
    inverse = order.argsort(-1)
    return prompt, order, *(x.gather(1, i[..., None].expand_as(x)) for x, i in ((rows, order), (result, inverse)))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epilogue: str,
    gate: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """A grouped convolution in PyTorch's own layout, its activation there, and the rest in ours."""
    inner = x if gamma is None else F.layer_norm(x, gamma.shape, gamma, beta)
    inner = inner.permute(0, 3, 1, 2).contiguous()
    c = F.conv2d(inner, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    c = F.gelu(c) if epilogue == "gelu_residual" else torch.sigmoid(c) if epilogue == "sigmoid_gate" else c
    c = c.permute(0, 2, 3, 1).contiguous()
    return x + c if epilogue == "gelu_residual" else (x if gate is None else gate) * c


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gelu: bool,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: Tensor | None = None,
) -> Tensor:
    """A linear layer, what stands in front of it, and what follows, one after the other."""
    y = F.linear(x if gamma is None else F.layer_norm(x, gamma.shape, gamma, beta), weight, bias)
    y = F.gelu(y) if gelu else y
    y = y if residual is None else y + residual
    return y if skip is None or skip_scale is None else skip_scale * skip + y
