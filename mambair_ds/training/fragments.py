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
from mambair_ds.training.optimizer import MEAN

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

    def run(self, tensor: Tensor) -> Tensor:
        """The part of `flat`, or of a tensor that lies like it; a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]


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


def take(engine: Engine) -> dict[str, Any]:
    """Copies, in host memory, of all that this rank has to save; no rank waits for another.

    Returns:
        ``params``, ``exp_avg``, ``exp_avg_sq`` and, if there is a running mean, ``params_ema``: `Runs`; ``step``:
        optimizer steps by parameter name; ``groups``: the optimizer's settings by group.
    """
    optimizer = engine.optimizer
    taken: dict[str, Any] = {kind: {} for kind in ("params", *optimizer.kinds, "step")}
    for slot in _slots(engine):
        if not slot.mine:
            continue
        state = optimizer.state_of(slot.flat)
        taken["step"][slot.name] = float(state["step"])
        for kind in ("params", *optimizer.kinds):
            run = slot.run(slot.flat if kind == "params" else state[kind])
            taken[kind][slot.name] = (slot.start, run.to("cpu", torch.float32, copy=True))
    taken["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return taken


@torch.no_grad()
def whole(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Whole float32 tensors by parameter name, ``params`` or a kind of the state; all ranks call together."""
    named = dict(engine.deepspeed.module.named_parameters())
    exact = all(parameter.dtype == torch.float32 for parameter in named.values())
    if kind == "params" and engine.stage < 3 and exact:  # every rank has them; of bf16 weights the optimizer knows more
        return {name: parameter.detach() for name, parameter in named.items()}
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in named.items()}
    flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=engine.deepspeed.device)
    tensors = dict(zip(shapes, flat.split([shape.numel() for shape in shapes.values()]), strict=True))
    for slot in _slots(engine):
        tensor = slot.flat if kind == "params" else engine.optimizer.state_of(slot.flat)[kind]
        tensors[slot.name][slot.start : slot.start + slot.count] = slot.run(tensor)
    if engine.stage > 0:
        dist.all_reduce(flat)
    return {name: tensor.view(shapes[name]) for name, tensor in tensors.items()}


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
def put(engine: Engine, saved: Mapping[str, Any]) -> None:
    """Give `engine` its parts of whole flat tensors; `saved` is what `checkpoint.read_tensors` returns.

    A running mean that was not saved begins with the weights.
    """
    optimizer = engine.optimizer
    saved = {MEAN: saved["params"], **saved}
    for slot in _slots(engine):
        state = optimizer.state_of(slot.flat)
        state["step"].fill_(saved["step"][slot.name])
        for kind in ("params", *optimizer.kinds):
            target = slot.run(slot.flat if kind == "params" else state[kind])
            target.copy_(saved[kind][slot.name][slot.start : slot.start + slot.count])
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(settings)
