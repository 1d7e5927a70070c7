"""Kernels for a GPU that need not be there, compiled before a run asks for them.

A training step is taken on the CPU with the GPU's backends, in which every launch does no more than compile its kernel.
Triton puts what it compiles into its cache, under the key that the same launch has on such a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from mambair_ds import kernels
from mambair_ds.config import RunConfig
from mambair_ds.kernels.philox import DEGRADATION_STREAM, NoiseKey, normal
from mambair_ds.models import build_model
from mambair_ds.training.optimizer import Adam


def compile_kernels(config: RunConfig, capability: tuple[int, int]) -> tuple[int, int]:
    """Compile what a run's training steps launch, in a process a core.

    Args:
        config: the run; its batch and sizes count, and of its network's layers two of a stage.
        capability: the GPU's.

    Returns:
        How many kernels there are, and how many of them were in the cache already.
    """
    processes = min(len(os.sched_getaffinity(0)), 16)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(_compile_share, config, capability, i, processes) for i in range(processes)]
        compiled = [share.result() for share in shares]
    keys, new = set().union(*compiled), {key for one in compiled for key, is_new in one.items() if is_new}
    return len(keys), len(keys) - len(new)


def _compile_share(config: RunConfig, capability: tuple[int, int], share: int, shares: int) -> dict[str, bool]:
    """Every so many-th kernel, by its key, and whether it had to be compiled.

    For a process that does nothing else, as Triton is another afterwards.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # before a kernel's file is imported
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        """What the compiler asks of a GPU."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

    seen: set[Hashable] = set()
    compiled: dict[str, bool] = {}
    run = JITFunction.run

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        compiled.setdefault(metadata["hash"], not cache_hit)

    def launch(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = (function.fn, *map(_kind, args), *sorted(options.items()))
        if key not in seen:
            seen.add(key)
            if len(seen) % shares == share:
                run(function, *args, grid=grid, warmup=True, **options)
        for tensor in args:  # nothing was computed: what may be an index must not point anywhere
            if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                tensor.data.zero_()

    driver.set_active(Driver())
    knobs.compilation.listener = listen
    JITFunction.run = launch
    kernels.compiling_for = capability
    torch.set_num_threads(1)
    take_step(config, torch.device("cpu"))
    return compiled


def _kind(argument: Any) -> Hashable:
    """What a launch's key depends on: of a tensor its dtype and whether it is aligned to 16 bytes."""
    return (argument.dtype, argument.data_ptr() % 16) if hasattr(argument, "data_ptr") else argument


def take_step(config: RunConfig, device: torch.device) -> None:
    """A step of a run on two layers of each stage, with pictures of zeros."""
    network = config.network.model_copy(update={"depths": [min(depth, 2) for depth in config.network.depths]})
    model = build_model(network).to(device).train()
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    if precision == "pure_bf16":
        model.bfloat16()
    batch, gt_size = config.data.train.batch_size, config.data.train.gt_size
    side = gt_size // network.upscale
    noise = NoiseKey(0, torch.arange(batch, device=device))
    if config.task.kind == "denoise":
        normal(noise, DEGRADATION_STREAM, (batch, network.in_chans, gt_size, gt_size), device)
    lq = torch.zeros(batch, network.in_chans, side, side, dtype=next(model.parameters()).dtype, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = model(lq, noise if config.train.gumbel == "counter" else None)
    output.float().mean().backward()
    optimizer = Adam(model.float().parameters(), config.train.optim, config.train.ema_decay)
    optimizer.skipped = None if config.train.zero_stage else torch.zeros((), device=device)
    optimizer.step()
