"""What a run will take: ``train --check`` prints it before a single GPU is asked for.

Activations are counted, not measured: `kept_per_token` lists what the layers keep for the backward pass on a GPU,
tensor by tensor. Workspaces of libraries and the allocator's rounding come on top, a few percent.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from mambair_ds.config import NetworkConfig, RunConfig, UserError

GB = 2**30
_CHUNK = 8  # tokens between the states that the scan keeps
_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Memory:
    """Predicted memory of one rank, in bytes."""

    fixed: float
    """Weights, gradients, moments, running mean, and the copy that validates."""
    sample: float
    """Activations that one sample of the batch takes at their peak."""

    def peak(self, batch_size: int) -> float:
        """Of a batch."""
        return self.fixed + batch_size * self.sample

    def largest_batch(self, card: float) -> int:
        """The largest batch on a card of so many bytes; 0 if none fits."""
        return max(0, int((card - self.fixed) / self.sample))


def predict(config: RunConfig, parameters: int, ranks: int, *, precision: str) -> Memory:
    """Predict a rank's memory.

    Args:
        config: the run.
        parameters: of the network.
        ranks: on how many the run is.
        precision: fp32, bf16 or pure_bf16.
    """
    train, network = config.train, config.network
    weight = 2 if precision == "pure_bf16" else 4
    master = 4 if train.zero_stage else 0  # DeepSpeed's stages 1 to 3 step on copies of the weights in float32
    states = 12 if train.ema_decay else 8  # moments and running mean
    split = [1 / ranks if train.zero_stage >= stage else 1 for stage in range(4)]  # by the stage that splits it
    each = weight * split[3] + weight * split[2] + (states + master) * split[1] + 4
    if train.zero_stage in (1, 2):
        each += weight / 4 if train.overlap_comm else weight  # what gradients are reduced in: two buckets or one
    narrow, wide = (4, 4) if precision == "fp32" else (2, 4 if precision == "bf16" else 2)
    tokens = (
        config.data.train.gt_size / network.upscale / network.window_size
    ).__ceil__() ** 2 * network.window_size**2
    layers = sum(network.depths)
    layer = kept_per_token(network, narrow, wide)
    kept = layers * layer
    if network.use_checkpoint:
        kept = layers * network.embed_dim * wide + layer
        if network.use_checkpoint == "selective":
            kept += layers * slow_per_token(network, narrow)
    # The backward pass of a layer holds, beside what is kept, gradients about as large as what the layer kept.
    return Memory(each * parameters, tokens * (kept + layer + head_per_token(network, narrow, wide)))


def kept_per_token(network: NetworkConfig, narrow: int, wide: int) -> float:
    """Bytes that an attentive layer keeps for the backward pass for one token, with the Triton operators.

    Args:
        network: the network.
        narrow: bytes of a number in products' results (2 under autocast).
        wide: bytes of a number in the stream that layers add to.
    """
    dim, states, classes, heads = network.embed_dim, network.d_state, network.num_tokens, network.num_heads[0]
    hidden = int(dim * network.mlp_ratio)
    rank = ceil(hidden / 16)
    stream = 4 * dim  # before the attention, after it, before the scan, after it
    attention = 3 * dim + dim
    # After fc1, and after the convolution (of Light's halves, one gates the other).
    feed_forward = 2 * hidden if network.type == "MambaIRv2" else hidden + hidden // 2
    router = dim // 3 + classes
    scan = 4 * hidden + rank + 2 * states  # after in_proj, after the convolution, step sizes, result; their parameters
    prompt = states
    kept = hidden * states / _CHUNK
    numbers = attention + 2 * feed_forward + router + scan + prompt + kept
    exact = 4 * heads + 6 * 8  # float32 whatever the precision: logarithms of the attention, norms' statistics
    indices = 2 * 8
    return stream * wide + numbers * narrow + exact + indices


def slow_per_token(network: NetworkConfig, narrow: int) -> float:
    """Bytes that the results of a layer's scan and attention take for one token."""
    dim, hidden = network.embed_dim, int(network.embed_dim * network.mlp_ratio)
    return (dim + hidden + hidden * network.d_state / _CHUNK) * narrow + 4 * network.num_heads[0]


def head_per_token(network: NetworkConfig, narrow: int, wide: int) -> float:
    """Bytes that everything outside of the attentive layers keeps, per token of LQ; as `kept_per_token`."""
    dim, area, width = network.embed_dim, network.upscale**2, _HEAD_WIDTH
    # The stages' convolutions, the shallow features, and what the last norm and the two convolutions after it read.
    features = (len(network.depths) + 3) * dim * narrow + dim * wide
    picture = network.in_chans * (1 + area) * 4
    if network.upsampler == "pixelshuffle":
        sides = [3] if network.upscale == 3 else [2**i for i in range(1, network.upscale.bit_length())]
        return features + picture + width * (2 + sum(side**2 for side in sides)) * narrow
    if network.upsampler == "nearest+conv":
        return features + picture + width * (1 + 2 * 4 + 5 * 16) * narrow
    return features + picture


