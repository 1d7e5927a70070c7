"""The selective scan as a plain loop, differentiated by autograd: what the other backends are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, delta_softplus: bool
) -> Tensor:
    """See `mambair_ds.kernels.selective_scan.selective_scan`; in float64 where `u` is float64, else in float32."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, delta, A, B, C, D, delta_bias = (tensor.to(dtype) for tensor in (u, delta, A, B, C, D, delta_bias))
    delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    state = x.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for x_t, delta_t, B_t, C_t in zip(x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        state = torch.exp(delta_t[:, :, None] * A) * state + (delta_t * x_t)[:, :, None] * B_t[:, None, :]
        outputs.append((state * C_t[:, None, :]).sum(-1) + D * x_t)
    return torch.stack(outputs, 1).to(u.dtype)
