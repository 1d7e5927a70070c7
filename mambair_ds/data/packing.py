"""From folders of pictures to a shard folder: check everything, then write, and continue where an earlier try stopped.

The check decodes every picture and lists all that is wrong at once, before anything is written. Then the order and the
division into shards are fixed in a plan; each finished shard leaves an entry in a journal beside the plan. Both lie in
``.prepare`` inside the output folder until the manifest is written. Since a shard's bytes follow from the plan and the
pictures alone, an interrupted and continued run gives the same dataset as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from mambair_ds.config import UserError
from mambair_ds.data.degradations import resize_uint8
from mambair_ds.data.pictures import (
    Channels,
    Pair,
    PictureError,
    Problem,
    cut_to_multiple,
    fit_pair,
    pair_folder,
    read_picture,
)
from mambair_ds.data.shards import (
    MANIFEST,
    Row,
    Sample,
    ShardRecord,
    Shards,
    store_picture,
    write_manifest,
    write_shard,
)
from mambair_ds.files import write_whole

_T = TypeVar("_T")
_R = TypeVar("_R")
_JOURNAL = ".prepare"


@dataclass(frozen=True)
class Packing:
    """What to pack and how."""

    gt: list[Path]
    """Folders of GT pictures."""
    lq: list[Path]
    """Folders of LQ pictures, one a GT folder, or none at all."""
    filename_tmpl: str
    """See `pictures.pair_folder`."""
    scale: int
    """GT size over LQ size. Above 1 and without LQ folders, LQ is made by the MATLAB rule."""
    out: Path
    """The shard folder."""
    form: Literal["tif", "png"]
    """How pictures are stored."""
    shard_size: int
    """Pixel bytes a shard holds, at least one sample."""
    seed: int
    """Shuffles the order of the samples."""
    workers: int
    """Threads that decode."""
    skip_bad: bool
    """Leave bad pictures out instead of refusing the dataset."""
    channels: Channels
    """RGB or grey."""


@dataclass(frozen=True)
class _Checked:
    key: str
    pixel_bytes: int
    notes: tuple[str, ...]


def pack(packing: Packing, say: Callable[[str], None]) -> None:
    """Pack folders of pictures into shards.

    Args:
        packing: what and how.
        say: receives a line for the user at a time.

    Raises:
        UserError: listing everything wrong with the pictures; or if the output folder holds something else.
    """
    pairs, problems = _collect(packing)
    settings = _settings(packing, pairs, problems)
    plan = _existing(packing.out, settings, say)
    if plan == "complete":
        return
    pool = ThreadPoolExecutor(packing.workers)
    try:
        if plan is None:
            plan = _check_and_plan(packing, pairs, problems, settings, pool, say)
        shards = _write(packing, pairs, plan, pool, say)
    finally:
        pool.shutdown(cancel_futures=True)
    write_manifest(packing.out, settings, shards, plan["skipped"])
    shutil.rmtree(packing.out / _JOURNAL)
    say(f"{packing.out}: {sum(record.count for record, _ in shards)} pictures in {len(shards)} shards, complete")


def _collect(packing: Packing) -> tuple[dict[str, Pair], list[Problem]]:
    """All pairs by key, and the files that have no place."""
    if packing.lq and len(packing.lq) != len(packing.gt):
        raise UserError(
            f"--lq names {len(packing.lq)} folders and --gt {len(packing.gt)}: expected one LQ folder a GT folder"
        )
    folders = [*packing.gt, *packing.lq]
    missing = [f"{folder}: no such folder; expected a folder of pictures" for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError("\n".join(missing))
    problems: list[Problem] = []
    found: dict[str, list[Pair]] = {}
    lq_folders: list[Path | None] = [*packing.lq] or [None] * len(packing.gt)
    for gt, lq in zip(packing.gt, lq_folders, strict=True):
        pairs, unpaired = pair_folder(gt, lq, packing.filename_tmpl)
        problems += unpaired
        for pair in pairs:
            # WebDataset ends a key at the first dot, DALI's index separates words by spaces.
            found.setdefault(re.sub(r"[\s.]", "_", pair.name), []).append(pair)
    for key, same in found.items():
        if len(same) > 1:
            names = " and ".join(str(pair.gt) for pair in same)
            problems += [Problem(pair.gt, f"name {key} is taken twice, by {names}") for pair in same]
    return {key: same[0] for key, same in found.items() if len(same) == 1}, problems


def _settings(packing: Packing, pairs: dict[str, Pair], problems: list[Problem]) -> dict[str, Any]:
    """What makes the dataset: equal settings give equal bytes."""
    files = [path for pair in pairs.values() for path in (pair.gt, pair.lq) if path]
    files += [problem.file for problem in problems]
    listing = "\n".join(sorted(f"{path.name} {path.stat().st_size}" for path in files))
    return {
        "scale": packing.scale,
        "channels": packing.channels,
        "image_format": packing.form,
        "lq": "folder" if packing.lq else "matlab" if packing.scale > 1 else "none",
        "filename_tmpl": packing.filename_tmpl,
        "shard_size": packing.shard_size,
        "seed": packing.seed,
        "source": hashlib.sha256(listing.encode()).hexdigest(),
    }


def _existing(
    out: Path, settings: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any] | Literal["complete"] | None:
    """The plan of an interrupted run, "complete", or None where there is nothing yet."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file; expected a folder, or nothing, to write shards to")
    if (out / MANIFEST).is_file():
        shards = Shards.open(out)
        _compare(out, "holds shards", shards.settings, settings)
        shutil.rmtree(out / _JOURNAL, ignore_errors=True)
        say(f"{out}: complete already, {len(shards)} pictures; nothing to do")
        return "complete"
    path = out / _JOURNAL / "plan.json"
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        _compare(out, "holds an unfinished run", plan["settings"], settings)
        return plan
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty and not a shard folder; expected an empty or new folder")
    return None


