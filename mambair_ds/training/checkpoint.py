"""Checkpoints that are whole or not there.

A checkpoint is the folder ``checkpoints/ITERATION`` with one file a rank. All ranks write into ``ITERATION.partial``
(see `saving`); rank 0 then adds a manifest with every file's size and SHA-256 and renames the folder, which is atomic:
a name without ``.partial`` means that everything was written. A damaged checkpoint is recognised by its manifest,
named, and passed over in favour of the newest whole one.

Tensors lie there by parameter name, in runs that any number of ranks at any ZeRO stage can join (see `fragments`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from mambair_ds.config import CheckpointConfig, RunConfig, UserError, flatten
from mambair_ds.training.fragments import join

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = "mambair_ds.checkpoint/3"

# What a continued run may change without becoming another run.
FREE_KEYS = (
    "name",
    "experiments_root",
    "log.",
    "checkpoint.",
    "faults.",
    "data.val.",
    "data.train.threads",
    "data.train.verify",
    "network.use_checkpoint",
    "data.train.batch_size",
    "train.accumulation",
    "train.zero_stage",
    "train.overlap_comm",
    "train.compile",
    "train.cuda_graphs",
    "train.total_iter",
    "train.pretrain",
)


class RunError(Exception):
    """The run cannot go on; what was saved is untouched. The message is for the user, the exit code is 1."""


class SaveError(RunError):
    """A checkpoint could not be written."""


@dataclass
class RunState:
    """All that a resume needs beside the tensors."""

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
    skipped: int = 0
    """Steps left out because their gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the ones since the last step that was taken."""


def rng_state() -> dict[str, Any]:
    """States of every global generator of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set what `rng_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class _File(BaseModel):
    size: int
    sha256: str


class _Manifest(BaseModel):
    """What opening a checkpoint relies on."""

    iteration: int
    world_size: int
    batch: int
    seed: int
    stream: str
    config: dict[str, Any]
    files: dict[str, _File]
    sha256: str


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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / MANIFEST}: not valid JSON: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else manifest
    if found != FORMAT:
        raise UserError(f"{path / MANIFEST}: format {found!r}, expected {FORMAT!r}")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise UserError(f"{path / MANIFEST}: damaged: {wrong} is missing or wrong") from error
    if manifest["sha256"] != _own_sha256(manifest):
        raise UserError(f"{path / MANIFEST}: damaged: it does not match the SHA-256 in it")
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


def check_resumable(checkpoint: Checkpoint, config: RunConfig, stream: str) -> None:
    """Refuse to continue a checkpoint with settings or data that make another run of it.

    Args:
        checkpoint: what to continue.
        config: the settings to continue with.
        stream: checksum of the data stream (`check_train_data`).

    Raises:
        UserError: listing every differing key, or that the data is another.
    """
    saved, now = flatten(checkpoint.manifest["config"]), flatten(config.model_dump(mode="json"))
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
    if checkpoint.manifest["stream"] != stream:
        raise UserError(
            f"{checkpoint.path}: the shards in data.train.shards have changed since it was saved; "
            "point to the same shards, or start over with --fresh"
        )


def keep_batch(checkpoint: Checkpoint, config: RunConfig, world_size: int) -> RunConfig:
    """The settings to continue with, so that a step takes as many samples as it did: the batch makes the run.

    data.train.batch_size is then the most that a rank takes in one forward pass; accumulation makes up the rest.

    Raises:
        UserError: if the ranks cannot share the batch evenly.
    """
    batch = checkpoint.manifest["batch"]
    if batch % world_size:
        raise UserError(
            f"{checkpoint.path} was saved with {batch} samples a step, which {world_size} ranks cannot share evenly; "
            f"use a number of ranks that divides {batch}"
        )
    share = batch // world_size
    train, data = config.train, config.data.train
    size = max(n for n in range(1, min(share, data.batch_size) + 1) if share % n == 0)
    if (size, share // size) != (data.batch_size, train.accumulation):
        logger.warning(
            "A step goes on taking %d samples, as in the checkpoint: %d a rank x %d ranks x %d accumulated",
            batch, size, world_size, share // size,
        )  # fmt: skip
    data_now = config.data.model_copy(update={"train": data.model_copy(update={"batch_size": size})})
    train_now = train.model_copy(update={"accumulation": share // size})
    return config.model_copy(update={"data": data_now, "train": train_now})


def read_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """The whole flat tensors of a checkpoint by kind and parameter name, with the rest of what `fragments.take` gave.

    The files are mapped: what nobody looks at is not read.

    Raises:
        UserError: if runs of a tensor are missing.
    """
    saved: dict[str, Any] = {}
    parts: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}
    for rank in range(checkpoint.manifest["world_size"]):
        tensors = _open(checkpoint, rank)["tensors"]
        saved["groups"] = tensors.pop("groups")
        saved.setdefault("step", {}).update(tensors.pop("step"))
        for kind, runs in tensors.items():
            for name, run in runs.items():
                parts.setdefault(kind, {}).setdefault(name, []).append(run)
    try:
        return saved | {kind: {n: join(runs, f"{kind}/{n}") for n, runs in of.items()} for kind, of in parts.items()}
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: damaged checkpoint: {error}") from error


def read_state(checkpoint: Checkpoint, rank: int) -> RunState:
    """The run's state; also restores the generators of `rank`, if it was one of the ranks that saved."""
    if rank < checkpoint.manifest["world_size"]:
        set_rng_state(_open(checkpoint, rank)["rng"])
    return RunState(**_open(checkpoint, 0)["state"])


def _open(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint.path / file_name(rank), weights_only=True, mmap=True)
    return content


def file_name(rank: int) -> str:
    """A rank's file."""
    return f"rank_{rank:05d}.pt"


def describe(file: Path) -> dict[str, Any]:
    """Put a file on disk and return its entry in the manifest."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}}


def seal(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest and give the folder its name. What had the name before is moved aside, not deleted."""
    content = {"format": FORMAT, **manifest}
    with (partial / MANIFEST).open("w") as stream:
        json.dump(content | {"sha256": _own_sha256(content)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    if final.exists():  # damaged and passed over, or of a run that was set back
        aside = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        logger.warning("%s was there already; moved to %s", final, aside)
    partial.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop(folder: Path, config: CheckpointConfig, best: set[int]) -> None:
    """Delete the checkpoints that no rule keeps: the newest, every n-th, the best."""
    saved = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    for iteration in saved[: -config.keep]:
        if iteration not in best and not (config.keep_every and iteration % config.keep_every == 0):
            shutil.rmtree(folder / f"{iteration:07d}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    """Checksum of a manifest, of which its own checksum is no part."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
