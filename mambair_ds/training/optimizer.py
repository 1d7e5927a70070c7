"""The optimizer of a run: Adam or AdamW, and with them the running mean of the weights.

The mean is part of the optimizer's state, so ZeRO splits it with the moments, and it follows the float32 weights that
the optimizer steps on, whatever the network computes with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mambair_ds.config import OptimizerConfig
from mambair_ds.kernels.adam import Rule, Tensors, adam_step

MOMENTS = ("exp_avg", "exp_avg_sq")
MEAN = "params_ema"


class Adam(torch.optim.Optimizer):
    """torch.optim's Adam and AdamW in one pass (DeepSpeed's own would be compiled), with an optional running mean."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, ema_decay: float) -> None:
        """Step on `parameters`, float32.

        Args:
            config: type, rate, betas and weight decay.
            ema_decay: weight of the past in the mean; 0 keeps none.
        """
        self._decoupled, self._decay = config.type == "AdamW", ema_decay
        self.kinds = (*MOMENTS, MEAN) if ema_decay else MOMENTS
        """What the state of a parameter has of its shape."""
        self.skipped: Tensor | None = None
        """(), on the parameters' device: 1.0 if the next step is to change nothing, else 0.0; read there alone."""
        defaults = {"lr": config.lr, "betas": config.betas, "eps": 1e-8, "weight_decay": config.weight_decay}
        super().__init__(parameters, defaults)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's moments, mean and steps; before its first step zeros, and the weights as they are."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for kind in self.kinds:
                like = parameter.detach()
                state[kind] = like.clone() if kind == MEAN else torch.zeros_like(like)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step on all parameters that have a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            states = [self.state_of(weight) for weight in weights]
            kept = {kind: [state[kind] for state in states if kind in state] for kind in (*MOMENTS, MEAN, "step")}
            tensors = Tensors(weights, [weight.grad for weight in weights], *kept.values())
            rule = Rule(
                group["lr"], group["betas"], group["eps"], group["weight_decay"], self._decoupled, self._decay
            )  # fmt: skip
            adam_step(tensors, rule, self.skipped)
