"""Console and file logging: one line format, the main rank speaks, every rank warns."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = logging.Formatter("%(asctime)s %(levelname)s: %(message)s")


def log_to_console(rank: int) -> logging.Logger:
    """Configure this process's package logger: rank 0 from INFO on, other ranks only warnings, to standard output."""
    logger = logging.getLogger("mambair_ds")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(FORMAT)
    logger.handlers = [console]
    return logger


def log_to_file(path: Path) -> None:
    """Append everything the package logs to `path` as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(FORMAT)
    logging.getLogger("mambair_ds").addHandler(handler)
