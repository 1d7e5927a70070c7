"""Where a run's numbers go: always log/metrics.jsonl and the report, and TensorBoard and Weights & Biases if asked for.

All have the same names and are written on the main rank only. A resumed run goes on with its file, its W&B run and its
TensorBoard step axis.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from mambair_ds.config import RunConfig
from mambair_ds.runlog.metrics import START, MetricsFile
from mambair_ds.runlog.report import write_report

logger = logging.getLogger(__name__)

_REPORT_EVERY = 15.0  # seconds between reports, and at least this many times what the last one took:
_REPORT_SHARE = 200


class Trackers:
    """The writers of one run."""

    def __init__(self, config: RunConfig, iteration: int, wandb_id: str | None) -> None:
        """Open the writers; config.yml and environment.json are in the run's folder.

        Args:
            config: the run.
            iteration: last iteration done; what an interrupted run wrote after it no longer counts.
            wandb_id: W&B run to continue, or None for a new one.
        """
        self.wandb_id = wandb_id
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._run = config.folder
        self._next_report = 0.0
        self._said = ""
        folder = config.folder / "log"
        self._file = MetricsFile(folder)
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
        if config.log.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.log.wandb.project,
                entity=config.log.wandb.entity,
                mode=config.log.wandb.mode,
                name=config.name,
                id=wandb_id,
                resume="allow",
                dir=str(folder),
                config=config.model_dump(mode="json"),
            )
            self.wandb_id = self._wandb.id
        self.event(START, iteration)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Write named values of one iteration."""
        self._file.write(iteration, values)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb:
            self._wandb.log(dict(values), step=iteration)
        self._report()

    def event(self, kind: str, iteration: int, **facts: Any) -> None:
        """Write that something happened: "start", "skipped" (a step that was not taken), or any other word.

        Args:
            facts: plain JSON values; `reason` is shown in the report.
        """
        self._file.write(iteration, {"event": kind, **facts})
        self._report()

    def close(self) -> None:
        """Write the last report, flush and close."""
        self._next_report = 0.0
        self._report()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _report(self) -> None:
        """Bring the report up to date, seldom enough to cost under a percent; training goes on without it."""
        began = time.monotonic()
        if began < self._next_report:
            return
        try:
            write_report(self._run)
        except Exception as error:  # whatever is wrong with a picture of the run, it is no reason to end the run
            said = f"{type(error).__name__}: {error}"
            if said != self._said:
                logger.warning("The report could not be brought up to date (%s); training goes on", said)
            self._said = said
        now = time.monotonic()
        self._next_report = now + max(_REPORT_EVERY, _REPORT_SHARE * (now - began))
