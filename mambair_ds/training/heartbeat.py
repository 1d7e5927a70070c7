"""Signs of life: every rank tells the others, through the rendezvous' store, that it lives and how far it has come.

A collective that fails or times out says nothing of why. The store does: a rank that is gone or stopped falls silent,
one that hangs goes on beating at the same iteration.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

_BEATS = 10  # in the time that a rank may be late


class Heartbeat:
    """Beats in a thread until closed."""

    def __init__(self, timeout: float, iteration: Callable[[], int]) -> None:
        """Begin; the process group is there.

        Args:
            timeout: seconds that a rank may be late.
            iteration: how far this rank has come.
        """
        self._period, self._iteration = timeout / _BEATS, iteration
        # A connection of its own: the other one may be waiting for somebody.
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._over = threading.Event()
        self._beats = 0
        self._beat()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        """Beat no more."""
        self._over.set()

    def diagnosis(self) -> str:
        """Which ranks are silent or behind, in words; looks for two beats."""
        found: list[list[tuple[int, int]]] = []

        def look() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone
                for _ in range(2):
                    found.append(self._read())
                    time.sleep(2 * self._period)

        # In a thread: a store whose process is stopped does not even refuse to answer.
        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(6 * self._period)
        if len(found) < 2:
            return "rank 0, or the launcher that keeps the signs of life, is gone or does not answer"
        before, after = found
        furthest = max(iteration for _, iteration in after)
        silent = [r for r in range(self._world_size) if after[r][0] == before[r][0] and r != self._rank]
        behind = [r for r in range(self._world_size) if after[r][1] < furthest and r not in silent]
        parts = [f"rank {r} gives no sign of life since iteration {after[r][1]}" for r in silent]
        parts += [f"rank {r} lives, but stays at iteration {after[r][1]} of {furthest}" for r in behind]
        return "; ".join(parts) or f"all ranks live, at iteration {furthest}"

    def _run(self) -> None:
        while not self._over.wait(self._period):
            try:
                self._beat()
            except RuntimeError:  # the store is gone with rank 0; the next collective tells
                return

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"heartbeat/{self._rank}", f"{self._beats} {self._iteration()}")

    def _read(self) -> list[tuple[int, int]]:
        """Beats and iteration of every rank."""
        words = [self._store.get(f"heartbeat/{rank}").split() for rank in range(self._world_size)]
        return [(int(beats), int(iteration)) for beats, iteration in words]
