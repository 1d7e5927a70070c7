"""What all ranks must decide alike after every step, in one all-reduce of a few integers.

It runs on the CPU beside the step (gloo, a group of its own), so that neither the device nor the gradients' collectives
wait for it; and since every rank must answer every step, it is also where a lost rank is noticed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping

import torch
import torch.distributed as dist


class Agreement:
    """Named counts, summed over the ranks once a step."""

    def __init__(self, timeout: float) -> None:
        """All ranks call together.

        Args:
            timeout: seconds that the others may be late.
        """
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self._work: dist.Work | None = None

    def start(self, counts: Mapping[str, int]) -> None:
        """Begin to sum `counts`; the same names on every rank."""
        self._names = list(counts)
        self._votes = torch.tensor(list(counts.values()), dtype=torch.int64)
        self._work = dist.all_reduce(self._votes, group=self._group, async_op=True)

    def finish(self) -> dict[str, int]:
        """The sums of what was started.

        Raises:
            RuntimeError: if a rank has not answered in time, or is gone.
        """
        assert self._work is not None
        self._work.wait()
        return dict(zip(self._names, self._votes.tolist(), strict=True))


def is_about_ranks(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or late, as far as the backends' messages tell."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("gloo", "nccl", "connection closed", "connection reset", "timed out"))
