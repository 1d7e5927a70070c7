"""log/metrics.jsonl: what counts after restarts, half lines and numbers that are none."""

import math
from pathlib import Path

from mambair_ds.runlog.metrics import FILE, START, MetricsFile, read_history


def start(folder: Path, iteration: int) -> MetricsFile:
    file = MetricsFile(folder)
    file.write(iteration, {"event": START})
    return file


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = start(tmp_path, 0)
    for i in (1, 2, 3, 4):
        first.write(i, {"loss": float(i)})
    second = start(tmp_path, 2)
    second.write(3, {"loss": 30.0})
    history = read_history(tmp_path)
    assert history.series == {"loss": {1: 1.0, 2: 2.0, 3: 30.0}}
    assert [event["iteration"] for event in history.events] == [0, 2]


def test_a_half_line_of_a_killed_process_costs_only_itself(tmp_path: Path) -> None:
    start(tmp_path, 0).write(1, {"loss": 1.0})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"iteration": 2, "lo')
    start(tmp_path, 1).write(2, {"loss": 2.0})
    history = read_history(tmp_path)
    assert history.series == {"loss": {1: 1.0, 2: 2.0}}
    assert len(history.events) == 2


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    file = start(tmp_path, 0)
    file.write(1, {"loss": math.nan, "lr": 0.1})
    file.write(2, {"loss": math.inf, "lr": 0.1})
    assert read_history(tmp_path).series == {"lr": {1: 0.1, 2: 0.1}}


def test_time_between_processes_is_no_training_time(tmp_path: Path) -> None:
    rows = [
        (0, 100, ', "event": "start"'),
        (1, 110, ', "l": 1'),
        (1, 5000, ', "event": "start"'),
        (2, 5005, ', "l": 1'),
    ]
    lines = [f'{{"iteration": {i}, "time": {t}{rest}}}\n' for i, t, rest in rows]
    (tmp_path / FILE).write_text("".join(lines))
    assert read_history(tmp_path).seconds == 15