def describe(config: RunConfig, ranks: int, card: float) -> str:
    """The plan of a run in words.

    Args:
        config: the run, its paths checked.
        ranks: on how many.
        card: bytes of a GPU's memory.

    Raises:
        UserError: shards or validation sets do not fit, or there is too little room on disk.
    """
    import torch

    from mambair_ds.data.order import Order
    from mambair_ds.data.pipeline import check_train_data
    from mambair_ds.data.shards import Shards
    from mambair_ds.models import build_model
    from mambair_ds.training.validation import open_sets

    train, data = config.train, config.data.train
    check_train_data(data, config.task, config.network, verify=True)
    sets = open_sets(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config.network).parameters())
    pictures = [len(Shards.open(folder.path)) for folder in data.shards]
    epoch = Order(pictures, [folder.weight for folder in data.shards], 0).epoch_size
    batch = data.batch_size * ranks * train.accumulation
    precision = "bf16" if train.precision == "auto" else train.precision
    memory = predict(config, parameters, ranks, precision=precision)
    peak, largest = memory.peak(data.batch_size), memory.largest_batch(card)
    fits = "fits" if peak <= card else "DOES NOT FIT"
    lines = {
        "run": f"{config.name}: {config.network.type} x{config.network.upscale}, {parameters:,} parameters, "
        f"{_task(config)}",
        "folder": _folder(config),
        "pictures": f"{sum(pictures):,} in {len(pictures)} folder{'s' if len(pictures) > 1 else ''}; "
        f"an epoch is {epoch:,} samples",
        "batch": f"{data.batch_size} a rank x {ranks} ranks x {train.accumulation} accumulated = {batch}; "
        f"{train.total_iter:,} iterations are {train.total_iter * batch / epoch:.1f} epochs",
        "validation": ", ".join(f"{name} ({len(one)})" for name, one in sets.items()) or "none",
        "memory": f"{peak / GB:.1f} GB predicted a rank on GPUs, {precision}, ZeRO {train.zero_stage}: "
        f"{memory.fixed / GB:.2f} fixed, {memory.sample / GB:.3f} a sample; {fits} into {card / GB:.0f} GB, "
        + (f"as would batches of {largest}" if largest else "nor would a batch of 1"),
        "disk": _disk(config, parameters),
        "time": _time(config, batch),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _task(config: RunConfig) -> str:
    task = config.task
    if task.kind == "denoise":
        return f"denoising, sigma {task.sigma:g}"
    return f"JPEG repair, quality {task.quality}" if task.kind == "jpeg" else "super-resolution"


def _folder(config: RunConfig) -> str:
    from mambair_ds.training import checkpoint as checkpoints

    if found := checkpoints.newest(config.folder / "checkpoints"):
        return f"{config.folder}: goes on from iteration {found.iteration:,}"
    return f"{config.folder}: {'there, without a whole checkpoint; starts over' if config.folder.exists() else 'new'}"


def _disk(config: RunConfig, parameters: int) -> str:
    sets = 4 if config.train.ema_decay else 3  # weights, two moments, running mean
    checkpoint = 4 * parameters * sets
    export = 4 * parameters * (sets - 2)
    exports = ceil(config.train.total_iter / config.checkpoint.every)
    needed = checkpoint * (config.checkpoint.keep + 1) + export * exports
    place = config.experiments_root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{config.experiments_root}: {free / GB:.1f} GB are free, the run needs {needed / GB:.1f} "
            f"({config.checkpoint.keep + 1} checkpoints of {checkpoint / GB:.2f}, {exports} exports of "
            f"{export / GB:.2f}); make room, lower checkpoint.keep or raise checkpoint.every"
        )
    return f"{needed / GB:.1f} GB at most, of {free / GB:.0f} free; a checkpoint takes {checkpoint / GB:.2f}"


def _time(config: RunConfig, batch: int) -> str:
    """From the speed that this run had last, if it has run."""
    speed = _last_speed(config.folder / "log/metrics.jsonl")
    if not speed:
        return "told by the first log lines: the run has no measured speed yet"
    hours = config.train.total_iter * batch / speed / 3600
    return f"{hours:.1f} hours in all at the {speed:.1f} samples/s of its last log line"


def _last_speed(path: Path) -> float | None:
    if not path.is_file():
        return None
    for line in reversed(path.read_text(errors="replace").splitlines()):
        try:
            return float(json.loads(line)["samples_per_second"])
        except (ValueError, KeyError, TypeError):
            continue
    return None
