"""The selective scan as a plain loop, differentiated by autograd: what the other backends are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def take_rows(x: Tensor, order: Tensor | None) -> Tensor:
    """Row i of every sample, x (B, L, K), becomes its row order[i]; unchanged without an order."""
    return x if order is None else x.flatten(0, 1).index_select(0, _places(order)).view_as(x)


def put_rows(x: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `take_rows`: row i becomes row order[i]."""
    if order is None:
        return x
    rows = x.flatten(0, 1)
    return torch.empty_like(rows).index_copy_(0, _places(order), rows).view_as(x)


def _places(order: Tensor) -> Tensor:
    """Where an order's rows lie among those of all samples."""
    return (order + torch.arange(0, order.numel(), order.shape[1], device=order.device)[:, None]).flatten()


def selective_scan(
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
) -> Tensor:
    """See `mambair_ds.kernels.selective_scan.selective_scan`; in float64 where `u` is float64, else in float32."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, delta, B, C = (take_rows(tensor.to(dtype), order) for tensor in (u, delta, B, C))
    A, D, delta_bias = (tensor.to(dtype) for tensor in (A, D, delta_bias))
    if prompt is not None:
        C = C + prompt
    delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    state = x.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for x_t, delta_t, B_t, C_t in zip(x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        state = torch.exp(delta_t[:, :, None] * A) * state + (delta_t * x_t)[:, :, None] * B_t[:, None, :]
        outputs.append((state * C_t[:, None, :]).sum(-1) + D * x_t)
    return put_rows(torch.stack(outputs, 1), order).to(u.dtype)
