"""Shard folders: pictures packed into tar files that are read through memory maps.

A folder holds::

    manifest.json    settings, and name, size and checksum of every other file; written last
    000000.tar ...   WebDataset shards: members KEY.gt.tif, KEY.lq.tif (if there is an LQ) and KEY.json, or .png
    000000.idx ...   DALI's index of the tar (v1.2, what wds2idx writes), for readers that want it
    samples.npy      one row a sample: where its pictures lie, how large they are, how they are stored

The writer is `write_shard` for each tar, then `write_manifest`. The reader is `Shards`: opening maps samples.npy and
compares sizes and the small files' checksums, so a million pictures open as fast as a thousand.
Pictures of uncompressed TIFF (see `tiff`) are plain arrays inside the tar: a crop copies its own rows and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import mmap
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from mambair_ds.config import UserError
from mambair_ds.data.tiff import encode_tiff
from mambair_ds.files import write_whole

FORMAT = "mambair_ds.shards/1"
MANIFEST = "manifest.json"
SAMPLES = "samples.npy"
ENCODINGS = ("none", "raw", "png", "jpg")
"""How a picture is stored: not at all, as uncompressed pixels, or compressed. samples.npy holds the position here."""

Which = Literal["gt", "lq"]

_PICTURE = [
    ("offset", "<u8"),  # of the member's data in the tar
    ("size", "<u8"),  # of the member's data, in bytes
    ("pixels", "<u8"),  # raw: offset of the first pixel in the tar
    ("height", "<u4"),
    ("width", "<u4"),
    ("channels", "u1"),
    ("encoding", "u1"),
]
_NO_PICTURE = (0,) * len(_PICTURE)


@dataclass(frozen=True)
class StoredPicture:
    """A picture as a shard keeps it."""

    data: bytes
    """The member's bytes: a TIFF, PNG or JPEG file."""
    shape: tuple[int, int, int]
    """(height, width, channels)."""
    encoding: str
    """One of `ENCODINGS`."""
    pixels: int = 0
    """raw: offset of the first pixel in data."""

    @property
    def suffix(self) -> str:
        """The member name's ending, without a dot."""
        return "tif" if self.encoding == "raw" else self.encoding


@dataclass(frozen=True)
class Sample:
    """What `write_shard` packs."""

    key: str
    """Name of the sample, unique in the folder; no dot and no white space."""
    gt: StoredPicture
    lq: StoredPicture | None
    info: Mapping[str, Any]
    """Content of KEY.json."""


@dataclass(frozen=True)
class ShardRecord:
    """A finished tar, as the manifest lists it."""

    file: str
    size: int
    sha256: str
    count: int
    index_sha256: str


Row = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A sample's key and its GT and LQ rows, in the order of the fields of samples.npy."""


def store_picture(picture: np.ndarray, form: Literal["tif", "png"]) -> StoredPicture:
    """Encode a picture for a shard: uint8 (H, W, 1) or (H, W, 3) RGB, without loss."""
    if form == "tif":
        data, pixels = encode_tiff(picture)
        return StoredPicture(data, picture.shape, "raw", pixels)
    ordered = picture if picture.shape[2] == 1 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(".png", ordered)
    if not done:
        raise ValueError(f"OpenCV cannot write a PNG of shape {picture.shape}")
    return StoredPicture(encoded.tobytes(), picture.shape, "png")


def write_shard(folder: Path, number: int, samples: Iterable[Sample]) -> tuple[ShardRecord, list[Row]]:
    """Write NUMBER.tar and NUMBER.idx; the same samples give the same bytes.

    Both appear under their names only when complete, the tar last; an interruption leaves a file NUMBER.tar.tmp.

    Returns:
        The shard's record for the manifest, and a row for each sample.
    """
    import webdataset  # not needed to read shards, and slow to import

    path = folder / f"{number:06d}.tar"
    temporary = path.with_suffix(".tar.tmp")
    packed: list[Sample] = []
    with open(temporary, "wb") as file:
        with webdataset.TarWriter(
            file, user="", group="", encoder=False, mtime=0, compress=False, format="PAX_FORMAT"
        ) as tar:
            for sample in samples:
                members = {"__key__": sample.key, f"gt.{sample.gt.suffix}": sample.gt.data}
                if sample.lq:
                    members[f"lq.{sample.lq.suffix}"] = sample.lq.data
                members["json"] = json.dumps(sample.info, sort_keys=True).encode()
                tar.write(members)
                # What follows needs no pixels: keep none in memory.
                lq = sample.lq and replace(sample.lq, data=b"")
                packed.append(replace(sample, gt=replace(sample.gt, data=b""), lq=lq))
        file.flush()
        os.fsync(file.fileno())

    members_of = _members(temporary)
    rows: list[Row] = [
        (s.key, _row(s.gt, "gt", members_of[s.key]), _row(s.lq, "lq", members_of[s.key])) for s in packed
    ]
    index = _index_text(members_of)
    write_whole(path.with_suffix(".idx"), index)
    record = ShardRecord(path.name, temporary.stat().st_size, file_sha256(temporary), len(rows), _sha256(index))
    os.replace(temporary, path)
    return record, rows


