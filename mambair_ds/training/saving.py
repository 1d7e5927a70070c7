"""Saving beside training: the loop stops for the copy to host memory, a thread of every rank does the rest.

The threads of all ranks meet three times in a process group of their own: when rank 0 has made the folder, when
all have written, and when rank 0 has sealed it (`checkpoint.seal`). A crash at any point leaves the folder under its
partial name and the checkpoint before untouched. A rank that cannot write makes all of them fail alike.
"""

from __future__ import annotations

import datetime
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mambair_ds.config import CheckpointConfig
from mambair_ds.training import checkpoint as checkpoints
from mambair_ds.training.checkpoint import SaveError
from mambair_ds.training.launch import Launch

logger = logging.getLogger(__name__)


class Saver:
    """Writes one checkpoint at a time."""

    def __init__(self, folder: Path, config: CheckpointConfig, launch: Launch, timeout: float) -> None:
        """All ranks call together.

        Args:
            folder: the run's checkpoints folder.
            config: retries and what is kept.
            launch: this process's place among the ranks.
            timeout: seconds that the other ranks' threads may be late.
        """
        self._folder, self._config, self._launch = folder, config, launch
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None

    @property
    def failed(self) -> bool:
        """Whether the last save went wrong; `wait` then raises."""
        return self._error is not None

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            SaveError: if the last save went wrong.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    def start(
        self, content: Mapping[str, Any], manifest: Mapping[str, Any], best: set[int], export: Callable[[], None]
    ) -> None:
        """Write a checkpoint, after the one before; all ranks call together.

        Args:
            content: this rank's file, copied already from what training goes on to change.
            manifest: what the manifest says beside the files.
            best: iterations whose checkpoints are kept for their metrics.
            export: called on rank 0 when the checkpoint is whole.
        """
        self.wait()
        # A daemon: a process that fails must not wait for a thread whose partners are gone.
        self._thread = threading.Thread(
            target=self._save, args=(content, manifest, best, export), name="saver", daemon=True
        )
        self._thread.start()

    def _save(
        self, content: Mapping[str, Any], manifest: Mapping[str, Any], best: set[int], export: Callable[[], None]
    ) -> None:
        final = self._folder / f"{manifest['iteration']:07d}"
        partial = final.with_name(final.name + ".partial")
        file = partial / checkpoints.file_name(self._launch.rank)
        main = self._launch.is_main

        def make() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def write() -> dict[str, Any]:
            torch.save(content, file)
            return checkpoints.describe(file)

        def finish(files: list[dict[str, Any]]) -> None:
            checkpoints.seal(partial, final, {**manifest, "files": {k: v for f in files for k, v in f.items()}})
            logger.info("Saved %s", final)
            export()
            checkpoints.drop(self._folder, self._config, best)

        try:
            self._together(make if main else None)
            files = self._together(write)
            self._together((lambda: finish(files)) if main else None)
        except (OSError, RuntimeError) as error:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self._folder).free / 2**20 if self._folder.is_dir() else 0
            self._error = SaveError(
                f"could not save checkpoint {final} ({' '.join(str(error).split())[:300]}); {free:.0f} MiB are free "
                "there. Earlier checkpoints are untouched; make room and start the same command again to continue from "
                "the newest."
            )

    def _together(self, work: Callable[[], Any] | None) -> list[Any]:
        """Do this rank's work, as often as `checkpoint.retries` allows, and return what all ranks' gave.

        Raises:
            OSError: on every rank, if one of them has failed for good.
        """
        result, failure = None, None
        for attempt in range(self._config.retries + 1):
            try:
                failure = None
                result = work() if work else None
                break
            except (OSError, RuntimeError) as error:
                failure = f"rank {self._launch.rank}: {error}"
                if attempt < self._config.retries:
                    logger.warning("saving: %s; trying again in %.0f s", failure, self._config.retry_wait)
                    time.sleep(self._config.retry_wait)
        answers: list[Any] = [None] * self._launch.world_size
        dist.all_gather_object(answers, (result, failure), group=self._group)
        failures = [failed for _, failed in answers if failed]
        if failures:
            raise OSError("; ".join(failures))
        return [given for given, _ in answers]
