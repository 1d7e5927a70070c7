"""TensorBoard and Weights & Biases, independent of each other, under the same names.

Both are opened on the main rank only. A resumed run goes on with its W&B run and on its TensorBoard step axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambair_ds.config import RunConfig


class Trackers:
    """Writers of scalars that the config asks for; without any, every call does nothing."""

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
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
        if config.log.wandb:
            import wandb

            self.wandb_id = wandb_id or wandb.util.generate_id()
            self._wandb = wandb.init(
                project=config.log.wandb.project,
                entity=config.log.wandb.entity,
                mode=config.log.wandb.mode,
                name=config.name,
                id=self.wandb_id,
                resume="allow",
                dir=_made(folder),
                config=config.model_dump(mode="json"),
            )

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Write named values of one iteration."""
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb:
            self._wandb.log(dict(values), step=iteration)

    def close(self) -> None:
        """Flush and close."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _made(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
