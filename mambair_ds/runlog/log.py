"""Console and file logging: one line format, the main rank speaks, every rank warns.

On a terminal, a live line at the bottom says where the run is, and replaces the lines that a file gets every
`log.print_freq` iterations. Colour is used on a terminal only, and not with NO_COLOR (https://no-color.org).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

FORMAT = "%(asctime)s %(levelname)s: %(message)s"
LIVE = {"live": True}
"""`extra` of a log line that the live line stands for on a terminal."""


def log_to_console(rank: int) -> logging.Logger:
    """Configure this process's package logger: rank 0 from INFO on, other ranks only warnings, to standard output."""
    logger = logging.getLogger("mambair_ds")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    logger.handlers = [_Console()]
    return logger


def log_to_file(path: Path) -> None:
    """Append everything the package logs to `path` as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger("mambair_ds").addHandler(handler)


class _Console(logging.Handler):
    """Standard output: plain lines, or on a terminal coloured ones above the live line."""

    def __init__(self) -> None:
        super().__init__()
        self._terminal = sys.stdout.isatty()
        self._color = self._terminal and not os.environ.get("NO_COLOR")
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        if self._terminal and getattr(record, "live", False):
            return
        try:
            text = self.format(record)
            if self._color and record.levelno >= logging.WARNING:
                text = f"\x1b[{31 if record.levelno >= logging.ERROR else 33}m{text}\x1b[0m"
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)  # logging's own way: says so on standard error


class Progress:
    """The live line of a run; nothing where standard output is no terminal."""

    def __init__(self, name: str, iteration: int, total: int, show: bool) -> None:
        """Start it at `iteration` of `total`; `show` is for the rank that speaks."""
        self._bar = tqdm(
            desc=name,
            initial=iteration,
            total=total,
            unit="it",
            file=sys.stdout,
            dynamic_ncols=True,
            disable=None if show else True,
            mininterval=0.2,
        )

    def step(self) -> None:
        """One iteration is done."""
        self._bar.update()

    def say(self, text: str) -> None:
        """Words after the bar, until the next."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Leave the last state of the line where it is."""
        self._bar.close()
