"""Where scalars go: always a JSON-lines file, and TensorBoard and Weights & Biases if asked for, under the same names.

All are opened on the main rank only. A resumed run goes on with its file, its W&B run and its TensorBoard step axis;
the iterations that an interrupted run did after its last checkpoint stand twice in the file, and the later line counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mambair_ds.config import RunConfig


class Trackers:
    """The writers of one run."""

    def __init__(self, config: RunConfig, iteration: int, wandb_id: str | None) -> None:
        """Open the writers.

        Args:
            config: the run.
            iteration: last iteration done; TensorBoard hides what an interrupted run wrote after it.
            wandb_id: W&B run to continue, or None for a new one.
        """
        self.wandb_id = wandb_id
        self._tensorboard: Any = None
        self._wandb: Any = None
        folder = config.folder / "log"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "scalars.jsonl").open("a", buffering=1)
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

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Write named values of one iteration."""
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb:
            self._wandb.log(dict(values), step=iteration)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
