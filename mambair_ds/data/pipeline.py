"""From shards to batches: the order says what, memory maps give the pixels, DALI turns them on the device.

Raw pictures are cropped out of the mapped shards, and transposed, by worker threads; if any picture is compressed, the
files' bytes go to DALI's region decoder instead. Flips, JPEG and other transposes run in DALI, on the CPU or on a GPU
by the same pipeline, and pictures are handed over as uint8.

Noise is the exception. DALI's generators keep one state a batch, so that a sample's noise depends on its place in the
batch and on all that was drawn before. Ours must depend on seed and position alone, for a resumed run or another
number of ranks to see the same noise. It is added after the hand-over, by the Philox generator of the network's noise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor

from mambair_ds.config import NetworkConfig, TaskConfig, TrainDataConfig, UserError
from mambair_ds.data.degradations import resize_uint8
from mambair_ds.data.order import Order, Samples, anchor
from mambair_ds.data.real_world import degrade, sample_generator
from mambair_ds.data.shards import Shards, Which
from mambair_ds.kernels.philox import DEGRADATION_STREAM, NoiseKey, normal

logger = logging.getLogger(__name__)

_AHEAD = 2  # batches being read, and as many again inside DALI
_PLANNED = 2048  # samples whose order is worked out at once: the arithmetic costs little per array, not per element
_JPEG_UNIT = 16  # side of JPEG's largest coding unit (4:2:0), in pixels


@dataclass(frozen=True)
class Batch:
    """Pairs of pictures on the training device."""

    lq: Tensor
    """(B, h, w, C): uint8, or for the task denoise float32 around [0, 1], neither clipped nor rounded."""
    gt: Tensor
    """(B, H, W, C) uint8."""
    positions: Tensor
    """(B,) int64 on the CPU: the samples' positions in the run's stream, which key all other noise."""

    def to_float(self) -> tuple[Tensor, Tensor]:
        """LQ and GT as float32 (B, C, H, W) in [0, 1], in channels-last memory; x / 255 as numpy's float32 has it."""
        return _to_float(self.lq).permute(0, 3, 1, 2), _to_float(self.gt).permute(0, 3, 1, 2)


def _to_float(picture: Tensor) -> Tensor:
    if picture.dtype != torch.uint8:
        return picture
    # A Python number as divisor becomes a multiplication by 1/255 on a GPU, which rounds differently.
    return picture.float() / torch.full((), 255.0, device=picture.device)


