"""CPU time and rate of the training data: shards and DALI against decoding whole PNGs in worker processes.

The other loader does what trainers in the field do: two `DataLoader` workers read the whole GT and LQ PNG with OpenCV,
convert both to float32, crop, flip and transpose, and hand float tensors over. Ours reads shards of raw pictures and,
for comparison, of PNGs. Both deliver pairs for super-resolution x2: GT 128x128, batches of 16. CPU time is that of the
whole process tree, once the queues are full.

    python benchmarks/data.py [--repeats 3] [--folder DIR]

The pictures are made from scikit-image's photographs, enlarged, with noise so that a PNG is as large as a real one's:
2040x1356 as in DIV2K, and the same pictures cut into 480x480 sub-images. The Markdown table goes to standard output.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import psutil
import skimage.data
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mambair_ds.config import TaskConfig, TrainDataConfig
from mambair_ds.data.degradations import resize_uint8
from mambair_ds.data.pipeline import TrainStream
from mambair_ds.data.shards import Sample, store_picture, write_manifest, write_shard

SCALE, GT_SIZE, BATCH = 2, 128, 16
WIDTH, HEIGHT, SUB = 2040, 1356, 480
PICTURES = 12


def whole_pictures() -> Iterator[np.ndarray]:
    """Photograph-like pictures: uint8 (HEIGHT, WIDTH, 3)."""
    photographs = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    generator = np.random.default_rng(0)
    for i in range(PICTURES):
        photograph = photographs[i % len(photographs)]
        factor = max(WIDTH / photograph.shape[1], HEIGHT / photograph.shape[0])
        large = cv2.resize(photograph, None, fx=factor + 0.01, fy=factor + 0.01, interpolation=cv2.INTER_CUBIC)
        large = np.roll(large, 100 * i, axis=(0, 1))[:HEIGHT, :WIDTH]
        noise = generator.normal(0, 2.5, large.shape)
        yield np.clip(np.rint(large + noise), 0, 255).astype(np.uint8)


def sub_images(pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """All SUB x SUB cuts that fit side by side."""
    for picture in pictures:
        for y in range(0, HEIGHT - SUB + 1, SUB):
            for x in range(0, WIDTH - SUB + 1, SUB):
                yield picture[y : y + SUB, x : x + SUB]


def write(folder: Path, pictures: Iterator[np.ndarray]) -> None:
    """Write pictures as PNG folders gt and lq, and as shard folders tif and png."""
    for name in ("gt", "lq", "tif", "png"):
        (folder / name).mkdir(parents=True)
    forms: tuple[Literal["tif", "png"], ...] = ("tif", "png")
    samples: dict[str, list[Sample]] = {form: [] for form in forms}
    for i, gt in enumerate(tqdm(pictures, desc=f"making {folder.name} pictures", mininterval=2)):
        pair = {"gt": gt, "lq": resize_uint8(gt, 1 / SCALE)}
        for name, picture in pair.items():
            cv2.imwrite(str(folder / name / f"{i:04d}.png"), picture[..., ::-1])
        for form in forms:
            samples[form].append(
                Sample(f"{i:04d}", store_picture(pair["gt"], form), store_picture(pair["lq"], form), {})
            )
    for form in forms:
        shard = write_shard(folder / form, 0, samples[form])
        write_manifest(folder / form, {"scale": SCALE, "channels": "rgb"}, [shard])


class WholePictures(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs of PNGs as the field's trainers load them."""

    def __init__(self, folder: Path) -> None:
        self.names = sorted(path.name for path in (folder / "gt").iterdir())
        self.folder = folder

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        name = self.names[index % len(self.names)]
        gt, lq = (np.asarray(cv2.imread(str(self.folder / part / name)), np.float32) / 255 for part in ("gt", "lq"))
        size = GT_SIZE // SCALE
        y, x = random.randint(0, lq.shape[0] - size), random.randint(0, lq.shape[1] - size)
        lq = lq[y : y + size, x : x + size]
        gt = gt[y * SCALE : y * SCALE + GT_SIZE, x * SCALE : x * SCALE + GT_SIZE]
        flips = [random.random() < 0.5 for _ in range(3)]
        pair = []
        for picture in (gt, lq):
            picture = picture[:, ::-1] if flips[0] else picture
            picture = picture[::-1] if flips[1] else picture
            picture = picture.transpose(1, 0, 2) if flips[2] else picture
            pair.append(torch.from_numpy(np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1))))
        return pair[0], pair[1]


def cpu_seconds() -> float:
    """CPU time of this process and its living children."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(next_batch: Callable[[], object], batches: int) -> tuple[float, float]:
    """CPU milliseconds a pair, and pairs a second."""
    for _ in range(max(6, batches // 10)):
        next_batch()
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(batches):
        next_batch()
    pairs = batches * BATCH
    return (cpu_seconds() - cpu) / pairs * 1000, pairs / (time.perf_counter() - wall)


def measure_workers(folder: Path, batches: int) -> tuple[float, float]:
    """Two worker processes that decode whole PNGs."""
    loader = DataLoader(WholePictures(folder), BATCH, num_workers=2)
    iterator = iter(loader)
    return measure(lambda: next(iterator), batches)


def measure_stream(folder: Path, batches: int) -> tuple[float, float]:
    """Our stream, one rank."""
    data = TrainDataConfig.model_validate({"shards": [folder], "gt_size": GT_SIZE, "batch_size": BATCH})
    stream = TrainStream(
        data, TaskConfig(kind="sr"), seed=0, rank=0, world_size=1, batch_size=BATCH, device=torch.device("cpu")
    )
    result = measure(stream.next, batches)
    stream.close()
    return result


def main() -> None:
    """Make the pictures, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each loader; the table has medians")
    parser.add_argument("--folder", type=Path, help="where to keep the pictures; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        kinds = {f"whole, {WIDTH}x{HEIGHT}": root / "whole", f"sub-images, {SUB}x{SUB}": root / "sub"}
        if not (root / "whole").exists():
            write(root / "whole", whole_pictures())
            write(root / "sub", sub_images(whole_pictures()))
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before, medians of {arguments.repeats}\n")
        print("| pictures | loader | MB a pair | CPU ms a pair | times less CPU | pairs/s |")
        print("| --- | --- | --- | --- | --- | --- |")
        for kind, folder in kinds.items():
            batches = 8 if folder.name == "whole" else 40
            loaders: dict[str, tuple[list[str], Callable[[], tuple[float, float]]]] = {
                "2 workers, whole PNGs": (["gt", "lq"], partial(measure_workers, folder, batches)),
                "ours, PNG shards": (["png"], partial(measure_stream, folder / "png", 2 * batches)),
                "ours, raw shards": (["tif"], partial(measure_stream, folder / "tif", 1500)),
            }
            count = len(list((folder / "gt").iterdir()))
            baseline = 0.0
            for name, (parts, run) in loaders.items():
                runs = [run() for _ in range(arguments.repeats)]
                cpu, rate = (statistics.median(values) for values in zip(*runs, strict=True))
                baseline = baseline or cpu
                size = sum(path.stat().st_size for part in parts for path in (folder / part).iterdir()) / count / 1e6
                print(f"| {kind} | {name} | {size:.2f} | {cpu:.3g} | {baseline / cpu:.3g} | {rate:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
