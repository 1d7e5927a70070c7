"""A method measured on picture sets: the pictures spread over ranks, every picture's numbers gathered in one table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from mambair_ds import metrics
from mambair_ds.config import TaskConfig, UserError, ValidationConfig
from mambair_ds.data.degradations import resize_uint8
from mambair_ds.data.folders import ValidationSet, open_validation_set
from mambair_ds.files import write_whole
from mambair_ds.training.launch import Launch
from mambair_ds.training.validation import degrade

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Of two uint8 (H, W, C) pictures, the restored one and its GT."""


class Method(Protocol):
    """What is measured."""

    @property
    def scale(self) -> int:
        """Size of the result over that of the LQ."""

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""

    def restore_lq(self, lq: np.ndarray) -> np.ndarray:
        """LQ (H, W, channels), uint8 or float32 in units of 1, to the uint8 result."""


@dataclass(frozen=True)
class Bicubic:
    """The field's baseline: the LQ enlarged by MATLAB's bicubic rule; at scale 1 the LQ itself."""

    scale: int
    channels: int

    def restore_lq(self, lq: np.ndarray) -> np.ndarray:
        """See `Method`."""
        if lq.dtype != np.uint8:
            lq = np.rint(np.clip(lq, 0, 1) * 255).astype(np.uint8)
        return resize_uint8(lq, self.scale) if self.scale > 1 else lq


@dataclass(frozen=True)
class Evaluation:
    """What to measure."""

    name: str
    weights: str
    method: Method
    task: TaskConfig
    val: ValidationConfig
    metrics: Sequence[str]
    """Of psnr, ssim, lpips, dists."""
    save_img: Path | None
    """Folder for the results, as SET/NAME.png."""


@dataclass(frozen=True)
class Results:
    """What was measured."""

    about: dict[str, Any]
    """Weights, task and how it was measured."""
    sets: dict[str, dict[str, dict[str, float]]]
    """Values by set, picture and metric."""

    def mean(self, name: str) -> dict[str, float]:
        """The average over a set's pictures, by metric."""
        rows = list(self.sets[name].values())
        return {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}

    def table(self) -> str:
        """Markdown: a table a set with every picture, and one of the averages."""
        names = list(self.mean(next(iter(self.sets))))
        width = max(len(text) for name, rows in self.sets.items() for text in (name, *rows, "average"))

        def line(head: str, cells: Sequence[str]) -> str:
            return f"| {head:<{width}} | {' | '.join(f'{cell:>8}' for cell in cells)} |"

        def values(row: dict[str, float]) -> list[str]:
            return [f"{row[name]:.4f}" for name in names]

        rule = f"| {'-' * width} | {' | '.join('-------:' for _ in names)} |"
        parts = []
        for name, rows in self.sets.items():
            lines = [line(picture, values(row)) for picture, row in rows.items()]
            parts.append([line(name, names), rule, *lines, line("average", values(self.mean(name)))])
        if len(self.sets) > 1:
            parts.append([line("set", names), rule, *(line(name, values(self.mean(name))) for name in self.sets)])
        return "\n\n".join("\n".join(part) for part in parts)

    def write(self, path: Path) -> None:
        """Write JSON or CSV, as the name ends.

        Raises:
            UserError: it cannot be written.
        """
        if path.suffix == ".json":
            sets = {
                name: {"average": _finite(self.mean(name)), "pictures": _finite(rows)}
                for name, rows in self.sets.items()
            }
            text = json.dumps(self.about | {"sets": sets}, indent=1, allow_nan=False) + "\n"
        else:
            stream = io.StringIO()
            writer = csv.writer(stream, lineterminator="\n")
            for i, (name, rows) in enumerate(self.sets.items()):
                if i == 0:
                    writer.writerow(["set", "picture", *next(iter(rows.values()))])
                writer.writerows([name, picture, *row.values()] for picture, row in rows.items())
                writer.writerow([name, "average", *self.mean(name).values()])
            text = stream.getvalue()
        try:
            write_whole(path, text.encode())
        except OSError as error:
            raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error


