"""Steps that were left out because their gradient was not finite: counted, told, and too many in a row end the run.

The flag of a step is read two steps later, when the device has usually computed it: then neither waits for the other.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mambair_ds.training.checkpoint import RunError, RunState

logger = logging.getLogger(__name__)

_LATE = 2  # steps


class SkipWatch:
    """Looks at the flags of one run's steps, which are the same on all ranks."""

    def __init__(
        self, state: RunState, limit: int, folder: Path, keys: Callable[[int], list[str]], event: Callable[[int], None]
    ) -> None:
        """Count in `state`.

        Args:
            state: the run's; `skipped` and `skipped_in_a_row` are kept up to date.
            limit: skipped steps in a row that are borne.
            folder: where the samples of the last one are written.
            keys: names of this rank's samples of the step that began at a position.
            event: told the iteration of every skipped step.
        """
        self._state, self._limit, self._folder, self._keys, self._event = state, limit, folder, keys, event
        self._flags: deque[tuple[int, int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, iteration: int, position: int, skipped: Tensor) -> None:
        """Take the flag of a step that began at a position of the stream, and look at those that are old enough.

        Raises:
            RunError: on all ranks alike, if too many steps in a row were skipped.
        """
        copied = None
        if skipped.is_cuda:
            flag, copied = skipped.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        else:
            flag = skipped
        self._flags.append((iteration, position, flag, copied))
        while len(self._flags) > _LATE:
            self._look()

    def finish(self) -> None:
        """Look at all flags; what is saved afterwards knows of every step.

        Raises:
            RunError: as `add`.
        """
        while self._flags:
            self._look()

    def _look(self) -> None:
        iteration, position, flag, copied = self._flags.popleft()
        if copied:  # of the step before last: waits only for a host that runs far ahead of its device
            copied.synchronize()
        state = self._state
        if not float(flag):
            state.skipped_in_a_row = 0
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        logger.warning(
            "Iteration %d: the gradient is not finite; the step is skipped on all ranks (%d in a row, %d in all)",
            iteration, state.skipped_in_a_row, state.skipped,
        )  # fmt: skip
        self._event(iteration)
        if state.skipped_in_a_row > self._limit:
            path = self._folder / f"not_finite_{iteration}.json"
            batches: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(batches, self._keys(position))
            if dist.get_rank() == 0:
                path.write_text(json.dumps({f"rank {rank}": names for rank, names in enumerate(batches)}, indent=1))
            raise RunError(
                f"iteration {iteration}: {state.skipped_in_a_row} steps in a row have had a gradient that is not "
                f"finite (faults.max_skipped is {self._limit}); the samples of the last one are in {path}. A lower "
                "train.optim.lr, a longer train.warmup_iter or train.grad_clip may help; checkpoints are as they were"
            )