class TrainStream:
    """The endless stream of training batches of one rank.

    The W ranks walk through the run's positions together: their next batches cover the next batch_size · W positions,
    of which rank r takes those that are r modulo W. `position` is the whole state: streams that start there, on any
    number of ranks, go on exactly.
    """

    def __init__(
        self,
        data: TrainDataConfig,
        task: TaskConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        batch_size: int,
        position: int = 0,
        device: torch.device | str,
        scale: int | None = None,
        max_damaged: int = 0,
    ) -> None:
        """Open the shards and start reading ahead.

        A picture that cannot be read or decoded is named, and the next of its folder taken in its place, always the
        same one; more than `max_damaged` pictures end the stream.

        Raises:
            UserError: if shards are missing or damaged, do not fit the task or one another, or hold a picture smaller
                than a crop.
        """
        self._data, self._task, self._seed = data, task, seed
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._folders = _open(data, task)
        self.channels = self._folders[0].channels
        """Channels of all pictures: 3 or 1."""
        self.scale = (scale or self._folders[0].scale) if task.kind == "sr" else 1
        """GT size over LQ size."""
        self._members: tuple[Which, ...] = ("gt", "lq") if task.kind == "sr" else ("gt",)
        # Of which pictures are read; LQ that is made from GT needs GT's pixels here.
        self._stored: tuple[Which, ...] = ("gt",) if task.degradation else self._members
        self._shapes = [shards.shapes(self._stored[-1]) for shards in self._folders]
        self._compressed = task.degradation is None and any(
            s.encoding(0, member) != "raw" for s in self._folders for member in self._stored
        )
        self._order = Order([len(s) for s in self._folders], [f.weight for f in data.shards], seed)

        self.position = position
        """Samples that all ranks together have consumed."""
        self._max_damaged = max_damaged
        self._damaged: dict[tuple[int, int], str] = {}  # by folder and picture
        self._noting = threading.Lock()
        self._reader = ThreadPoolExecutor(data.threads, thread_name_prefix="crops")
        self._pipeline: Pipeline | None = None
        self._start()

    def _start(self) -> None:
        """Read ahead from `position`."""
        self._plan = self._planned(self.position)
        self._reading: deque[Future[tuple[Any, ...]]] = deque()
        self._pipeline = _pipeline(
            self._inputs,
            members=len(self._members),
            compressed=self._compressed,
            gray=self.channels == 1,
            quality=self._task.quality,
            gt_size=self._data.gt_size,
            gpu=self._device.type == "cuda",
            batch_size=self._batch_size,
            num_threads=self._data.threads,
            device_id=self._device.index,
            prefetch_queue_depth=_AHEAD,
        )
        self._pipeline.build()

    @property
    def damaged(self) -> int:
        """Pictures that this rank has found damaged."""
        return len(self._damaged)

    def keys(self, position: int, batches: int) -> list[str]:
        """Folder and key of this rank's samples in the batches from a position on."""
        starts = range(position, position + batches * self._stride, self._stride)
        samples = self._order.samples(np.concatenate([self._positions(start) for start in starts]))
        return [
            f"{self._folders[f].folder}: {self._folders[f].key(p)}"
            for f, p in zip(samples.folder, samples.picture, strict=True)
        ]

    @property
    def pictures(self) -> int:
        """Pictures in all folders together."""
        return sum(map(len, self._folders))

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch: the folders' pictures times their weights."""
        return self._order.epoch_size

    @property
    def epoch(self) -> int:
        """Epoch, from 0, that the next batch begins in."""
        return self.position // self.epoch_size

    def next(self) -> Batch:
        """The next batch of this rank.

        Raises:
            UserError: naming folder and key of a sample that cannot be read or decoded; the stream is closed then.
        """
        if self._pipeline is None:
            raise ValueError("next on a closed stream")
        positions = self._positions(self.position)
        try:
            outputs = self._outputs()
        except UserError:
            self.close()
            raise
        gt, *rest = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        keys = torch.from_numpy(positions)
        lq = rest[0] if rest else self._noisy(gt, keys)
        self.position += self._stride
        return Batch(lq, gt, keys)

    def _outputs(self) -> tuple[Any, ...]:
        """What DALI gives for the next batch, with neighbours in place of damaged pictures."""
        while True:
            assert self._pipeline is not None
            try:
                outputs: tuple[Any, ...] = self._pipeline.run(
                    torch.cuda.current_stream(self._device) if self._device.index is not None else None
                )
                return outputs
            except RuntimeError as error:
                undecodable = self._undecodable()
                if not undecodable:
                    raise
                self._note(undecodable, error)
                for future in self._reading:
                    future.cancel()
                self._start()

    def close(self) -> None:
        """Stop reading ahead and free DALI's buffers and threads."""
        self._reader.shutdown(cancel_futures=True)
        self._pipeline = None

    @property
    def _stride(self) -> int:
        return self._batch_size * self._world_size

    def _positions(self, start: int) -> np.ndarray:
        """This rank's part of start ... start + stride - 1: the positions that are rank modulo world size."""
        first = start + (self._rank - start) % self._world_size
        return first + self._world_size * np.arange(self._batch_size)

    def _planned(self, start: int) -> Iterator[Samples]:
        """This rank's batches from position `start` on, for ever."""
        batches = -(-_PLANNED // self._batch_size)
        while True:
            starts = range(start, start + batches * self._stride, self._stride)
            samples = self._order.samples(np.concatenate([self._positions(s) for s in starts]))
            for k in range(batches):
                yield samples[k * self._batch_size : (k + 1) * self._batch_size]
            start += batches * self._stride

    def _inputs(self) -> tuple[Any, ...]:
        """DALI's source: the batch read longest ago; the places behind it in the queue are filled up."""
        while len(self._reading) <= _AHEAD:
            self._reading.append(self._reader.submit(self._read, next(self._plan)))
        return self._reading.popleft().result()

    def _note(self, damaged: dict[tuple[int, int], str], cause: Exception) -> None:
        """Remember damaged pictures.

        Raises:
            UserError: they are too many; says what the new ones have.
        """
        with self._noting:
            new = {place: reason for place, reason in damaged.items() if place not in self._damaged}
            self._damaged |= new
            if len(self._damaged) > self._max_damaged:
                raise UserError("\n".join(new.values() or self._damaged.values())) from cause
        for reason in new.values():
            logger.warning(
                "%s; its neighbour is taken instead (%d of faults.max_damaged %d)",
                reason, len(self._damaged), self._max_damaged,
            )  # fmt: skip

    def _undamaged(self, samples: Samples) -> Samples:
        """The samples with the next whole picture of the folder in place of every damaged one."""
        if not self._damaged:
            return samples
        pictures = samples.picture.copy()
        for i, (folder, picture) in enumerate(zip(samples.folder.tolist(), pictures.tolist(), strict=True)):
            count = len(self._folders[folder])
            whole = (p % count for p in range(picture, picture + count) if (folder, p % count) not in self._damaged)
            if (taken := next(whole, None)) is None:
                raise UserError(f"{self._folders[folder].folder}: all {count} pictures are damaged")
            pictures[i] = taken
        return replace(samples, picture=pictures)

    def _read(self, samples: Samples) -> tuple[Any, ...]:
        """A batch as `_pipeline` takes it."""
        while True:
            try:
                return self._assemble(self._undamaged(samples))
            except _DamagedPicture as damage:
                self._note({damage.place: str(damage)}, damage)

    def _assemble(self, samples: Samples) -> tuple[Any, ...]:
        scale, size = self.scale, self._data.gt_size
        sides = np.stack([self._shapes[f][p] for f, p in zip(samples.folder, samples.picture, strict=True)]).astype(
            np.int64
        )
        if self._task.degradation:
            sides = sides // scale  # crops lie on LQ's grid
        start = anchor(np.stack([samples.row, samples.column], axis=1), sides - size // scale + 1)
        flips = samples.hflip & self._data.use_hflip, samples.vflip & self._data.use_rot
        inputs: list[Any] = [f.astype(np.int32) for f in flips] + [samples.transpose & self._data.use_rot]
        if self._task.kind == "jpeg":
            region, end = _jpeg_region(start, start + size, sides)
            return *inputs, *self._member(samples, "gt", region, end - region), (start - region).astype(np.int32)
        shape = np.full_like(start, size)
        inputs += self._member(samples, "gt", start * scale, shape)
        if self._task.degradation:
            inputs.append(self._degraded(inputs[-1], samples.position))
        elif "lq" in self._members:
            inputs += self._member(samples, "lq", start, shape // scale)
        return tuple(inputs) if self._compressed else _transposed(*inputs)

    def _degraded(self, crops: list[np.ndarray], positions: np.ndarray) -> list[np.ndarray]:
        """LQ (h, w, C) of every GT crop, made from it alone."""
        config = self._task.degradation
        assert config is not None
        if config.type == "bicubic":
            return [resize_uint8(crop, 1 / self.scale) for crop in crops]
        generators = (sample_generator(self._seed, int(position)) for position in positions)
        return [degrade(crop, self.scale, config, one) for crop, one in zip(crops, generators, strict=True)]

    def _member(self, samples: Samples, which: Which, start: np.ndarray, shape: np.ndarray) -> list[Any]:
        """One picture of every sample: pixels of the regions, or compressed files and the regions in them."""
        data = []
        for folder, picture, corner, sides in zip(
            samples.folder, samples.picture, start.tolist(), shape.tolist(), strict=True
        ):
            shards = self._folders[folder]
            try:
                if self._compressed:
                    data.append(np.frombuffer(shards.bytes(picture, which), np.uint8))
                else:
                    data.append(shards.crop(picture, which, *corner, *sides))
            except (OSError, ValueError) as error:
                reason = f"{shards.folder}: sample {shards.key(picture)}: cannot read its {which}: {error}"
                raise _DamagedPicture((int(folder), int(picture)), reason) from error
        return [data, start.astype(np.int32), shape.astype(np.int32)] if self._compressed else [data]

    def _noisy(self, gt: Tensor, positions: Tensor) -> Tensor:
        """GT in [0, 1] plus Gaussian noise, as published: in float, neither clipped nor rounded."""
        assert self._task.sigma is not None
        noise = normal(NoiseKey(self._seed, positions), DEGRADATION_STREAM, gt.shape, gt.device)
        return _to_float(gt) + noise * (self._task.sigma / 255)

    def _undecodable(self) -> dict[tuple[int, int], str]:
        """Which pictures of the first batch that has such, of those in DALI's hands, it cannot decode, and why."""
        for ahead in range(2 * _AHEAD + 1):
            samples = self._undamaged(self._order.samples(self._positions(self.position + ahead * self._stride)))
            failed = {}
            for folder, picture in zip(samples.folder.tolist(), samples.picture.tolist(), strict=True):
                shards = self._folders[folder]
                for which in self._stored:
                    try:
                        _decoder(np.frombuffer(shards.bytes(picture, which), np.uint8)).run()
                    except RuntimeError:
                        reason = f"{shards.folder}: sample {shards.key(picture)}: its {which} cannot be decoded"
                        failed[folder, picture] = reason
            if failed:
                return failed
        return {}


class _DamagedPicture(Exception):
    """A picture that cannot be read; the message names it."""

    def __init__(self, place: tuple[int, int], reason: str) -> None:
        super().__init__(reason)
        self.place = place


def check_train_data(data: TrainDataConfig, task: TaskConfig, network: NetworkConfig, verify: bool = False) -> str:
    """Check, before anything heavy starts, that the shards fit one another, the crop, the task and the network.

    Args:
        data, task, network: of the run.
        verify: compare the shards' checksums too, if `data.verify` asks for it: one rank is enough.

    Returns:
        A checksum of all that decides, beside the seed, what comes at a position: a stream goes on only in one of the
        same checksum.

    Raises:
        UserError: naming the folder and what was expected.
    """
    folders = _open(data, task)
    for shards in folders if data.verify and verify else []:
        shards.verify()
    first = folders[0]
    if first.channels != network.in_chans:
        raise UserError(
            f"{first.folder}: pictures of {first.channels} channels, network.in_chans is {network.in_chans}"
        )
    if task.kind == "sr" and not task.degradation and first.scale != network.upscale:
        raise UserError(f"{first.folder}: prepared with scale {first.scale}, network.upscale is {network.upscale}")
    parts = {
        "shards": [[s.fingerprint, f.weight] for s, f in zip(folders, data.shards, strict=True)],
        "crop": [data.gt_size, data.use_hflip, data.use_rot],
        "task": task.model_dump(exclude_none=True),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _open(data: TrainDataConfig, task: TaskConfig) -> list[Shards]:
    """Open the shard folders and check them against one another, the task and the crop."""
    folders = [Shards.open(folder.path) for folder in data.shards]
    first = folders[0]
    for shards in folders:
        if shards.channels != first.channels:
            raise UserError(
                f"{shards.folder}: pictures of {shards.channels} channels, but of {first.channels} in {first.folder}; "
                "expected the same in all of data.train.shards"
            )
        if task.kind == "sr" and not task.degradation and not shards.has_lq:
            raise UserError(
                f"{shards.folder}: has samples without LQ, which task.kind sr needs; prepare it with a scale, or make "
                "LQ while training (task.degradation)"
            )
        if task.kind == "sr" and not task.degradation and shards.scale != first.scale:
            raise UserError(
                f"{shards.folder}: prepared with scale {shards.scale}, but {first.folder} with {first.scale}; "
                "expected the same in all of data.train.shards"
            )
        sides = shards.shapes("gt").min(axis=1)
        if sides.min() < data.gt_size:
            smallest = int(sides.argmin())
            height, width, _ = shards.shape(smallest, "gt")
            raise UserError(
                f"{shards.folder}: data.train.gt_size is {data.gt_size}, but {(sides < data.gt_size).sum()} of "
                f"{len(shards)} pictures are smaller, the smallest being {shards.key(smallest)} of {width}x{height}"
            )
    if task.kind == "sr" and not task.degradation and data.gt_size % first.scale:
        raise UserError(
            f"data.train.gt_size: {data.gt_size} is no multiple of {first.scale}, the scale of {first.folder}"
        )
    return folders


def _jpeg_region(start: np.ndarray, end: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last corner (n, 2) of what to compress so that start ... end is as if the whole picture had been.

    As published, a picture is compressed before it is cropped, so that a crop lies anywhere on JPEG's grid. Coding
    units are independent, but for the decoder's interpolation of color from one pixel beyond a unit's edge.
    """
    first = np.maximum(start - 1, 0) // _JPEG_UNIT * _JPEG_UNIT
    last = np.minimum(-(-(end + 1) // _JPEG_UNIT) * _JPEG_UNIT, sides)
    return first, last


def _transposed(
    hflip: np.ndarray, vflip: np.ndarray, transpose: np.ndarray, *members: list[np.ndarray]
) -> tuple[Any, ...]:
    """A batch of crops with their transposes done: OpenCV takes 4 µs for one of 128x128, DALI 100 or more on a CPU.

    To flip and then transpose is to transpose and then flip the other axis.
    """
    done = [
        [cv2.transpose(crop).reshape(crop.shape) if turn else crop for crop, turn in zip(crops, transpose, strict=True)]
        for crops in members
    ]
    flips = np.where(transpose, vflip, hflip), np.where(transpose, hflip, vflip)
    return *flips, np.zeros_like(transpose), *done


@pipeline_def(enable_conditionals=True)
def _pipeline(
    source: Callable[[], tuple[Any, ...]],
    members: int,
    compressed: bool,
    gray: bool,
    quality: int | None,
    gt_size: int,
    gpu: bool,
) -> tuple[DataNode, ...]:
    """GT and, but for denoising, LQ, from what `TrainStream._read` gives."""
    count = 3 + members * (3 if compressed else 1) + (quality is not None)
    hflip, vflip, transpose, *inputs = fn.external_source(source, num_outputs=count, batch=True)
    if compressed:
        pictures = [_decoded(inputs[3 * i : 3 * i + 3], gray, gpu) for i in range(members)]
    else:
        pictures = [fn.reshape(pixels, layout="HWC") for pixels in inputs[:members]]
        if gpu:
            pictures = [picture.gpu() for picture in pictures]
    if quality is not None:
        pictures += [_jpeg(pictures[0], quality, gray)]
        pictures = [fn.slice(picture, start=inputs[-1], shape=[gt_size] * 2, axes=[0, 1]) for picture in pictures]
    turned = []
    for picture in pictures:
        picture = fn.flip(picture, horizontal=hflip, vertical=vflip)
        # DALI splits the batch here: the condition is a sample's own.
        if transpose:
            picture = fn.transpose(picture, perm=[1, 0, 2], transpose_layout=False)
        turned.append(picture)
    return tuple(turned)


def _decoded(inputs: list[DataNode], gray: bool, gpu: bool) -> DataNode:
    file, start, shape = inputs
    return fn.decoders.image_slice(
        file,
        start=start,
        shape=shape,
        axes=[0, 1],
        device="mixed" if gpu else "cpu",
        output_type=types.DALIImageType.GRAY if gray else types.DALIImageType.RGB,
    )


def _jpeg(picture: DataNode, quality: int, gray: bool) -> DataNode:
    if not gray:
        return fn.jpeg_compression_distortion(picture, quality=quality)
    # The operator takes three channels. Three equal ones have no color, and each comes out as a grey JPEG would.
    distorted = fn.jpeg_compression_distortion(fn.cat(picture, picture, picture, axis=2), quality=quality)
    return fn.slice(distorted, start=[0], shape=[1], axes=[2])


@pipeline_def(batch_size=1, num_threads=1)
def _decoder(file: np.ndarray) -> DataNode:
    """One picture's file, decoded on the CPU."""
    return fn.decoders.image(fn.external_source(lambda: [file]))