def evaluate(evaluation: Evaluation, place: Launch) -> Results:
    """Measure; all ranks call together and get the same results.

    Raises:
        UserError: sets, task and method do not fit together, or a picture cannot be read or measured.
    """
    method, val, task = evaluation.method, evaluation.val, evaluation.task
    if not val.sets:
        raise UserError("no validation sets; name some in data.val.sets")
    if task.kind != "sr" and method.scale != 1:
        raise UserError(f"task {task.kind} goes with scale 1; {evaluation.weights} has scale {method.scale}")
    if task.kind == "sr" and method.scale == 1 and any(one.gt and not one.lq for one in val.sets.values()):
        raise UserError("scale 1 and no LQ: give the task denoise (with sigma) or jpeg (with quality), or LQ folders")
    sets = {
        name: open_validation_set(one, method.scale, "gray" if method.channels == 1 else "rgb")
        for name, one in val.sets.items()
    }
    measures = _measures(evaluation, place)
    found: list[tuple[str, str, dict[str, float]]] = []
    problem = None
    work = [(name, i) for name, one in sets.items() for i in range(len(one))]
    try:
        for name, i in tqdm(
            work[place.rank :: place.world_size], unit="picture", disable=None if place.is_main else True
        ):
            found.append((name, sets[name].name(i), _measure(evaluation, name, sets[name], i, measures)))
    except UserError as error:
        problem = str(error)
    if place.world_size > 1:
        found, problem = _gather(found, problem)
    if problem:
        raise UserError(problem)
    by_name = {(name, picture): values for name, picture, values in found}
    about = {
        "name": evaluation.name,
        "weights": evaluation.weights,
        "scale": method.scale,
        "task": task.model_dump(exclude_none=True),
        "crop_border": val.crop_border,
        "test_y_channel": val.test_y_channel,
    }
    return Results(
        about,
        {name: {one.name(i): by_name[name, one.name(i)] for i in range(len(one))} for name, one in sets.items()},
    )


def _measure(
    evaluation: Evaluation, set_name: str, pictures: ValidationSet, i: int, measures: dict[str, Metric]
) -> dict[str, float]:
    lq, gt = pictures.load(i)
    if lq is None:
        lq = degrade(gt, evaluation.task, evaluation.method.scale)
    picture = evaluation.method.restore_lq(lq)
    if evaluation.save_img:
        path = evaluation.save_img / set_name / f"{pictures.name(i)}.png"
        encoded = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
        try:
            write_whole(path, encoded)
        except OSError as error:
            raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error
    try:
        return {name: measure(picture, gt) for name, measure in measures.items()}
    except ValueError as error:
        raise UserError(f"{set_name}/{pictures.name(i)}: {error}") from error


def _measures(evaluation: Evaluation, place: Launch) -> dict[str, Metric]:
    border, y_channel = evaluation.val.crop_border, evaluation.val.test_y_channel
    known: dict[str, Metric] = {
        "psnr": lambda a, b: metrics.psnr(a, b, border, y_channel),
        "ssim": lambda a, b: metrics.ssim(a, b, border, y_channel),
    }
    return {
        name: known[name] if name in known else metrics.perceptual(name, border, place.device)
        for name in evaluation.metrics
    }


def _gather(found: list[Any], problem: str | None) -> tuple[list[Any], str | None]:
    """Everybody's findings, and the first problem."""
    dist.init_process_group("gloo")
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (found, problem))
    dist.destroy_process_group()
    return [row for rows, _ in parts for row in rows], next((text for _, text in parts if text), None)


def _finite(tree: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which the PSNR of equal pictures is."""
    return {
        key: _finite(value) if isinstance(value, dict) else value if math.isfinite(value) else str(value)
        for key, value in tree.items()
    }
