"""The attentive state space module: tokens are routed to classes, sorted by class, and scanned in that order.

The class of a token does two things: it puts tokens of one kind side by side, so that the scan's memory reaches across
the whole picture, and it picks the token's prompt, which is added to what the scan reads out of its state (Guo et al.
2025, arXiv 2411.15269, section 4).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambair_ds.kernels.philox import KeyedNoise, NoiseKey
from mambair_ds.kernels.routing import choose_class, class_order, class_prompt
from mambair_ds.kernels.selective_scan import selective_scan
from mambair_ds.models.layout import convolve_depthwise, project


class AttentiveStateSpace(nn.Module):
    """The module for (B, H, W, dim); `index` is its place among the network's layers, in order of execution."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        d_state: int,
        inner_rank: int,
        num_tokens: int,
        index: int,
        scan_backend: str | None,
    ) -> None:
        super().__init__()
        self.index = index
        self.selectiveScan = SelectiveScan(hidden, d_state, scan_backend)
        self.out_norm = nn.LayerNorm(hidden)
        self.out_proj = nn.Linear(hidden, dim)
        self.in_proj = nn.Sequential(nn.Conv2d(dim, hidden, 1))
        self.CPE = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.embeddingB = nn.Embedding(num_tokens, inner_rank)
        self.route = Router(dim, num_tokens)
        nn.init.uniform_(self.embeddingB.weight, -1 / num_tokens, 1 / num_tokens)

    def forward(self, x: Tensor, norm: nn.LayerNorm, embedding_a: Tensor, noise: NoiseKey | None) -> Tensor:
        """x + f(norm(x)), (B, H, W, dim); `embedding_a` is the layer's half of the prompt table, (inner_rank, d_state).

        The linear layers compute norm and addition as well.
        """
        scores = self.route(x.flatten(1, 2), norm)
        gumbel = self._gumbel(scores, noise)
        index = self.route.decide(scores, gumbel)
        prompt = class_prompt(scores, self.embeddingB.weight @ embedding_a, index, gumbel)
        order, _ = class_order(index, scores.shape[-1])

        u = project(self.in_proj[0], x, norm)
        u = convolve_depthwise(self.CPE[0], u, "sigmoid_gate")
        # The prompt stays in token order though the sequence is sorted: the published network is trained so.
        y = self.selectiveScan(u.flatten(1, 2), prompt, order)
        return project(self.out_proj, y.view(u.shape), self.out_norm, residual=x)

    def _gumbel(self, scores: Tensor, noise: NoiseKey | None) -> Tensor | KeyedNoise | None:
        if not self.training:
            return None
        if noise is None:  # the published draw, number for number
            return -torch.empty_like(scores, dtype=torch.float32).exponential_().log()
        return KeyedNoise(noise, self.index)


class Router(nn.ModuleList):
    """Gives every token a score for each class, and decides on one."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        # The GELU in between belongs to the first; its place gives the second the published name.
        super().__init__([nn.Linear(dim, dim // 3), nn.GELU(), nn.Linear(dim // 3, num_tokens)])

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """(B, n, dim), before `norm`, to (B, n, num_tokens)."""
        return project(self[2], project(self[0], x, norm, gelu=True))

    def decide(self, scores: Tensor, noise: Tensor | KeyedNoise | None) -> Tensor:
        """The class of every token, (B, n) int64. The only place where a class is chosen."""
        return choose_class(scores, noise)


class SelectiveScan(nn.Module):
    """Mamba's scan with its input-dependent parameters, on a sequence (B, L, dim)."""

    def __init__(self, dim: int, d_state: int, backend: str | None) -> None:
        super().__init__()
        self.backend = backend
        rank = math.ceil(dim / 16)
        self.splits = (rank, d_state, d_state)
        # The published shapes: a leading 1 for the number of scan directions.
        self.x_proj_weight = nn.Parameter(torch.empty(1, rank + 2 * d_state, dim))
        self.dt_projs_weight = nn.Parameter(torch.empty(1, dim, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(1, dim))
        self.A_logs = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(dim, 1))
        self.Ds = nn.Parameter(torch.ones(dim))
        nn.init.uniform_(self.x_proj_weight, -(dim**-0.5), dim**-0.5)  # as nn.Linear does
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            step = torch.empty(1, dim).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, u: Tensor, prompt: Tensor, order: Tensor) -> Tensor:
        """(B, L, dim) to the same, scanned in `order` (B, L); `prompt` (B, L, d_state) is added to C place by place."""
        delta, B, C = F.linear(u, self.x_proj_weight[0]).split(self.splits, -1)
        delta = F.linear(delta, self.dt_projs_weight[0])
        with torch.autocast(u.device.type, enabled=False):  # the state and its rates are float32 under mixed precision
            A_logs, D, bias = (_wide(p) for p in (self.A_logs, self.Ds, self.dt_projs_bias[0]))
            return selective_scan(
                u, delta, -A_logs.exp(), B, C, D, bias, prompt=prompt.to(C.dtype), order=order, backend=self.backend
            )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
