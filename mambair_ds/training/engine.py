"""DeepSpeed, in one place: its configuration, its start, and the few things that the loop asks of it.

Precision, accumulation, clipping and ZeRO are DeepSpeed's own. Two of its settings differ from their
defaults because the defaults change the numbers: under autocast, gradients of Linear and Conv would be reduced in
bf16, and stage 3 would swap Linear for a variant that computes in another order.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mambair_ds.config import TrainConfig
from mambair_ds.models.mambairv2 import AttentiveLayer
from mambair_ds.training.optimizer import Adam

# DeepSpeed chooses its accelerator at import.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import deepspeed.ops
from deepspeed.utils import set_z3_leaf_modules


def deepspeed_config(train: TrainConfig, batch_size: int, precision: str, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    Args:
        train: optimization settings.
        batch_size: samples per rank and forward pass.
        precision: fp32, bf16 or pure_bf16 (auto already resolved).
        parameters: of the network; a bucket for gradients that is larger would only take memory (the default: 2 GB),
            and only after a bucket is full can it be reduced beside the backward pass.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.grad_clip,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": train.zero_stage,
            "memory_efficient_linear": False,
            "reduce_bucket_size": min(parameters // 8 if train.overlap_comm else parameters, 500_000_000),
            "overlap_comm": train.overlap_comm,
        },
        "zero_allow_untested_optimizer": True,
    }
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif precision == "pure_bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def start_process_group(device: torch.device, timeout: float) -> None:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs), as the environment of `launch.detect` says.

    Args:
        device: this rank's.
        timeout: seconds that another rank may be late in any collective.
    """
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory collective here, which takes minutes and a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    backend, patience = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout)
    # DeepSpeed makes groups of its own and gives them torch's default, half an hour with gloo.
    dist.distributed_c10d.default_pg_timeout = patience
    dist.distributed_c10d.default_pg_nccl_timeout = patience
    deepspeed.init_distributed(dist_backend=backend, timeout=patience, verbose=False)


class Engine:
    """A network under DeepSpeed."""

    def __init__(self, network: nn.Module, train: TrainConfig, batch_size: int, precision: str) -> None:
        """Wrap `network`; at ZeRO stage 3 its parameters are split over the ranks from here on."""
        self.stage = train.zero_stage
        parameters = sum(p.numel() for p in network.parameters())
        self.config = deepspeed_config(train, batch_size, precision, parameters)
        self.input_dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
        self.optimizer = Adam(network.parameters(), train.optim, train.ema_decay)
        if self.stage == 3:
            # A layer's operators take weights of several modules. Gathered one module at a time, those would be fetched
            # as they are touched, which compiled code does not do.
            set_z3_leaf_modules(network, [AttentiveLayer], raise_if_not_found=False)
        self.deepspeed, *_ = deepspeed.initialize(model=network, optimizer=self.optimizer, config=self.config)
        self._graphs = train.cuda_graphs
        if train.compile:
            self.deepspeed.compile(compile_kwargs={"mode": "reduce-overhead" if train.cuda_graphs else "default"})
        self.skipped = torch.zeros(())
        """Whether the last step was left out because its gradient was not finite: 1.0 or 0.0, the same on all ranks."""
        if self.stage == 0:
            self.optimizer.register_step_pre_hook(self._guard)

    def __call__(self, lq: Tensor, **kwargs: Any) -> Tensor:
        """The network's output for `lq`, (B, C, H, W) float32 in [0, 1]."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        output: Tensor = self.deepspeed(lq.to(self.input_dtype), **kwargs)
        return output

    def _guard(self, *_: Any) -> None:
        """Before the step at stage 0: every rank has the whole gradient, and the kernel heeds the flag unread."""
        gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
        self.skipped = 1 - nn.utils.get_total_norm(gradients).isfinite().float()
        self.optimizer.skipped = self.skipped

    def step(self, loss: Tensor, lr: float, want_norm: bool) -> float | None:
        """Backward pass of one micro-batch and, at an accumulation boundary, the optimizer step.

        A step whose gradient is not finite on some rank is left out on all: weights and moments stay as they are.

        Args:
            loss: scalar.
            lr: rate of this step.
            want_norm: return the norm of the whole gradient before clipping; costs a synchronisation.
        """
        self.deepspeed.backward(loss)
        norm = None
        if want_norm and self.stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
            norm = nn.utils.get_total_norm([p.grad for p in self.deepspeed.module.parameters() if p.grad is not None])
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.step()
        if self.stage > 0 and boundary:  # DeepSpeed has read the norm itself
            self.skipped = torch.tensor(float(self.deepspeed.optimizer.overflow))
        if want_norm and self.stage > 0:
            norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)
