"""Checkpoints that are whole or not there.

A checkpoint is the folder ``checkpoints/ITERATION``. All ranks write into ``ITERATION.partial``; rank 0 then adds
a manifest with every file's size and SHA-256 and renames the folder, which is atomic: a name without ``.partial`` means
that everything was written. A damaged checkpoint is recognised by its manifest, named, and passed over in favour of
the newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mambair_ds.config import RunConfig, UserError
from mambair_ds.training.engine import Engine
from mambair_ds.training.launch import Launch

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = "mambair_ds.checkpoint/1"

# What a continued run may change without becoming another run.
FREE_KEYS = (
    "name",
    "experiments_root",
    "log.",
    "checkpoint.",
    "faults.",
    "data.val.",
    "data.train.threads",
    "train.total_iter",
    "train.pretrain",
)


class SaveError(Exception):
    """A checkpoint could not be written; the previous one is untouched."""


@dataclass
class RunState:
    """All that a resume needs beside the weights and the optimizer, which DeepSpeed stores."""

    iteration: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Samples taken from the data stream by all ranks together."""
    seed: int = 0
    """The run's seed, given or drawn."""
    stream: str = ""
    """Checksum of the data stream."""
    best: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    """Best value and its iteration, by validation set and metric."""
    validated: int = 0
    """Iteration of the last validation."""
    wandb_id: str | None = None
    """W&B run to go on with."""
    rng: dict[str, Any] = field(default_factory=dict)
    """Generator states of this rank."""
    ema: dict[str, Tensor] | None = None
    """This rank's part of the running mean of the weights."""


def rng_state() -> dict[str, Any]:
    """States of every global generator of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def iteration(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.manifest["iteration"])


def read(path: Path, checksums: bool) -> Checkpoint:
    """Open a checkpoint and compare its files with the manifest.

    Raises:
        UserError: if it is no checkpoint, partial, or damaged; the message names the file.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no {MANIFEST}; not a checkpoint, or one whose saving was interrupted") from error
    except ValueError as error:
        raise UserError(f"{path / MANIFEST}: not valid JSON: {error}") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path / MANIFEST}: format {manifest.get('format')!r}, expected {FORMAT!r}")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{path}: damaged checkpoint: {name} is missing")
        if file.stat().st_size != expected["size"]:
            raise UserError(
                f"{path}: damaged checkpoint: {name} has {file.stat().st_size} bytes, expected {expected['size']}"
            )
        if checksums and _sha256(file) != expected["sha256"]:
            raise UserError(f"{path}: damaged checkpoint: {name} does not match its SHA-256")
    return Checkpoint(path, manifest)


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run's checkpoints folder; damaged ones are logged and passed over."""
    for path in sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name), reverse=True):
        try:
            return read(path, checksums=True)
        except UserError as error:
            logger.warning("%s; trying the one before", error)
    return None


def check_resumable(checkpoint: Checkpoint, config: RunConfig, world_size: int, stream: str) -> None:
    """Refuse to continue a checkpoint with settings or data that make another run of it.

    Args:
        checkpoint: what to continue.
        config: the settings to continue with.
        world_size: number of ranks.
        stream: checksum of the data stream (`check_train_data`).

    Raises:
        UserError: listing every differing key, or the layout or data the checkpoint was saved with.
    """
    saved, now = _flat(checkpoint.manifest["config"]), _flat(config.model_dump(mode="json"))
    differing = [
        f"  {key}: saved {saved.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith(FREE_KEYS) and not (key == "seed" and now[key] is None)
    ]
    if differing:
        keys = "\n".join(differing)
        raise UserError(
            f"{checkpoint.path} was saved with other settings:\n{keys}\n"
            "Set them back, or start over with --fresh (the old run is kept under a time stamp)."
        )
    if checkpoint.manifest["world_size"] != world_size:
        raise UserError(
            f"{checkpoint.path} was saved on {checkpoint.manifest['world_size']} ranks, this run has {world_size}; "
            "resume on the same number of ranks"
        )
    if checkpoint.manifest["stream"] != stream:
        raise UserError(
            f"{checkpoint.path}: the shards in data.train.shards have changed since it was saved; "
            "point to the same shards, or start over with --fresh"
        )


def save(folder: Path, engine: Engine, state: RunState, config: RunConfig, launch: Launch) -> Path:
    """Write a checkpoint and, once it is whole, drop those beyond `checkpoint.keep`; all ranks call together.

    Raises:
        SaveError: if anything could not be written. The partial folder is removed, older checkpoints stay.
    """
    final = folder / f"{state.iteration:07d}"
    partial = final.with_name(final.name + ".partial")
    try:
        if launch.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save(str(folder), partial.name)
        torch.save(asdict(state), partial / _state_name(launch.rank))
        dist.barrier()
        if launch.is_main:
            _seal(partial, final, state, config, launch)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20 if folder.is_dir() else 0
        raise SaveError(
            f"could not save checkpoint {final} ({' '.join(str(error).split())[:300]}); {free:.0f} MiB are free there. "
            "Earlier checkpoints are untouched; make room and start the same command again to continue from the newest."
        ) from error
    if launch.is_main:
        for old in [path for path in sorted(folder.glob("*")) if path.name.isdigit()][: -config.checkpoint.keep]:
            shutil.rmtree(old)
    return final


def load(checkpoint: Checkpoint, engine: Engine, launch: Launch) -> RunState:
    """Restore weights, optimizer and this rank's generators; return the rest. All ranks call together."""
    engine.load(str(checkpoint.path.parent), checkpoint.path.name)
    # The file is ours and its SHA-256 was just compared; it holds generator states, which need full unpickling.
    state = RunState(**torch.load(checkpoint.path / _state_name(launch.rank), weights_only=False, map_location="cpu"))
    set_rng_state(state.rng)
    return state


def _state_name(rank: int) -> str:
    return f"run_state_rank_{rank:05d}.pt"


def _seal(partial: Path, final: Path, state: RunState, config: RunConfig, launch: Launch) -> None:
    files = {}
    for file in sorted(p for p in partial.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        files[str(file.relative_to(partial))] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    manifest = {
        "format": FORMAT,
        "iteration": state.iteration,
        "world_size": launch.world_size,
        "seed": state.seed,
        "stream": state.stream,
        "config": config.model_dump(mode="json"),
        "files": files,
    }
    with (partial / MANIFEST).open("w") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    shutil.rmtree(final, ignore_errors=True)  # the same iteration, saved before by a run that was set back
    partial.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