def _compare(out: Path, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        listed = ", ".join(
            "other pictures" if key == "source" else f"{key} {found.get(key)!r} (now {wanted[key]!r})"
            for key in different
        )
        raise UserError(f"{out}: {what} made differently: {listed}; delete it or choose another --out")


def _check_and_plan(
    packing: Packing,
    pairs: dict[str, Pair],
    problems: list[Problem],
    settings: dict[str, Any],
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Decode everything, complain or not, and fix the order and the shards."""
    notes: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    work = _in_order(pool, lambda item: _check(packing, *item), pairs.items(), 2 * packing.workers)
    for result in tqdm(work, "checking", len(pairs), unit="pictures", disable=None):
        if isinstance(result, Problem):
            problems.append(result)
        else:
            sizes[result.key] = result.pixel_bytes
            notes.update(result.notes)

    problems.sort(key=lambda problem: (str(problem.file), problem.reason))
    listed = "\n".join(f"  {problem.file}: {problem.reason}" for problem in problems)
    if problems and not packing.skip_bad:
        raise UserError(f"{len(problems)} files cannot be used (--skip-bad leaves them out):\n{listed}")
    if not sizes:
        raise UserError(f"no usable picture is left:\n{listed}")
    if problems:
        say(f"left out {len(problems)} files:\n{listed}")
    for note, count in sorted(notes.items()):
        say(f"{note}: {count} pictures")

    # Ordered by a checksum: a shuffle that is the same with every version of every library.
    order = sorted(sizes, key=lambda key: hashlib.sha256(f"{packing.seed}/{key}".encode()).digest())
    shards: list[list[str]] = []
    room = 0
    for key in order:
        if not shards or sizes[key] > room:
            shards.append([])
            room = packing.shard_size
        shards[-1].append(key)
        room -= sizes[key]
    skipped = [{"file": str(problem.file), "reason": problem.reason} for problem in problems]
    plan = {"settings": settings, "skipped": skipped, "shards": shards}
    (packing.out / _JOURNAL).mkdir(parents=True, exist_ok=True)
    write_whole(packing.out / _JOURNAL / "plan.json", json.dumps(plan).encode())
    return plan


def _write(
    packing: Packing,
    pairs: dict[str, Pair],
    plan: dict[str, Any],
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> list[tuple[ShardRecord, list[Row]]]:
    """Write the shards that the journal does not have yet."""
    done = {number: entry for number in range(len(plan["shards"])) if (entry := _finished(packing.out, number))}
    if done:
        say(f"{packing.out}: {len(done)} of {len(plan['shards'])} shards are written already, continuing")
    todo = {number: keys for number, keys in enumerate(plan["shards"]) if number not in done}
    items = [(key, pairs[key]) for keys in todo.values() for key in keys]
    samples = _in_order(pool, lambda item: _load(packing, *item), items, 2 * packing.workers)
    bar = iter(tqdm(samples, "packing", len(items), unit="pictures", disable=None))
    for number, keys in todo.items():
        record, rows = write_shard(packing.out, number, itertools.islice(bar, len(keys)))
        finished = json.dumps({"record": asdict(record), "rows": rows}).encode()
        write_whole(packing.out / _JOURNAL / f"{number:06d}.json", finished)
        done[number] = record, rows
    return [done[number] for number in range(len(plan["shards"]))]


def _finished(out: Path, number: int) -> tuple[ShardRecord, list[Row]] | None:
    path = out / _JOURNAL / f"{number:06d}.json"
    if not path.is_file():
        return None
    entry = json.loads(path.read_text(encoding="utf-8"))
    record = ShardRecord(**entry["record"])
    tar = out / record.file
    if not tar.is_file() or tar.stat().st_size != record.size:
        return None
    return record, [(key, tuple(gt), tuple(lq)) for key, gt, lq in entry["rows"]]


def _check(packing: Packing, key: str, pair: Pair) -> _Checked | Problem:
    try:
        gt, lq, notes = _read(packing, pair)
    except _BadFile as error:
        return Problem(error.file, error.reason)
    with_lq = lq is not None or packing.scale > 1
    return _Checked(key, gt.nbytes + with_lq * gt.nbytes // packing.scale**2, notes)


def _load(packing: Packing, key: str, pair: Pair) -> Sample:
    try:
        gt, lq, notes = _read(packing, pair)
    except _BadFile as error:
        raise UserError(f"{error.file}: changed since it was checked: {error.reason}") from error
    if lq is None and packing.scale > 1:
        lq = resize_uint8(gt, 1 / packing.scale)
    info = {"gt": pair.gt.name, "lq": pair.lq.name if pair.lq else None, "notes": notes}
    return Sample(key, store_picture(gt, packing.form), None if lq is None else store_picture(lq, packing.form), info)


class _BadFile(Exception):
    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason


def _read(packing: Packing, pair: Pair) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """GT cut to a multiple of the scale, the LQ of its file if there is one, and the notes of reading them."""
    reading = pair.gt
    try:
        gt = read_picture(pair.gt, packing.channels)
        if pair.lq is None:
            return cut_to_multiple(gt.pixels, packing.scale), None, gt.notes
        reading = pair.lq
        lq = read_picture(pair.lq, packing.channels)
        return fit_pair(gt.pixels, lq.pixels, packing.scale), lq.pixels, tuple(dict.fromkeys(gt.notes + lq.notes))
    except PictureError as error:
        raise _BadFile(reading, str(error)) from error


def _in_order(pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T], ahead: int) -> Iterator[_R]:
    """Like map over threads, but at most `ahead` results wait in memory."""
    pending: deque[Future[_R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
