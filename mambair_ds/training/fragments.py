"""Where DeepSpeed keeps weights and moments, by parameter name: what a checkpoint of no particular layout is made of.

Every rank holds, of every parameter, the whole (ZeRO stage 0) or a run of its flattened elements in a larger flat
tensor (1 to 3; at 3 the run's end may be padding). A checkpoint stores runs with their first element; any number of
ranks at any stage takes from them what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mambair_ds.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
Runs = dict[str, tuple[int, Tensor]]
"""By parameter name: first element, and the flat elements from there, float32 on the CPU."""


@dataclass
class _Slot:
    """A rank's part of one parameter."""

    name: str
    start: int
    count: int
    flat: Tensor  # holds the part from `offset` on, and keys the optimizer's state
    offset: int
    mine: bool  # whether this rank saves it; at stage 0 all hold all


def _torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    optimizer = engine.deepspeed.optimizer
    return optimizer if engine.stage == 0 else optimizer.optimizer


def _slots(engine: Engine) -> Iterator[_Slot]:
    rank, world_size, zero = dist.get_rank(), dist.get_world_size(), engine.deepspeed.optimizer
    for i, (name, parameter) in enumerate(engine.deepspeed.module.named_parameters()):
        if engine.stage == 0:
            yield _Slot(name, 0, parameter.numel(), parameter, 0, i % world_size == rank)
        elif engine.stage < 3:
            if part := parameter._hp_mapping:
                flat = zero.single_partition_of_fp32_groups[part.param_group_index]
                here = part.hp_fragment_address
                yield _Slot(name, part.lp_fragment_address.start, here.numel, flat, here.start, True)
        else:
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = rank * size
            count = max(0, min(size, parameter.ds_numel - start))
            if count:
                yield _Slot(name, start, count, zero.fp32_partitioned_groups_flat[group], offset, True)


def _copy(tensor: Tensor, offset: int, count: int) -> Tensor:
    run = tensor.detach().reshape(-1)[offset : offset + count]
    return run.to("cpu", torch.float32, copy=True)


def take(engine: Engine, ema: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Copies, in host memory, of all that this rank has to save; no rank waits for another.

    Returns:
        ``params``, ``exp_avg``, ``exp_avg_sq`` and, with `ema`, ``params_ema``: `Runs`; ``step``: optimizer steps by
        parameter name; ``groups``: the optimizer's settings by group.
    """
    optimizer = _torch_optimizer(engine)
    taken: dict[str, Any] = {kind: {} for kind in ("params", *MOMENTS, "step")}
    for slot in _slots(engine):
        if not slot.mine:
            continue
        taken["params"][slot.name] = (slot.start, _copy(slot.flat, slot.offset, slot.count))
        state = optimizer.state[slot.flat]
        taken["step"][slot.name] = float(state["step"])
        for kind in MOMENTS:
            taken[kind][slot.name] = (slot.start, _copy(state[kind], slot.offset, slot.count))
    taken["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if ema is not None:
        taken["params_ema"] = {
            name: (start, _copy(tensor, 0, count))
            for name, tensor, start, count, mine in _ema_parts(engine, ema)
            if mine and count
        }
    return taken


def _ema_parts(engine: Engine, ema: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int, int, bool]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for i, (name, parameter) in enumerate(engine.deepspeed.module.named_parameters()):
        if engine.stage < 3:
            yield name, ema[name], 0, parameter.numel(), i % world_size == rank
        else:
            start = rank * ema[name].numel()
            yield name, ema[name], start, max(0, min(ema[name].numel(), parameter.ds_numel - start)), True


def join(parts: list[tuple[int, Tensor]], name: str) -> Tensor:
    """A whole flat tensor from its runs.

    Raises:
        ValueError: if the runs do not follow one another from 0 on.
    """
    parts = sorted(parts, key=lambda part: part[0])
    end = 0
    for start, run in parts:
        if start != end:
            raise ValueError(f"{name}: elements {end} to {start} are missing or stored twice")
        end += run.numel()
    return parts[0][1] if len(parts) == 1 else torch.cat([run for _, run in parts])


@torch.no_grad()
def put(engine: Engine, saved: Mapping[str, Any], ema: Mapping[str, Tensor] | None) -> None:
    """Give `engine` and `ema` their parts of whole flat tensors; `saved` is what `checkpoint.read_tensors` returns."""
    optimizer = _torch_optimizer(engine)
    for slot in _slots(engine):
        state = optimizer.state[slot.flat]
        if "exp_avg" not in state:
            state.update({kind: torch.zeros_like(slot.flat) for kind in MOMENTS})
        state["step"] = torch.tensor(saved["step"][slot.name], dtype=torch.float32, device=slot.flat.device)
        for tensor, kind in ((slot.flat, "params"), *((state[kind], kind) for kind in MOMENTS)):
            run = saved[kind][slot.name][slot.start : slot.start + slot.count]
            if engine.stage == 0:
                tensor.copy_(run.view(tensor.shape))
            else:
                tensor.data.view(-1)[slot.offset : slot.offset + slot.count].copy_(run)
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(settings)
    if ema is not None and "params_ema" in saved:
        for name, tensor, start, count, _ in _ema_parts(engine, ema):
            run = saved["params_ema"][name][start : start + count]
            if engine.stage < 3:
                tensor.copy_(run.view(tensor.shape))
            else:
                tensor.view(-1)[:count].copy_(run)