def write_manifest(
    folder: Path,
    settings: Mapping[str, Any],
    shards: Iterable[tuple[ShardRecord, list[Row]]],
    skipped: Iterable[Mapping[str, str]] = (),
) -> None:
    """Write samples.npy and, last of all, manifest.json: with it the folder is a complete dataset.

    Args:
        folder: where the shards lie.
        settings: how they were made; at least ``scale`` (int) and ``channels`` (``rgb`` or ``gray``).
        shards: what `write_shard` returned, in order.
        skipped: pictures left out, each ``{"file", "reason"}``.
    """
    shards = list(shards)
    keys = [key.encode() for _, rows in shards for key, _, _ in rows]
    layout = [("key", f"S{max(map(len, keys))}"), ("shard", "<u4"), ("gt", _PICTURE), ("lq", _PICTURE)]
    table = np.array(
        [(key.encode(), shard, gt, lq) for shard, (_, rows) in enumerate(shards) for key, gt, lq in rows], layout
    )
    buffer = io.BytesIO()
    np.save(buffer, table)
    write_whole(folder / SAMPLES, buffer.getvalue())
    manifest = {
        "format": FORMAT,
        "settings": dict(settings),
        "count": len(keys),
        "shards": [asdict(record) for record, _ in shards],
        "samples": {"file": SAMPLES, "sha256": _sha256(buffer.getvalue())},
        "skipped": [dict(item) for item in skipped],
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())


class _Settings(BaseModel):
    scale: Annotated[int, Field(gt=0)]
    channels: Literal["rgb", "gray"]


class _Samples(BaseModel):
    sha256: str


class _Manifest(BaseModel):
    """What opening a folder relies on."""

    settings: _Settings
    count: Annotated[int, Field(gt=0)]
    shards: list[ShardRecord]
    samples: _Samples


