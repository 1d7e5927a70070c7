"""The numbers of a run in one append-only file, ``log/metrics.jsonl``: a JSON object a line.

A row holds values of one iteration, ``{"iteration": 200, "time": 1.7e9, "losses/l_pix": 0.02, ...}``, or something
that happened there, ``{"iteration": 200, "time": 1.7e9, "event": "start", ...}``. A run that goes on from iteration C
says so with a start event at C, and what was written before about later iterations no longer counts: that training is
done again. `read_history` reads the file by this rule; nothing is ever taken out of the file itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
START = "start"
"""The event that every process writes first: its iteration is the last one done."""


class MetricsFile:
    """Writes rows. A line is written whole or, if the process is killed in it, left out by the reader."""

    def __init__(self, folder: Path) -> None:
        """Open folder/metrics.jsonl to append; a half line that a killed process left is closed."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / FILE).open("a+b", buffering=0)
        size = self._file.seek(0, 2)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def write(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Append a row of plain JSON values."""
        row = {"iteration": iteration, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class History:
    """What counts of a run's rows."""

    series: dict[str, dict[int, float]] = field(default_factory=dict)
    """Value by iteration, by name; iterations in order, values finite."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Everything that happened, in the order of the file."""
    seconds: float = 0.0
    """Time between the first and the last row of each process, summed."""
    updated: float = 0.0
    """When the last row was written, in seconds since 1970."""


def read_history(folder: Path) -> History:
    """Read folder/metrics.jsonl; rows that later ones replace, and lines that are not whole, are left out."""
    history, began = History(), 0.0
    for line in (folder / FILE).read_bytes().splitlines():
        try:
            row = json.loads(line)
            iteration, now = int(row.pop("iteration")), float(row.pop("time"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if row.get("event") == START:
            for values in history.series.values():
                for later in [i for i in values if i > iteration]:
                    del values[later]
            began = now
        elif began:
            history.seconds += max(0.0, now - max(began, history.updated))
        history.updated = now
        if "event" in row:
            history.events.append({"iteration": iteration, "time": now, **row})
            continue
        for name, value in row.items():
            if isinstance(value, (int, float)) and value - value == 0:  # neither nan nor infinite
                history.series.setdefault(name, {})[iteration] = value
    history.series = {name: dict(sorted(values.items())) for name, values in history.series.items() if values}
    return history
