"""PyTorch's own fused Adam, and a pass for the mean."""

import torch
from torch import Tensor
from torch.optim.adam import adam

from mambair_ds.kernels.adam import Rule, Tensors


def adam_step(tensors: Tensors, rule: Rule, skipped: Tensor | None) -> None:
    """See `mambair_ds.kernels.adam.adam_step`."""
    beta1, beta2 = rule.betas
    adam(
        tensors.weights, tensors.gradients, tensors.exp_avgs, tensors.exp_avg_sqs, [], tensors.steps,
        fused=True, found_inf=skipped, decoupled_weight_decay=rule.decoupled, amsgrad=False, maximize=False,
        lr=rule.lr, beta1=beta1, beta2=beta2, weight_decay=rule.weight_decay, eps=rule.eps,
    )  # fmt: skip
    if not tensors.means:
        return
    share = 1 - rule.decay
    if skipped is None:
        torch._foreach_lerp_(tensors.means, tensors.weights, share)
    else:
        for mean, weight in zip(tensors.means, tensors.weights, strict=True):
            mean.lerp_(weight, share * (1 - skipped))
