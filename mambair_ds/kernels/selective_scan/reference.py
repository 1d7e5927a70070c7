"""The selective scan as a plain loop, differentiated by autograd: what the other backends are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, delta_softplus: bool
) -> Tensor:
    """See `mambair_ds.kernels.selective_scan.selective_scan`; in float64 where `u` is float64, else in float32."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u_, delta, A, B, C, D, delta_bias = (x.to(dtype) for x in (u, delta, A, B, C, D, delta_bias))
    delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    state = u_.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * u_[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1) + D * u_[:, t])
    return torch.stack(outputs, 1).to(u.dtype)
