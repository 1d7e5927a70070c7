"""When to leave early: a signal, a wall-clock budget, a launcher that is gone.

Signals are noted, not obeyed: the loop asks after every step, all ranks agree, save and leave with `INTERRUPTED`. A
thread reads them, because Python's own handlers wait while the main thread is inside a collective. Before the loop has
begun there is nothing to save, and the thread ends the process at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

INTERRUPTED = os.EX_TEMPFAIL
"""Exit code 75: interrupted, state saved, run me again."""
_FORMATS = (
    r"(?P<m>\d+)(:(?P<s>\d\d?))?",
    r"(?P<h>\d+):(?P<m>\d\d?):(?P<s>\d\d?)",
    r"(?P<d>\d+)-(?P<h>\d\d?)(:(?P<m>\d\d?)(:(?P<s>\d\d?))?)?",
)
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of one of Slurm's time formats: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        argparse.ArgumentTypeError: if it is none of them, or zero.
    """
    for pattern in _FORMATS:
        if match := re.fullmatch(pattern, text.strip()):
            seconds = sum(int(number) * _SECONDS[unit] for unit, number in match.groupdict().items() if number)
            if seconds:
                return float(seconds)
    raise argparse.ArgumentTypeError(
        f"{text!r} is no time; expected Slurm's formats: minutes, MM:SS, HH:MM:SS, D-HH or D-HH:MM:SS"
    )


class Stop:
    """What asks this process to leave."""

    def __init__(self, started: float, budget: float | None = None) -> None:
        """Watch the clock from now on; signals only after `listen`.

        Args:
            started: `time.monotonic` when the process began.
            budget: seconds that it may last; None for no end.
        """
        self.started, self._budget = started, budget
        self._reason: str | None = None
        self._cleanup: Callable[[], None] | None = lambda: None

    def listen(self) -> None:
        """Note SIGTERM, SIGUSR1 and the first SIGINT instead of dying of them."""
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._read, args=(receiver, sender), name="signals", daemon=True).start()

    def hold(self, cleanup: Callable[[], None] | None) -> None:
        """What to do before a request ends the process at once; None: from now on the loop asks and saves."""
        self._cleanup = cleanup
        if self._reason and cleanup is None:
            logger.warning("%s: will save after the first step and leave", self._reason)

    def request(self, reason: str) -> None:
        """Ask to leave, for example "received SIGTERM"; the first reason is kept. Safe from any thread."""
        if self._reason is None:
            self._reason = reason
            if self._cleanup is not None:
                print(f"{reason}: nothing to save yet, leaving", file=sys.stderr, flush=True)
                self._cleanup()
                os._exit(INTERRUPTED)
            logger.warning("%s: finishing the step, saving and leaving", reason)

    def reason(self, seconds_needed: float) -> str | None:
        """Why to leave, if one should.

        Args:
            seconds_needed: how long another step and a save may take.
        """
        if self._budget is not None and time.monotonic() - self.started + seconds_needed > self._budget:
            self.request(f"the time budget of {self._budget:.0f} s is nearly used up")
        return self._reason

    def _read(self, receiver: socket.socket, _sender: socket.socket) -> None:
        while numbers := receiver.recv(64):
            for number in numbers:
                if number == signal.SIGINT and self._reason:
                    os._exit(128 + number)  # the second Ctrl-C means now
                self.request(f"received {signal.Signals(number).name}")