class Shards:
    """A complete shard folder, opened for reading. Indices run over all samples, in the order they were packed.

    Cheap to pickle (path and manifest), safe to use from several threads.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], fingerprint: str) -> None:
        """Map a folder that `open` has checked; use `open`."""
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = fingerprint
        """Checksum of the manifest, hence of every byte of the dataset."""
        self._samples = np.load(folder / SAMPLES, mmap_mode="r").view(np.ndarray)
        # A bound on open files: a data set may have more shards than a process may hold files.
        self._map = functools.lru_cache(maxsize=512)(self._open_map)

    @classmethod
    def open(cls, folder: str | Path) -> Shards:
        """Open a shard folder and compare it with its manifest: names, sizes, and checksums of the index files.

        Raises:
            UserError: naming the file that is missing, cut off or of another dataset.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected shards written by python -m mambair_ds.prepare")
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{path}: missing; the folder is {'incomplete or ' if any(folder.iterdir()) else 'empty, '}"
                "not a shard folder. Expected the output of a finished python -m mambair_ds.prepare"
            )
        text = path.read_bytes()
        try:
            manifest = json.loads(text)
            found = manifest["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}: not a shard manifest; expected JSON with "format": "{FORMAT}"') from error
        if found != FORMAT:
            raise UserError(f"{path}: format {found!r}, expected {FORMAT!r}; prepare the shards again")
        try:
            _Manifest.model_validate(manifest)
        except ValidationError as error:
            wrong = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
            raise UserError(f"{path}: damaged: {wrong} is missing or wrong; prepare the shards again") from error

        for shard in manifest["shards"]:
            tar = folder / shard["file"]
            size = tar.stat().st_size if tar.is_file() else None
            if size is None:
                raise UserError(f"{tar}: missing; the manifest lists it with {shard['size']} bytes")
            if size != shard["size"]:
                raise UserError(f"{tar}: has {size} bytes, expected {shard['size']}; it is cut off or was replaced")
            _check_sha256(tar.with_suffix(".idx"), shard["index_sha256"])
        _check_sha256(folder / SAMPLES, manifest["samples"]["sha256"])
        opened = cls(folder, manifest, _sha256(text))
        if not len(opened) == manifest["count"] == sum(shard["count"] for shard in manifest["shards"]):
            raise UserError(
                f"{path}: counts {manifest['count']} samples, {SAMPLES} has {len(opened)}; prepare it again"
            )
        return opened

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder, self.manifest, self.fingerprint)

    def verify(self) -> None:
        """Read every tar and compare its checksum.

        Raises:
            UserError: naming the first file whose bytes changed.
        """
        for shard in self.manifest["shards"]:
            _check_sha256(self.folder / shard["file"], shard["sha256"])

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def settings(self) -> Mapping[str, Any]:
        """How the dataset was made."""
        return self.manifest["settings"]

    @property
    def scale(self) -> int:
        """GT size over LQ size; 1 where there is no LQ."""
        return self.settings["scale"]

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey; the same for all pictures."""
        return 1 if self.settings["channels"] == "gray" else 3

    @functools.cached_property
    def has_lq(self) -> bool:
        """Whether every sample has an LQ picture."""
        return bool((self._samples["lq"]["encoding"] != 0).all())

    def key(self, i: int) -> str:
        """Name of a sample."""
        return bytes(self._samples["key"][i]).decode()

    def shape(self, i: int, which: Which) -> tuple[int, int, int]:
        """(height, width, channels) of a picture."""
        row = self._row(i, which)
        return int(row["height"]), int(row["width"]), int(row["channels"])

    def shapes(self, which: Which) -> np.ndarray:
        """Heights and widths of all pictures: (len, 2) uint32."""
        rows = self._samples[which]
        return np.stack([rows["height"], rows["width"]], axis=1)

    def encoding(self, i: int, which: Which) -> str:
        """How a picture is stored: raw, png or jpg."""
        return ENCODINGS[self._row(i, which)["encoding"]]

    def bytes(self, i: int, which: Which) -> bytes:
        """The stored file (TIFF, PNG or JPEG) of a picture."""
        row = self._row(i, which)
        start = int(row["offset"])
        return self._map(int(self._samples["shard"][i]))[start : start + int(row["size"])]

    def crop(self, i: int, which: Which, y: int, x: int, h: int, w: int) -> np.ndarray:
        """Copy a region: uint8 (h, w, channels). Raw pictures are read from the map, others are decoded whole.

        Raises:
            ValueError: if the region does not lie inside the picture.
        """
        height, width, _ = self.shape(i, which)
        if min(y, x) < 0 or not (0 < h <= height - y and 0 < w <= width - x):
            raise ValueError(f"crop {h}x{w} at ({y}, {x}) leaves {self.key(i)}.{which} of {height}x{width}")
        return self._pixels(i, which)[y : y + h, x : x + w].copy()

    def picture(self, i: int, which: Which) -> np.ndarray:
        """A whole picture: uint8 (height, width, channels)."""
        return self._pixels(i, which).copy()

    def _row(self, i: int, which: Which) -> Any:
        row = self._samples[which][i]
        if row["encoding"] == 0:
            raise ValueError(f"{self.folder}: sample {self.key(i)} has no {which}")
        return row

    def _pixels(self, i: int, which: Which) -> np.ndarray:
        row = self._row(i, which)
        shape = self.shape(i, which)
        if ENCODINGS[row["encoding"]] == "raw":
            buffer = self._map(int(self._samples["shard"][i]))
            return np.ndarray(shape, np.uint8, buffer, int(row["pixels"]))
        with Image.open(io.BytesIO(self.bytes(i, which))) as image:
            return np.asarray(image).reshape(shape)

    def _open_map(self, number: int) -> mmap.mmap:
        with open(self.folder / self.manifest["shards"][number]["file"], "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def file_sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing; the manifest lists it")
    if file_sha256(path) != expected:
        raise UserError(f"{path}: does not match its checksum in {MANIFEST}; changed, or of another dataset")


def _members(path: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The tar's members by key and ending, in file order."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            members.setdefault(key, {})[suffix] = member
    return members


def _index_text(members: Mapping[str, Mapping[str, tarfile.TarInfo]]) -> bytes:
    """DALI's index: a line a sample, four words a component (ending, offset and size of the data, name)."""
    lines = [f"v1.2 {len(members)}"]
    for components in members.values():
        lines.append(" ".join(f"{suffix} {m.offset_data} {m.size} {m.name}" for suffix, m in components.items()))
    return ("\n".join(lines) + "\n").encode()


def _row(picture: StoredPicture | None, which: Which, members: Mapping[str, tarfile.TarInfo]) -> tuple[int, ...]:
    if picture is None:
        return _NO_PICTURE
    member = members[f"{which}.{picture.suffix}"]
    pixels = member.offset_data + picture.pixels if picture.encoding == "raw" else 0
    return (member.offset_data, member.size, pixels, *picture.shape, ENCODINGS.index(picture.encoding))
