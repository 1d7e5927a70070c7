"""Shard folders: what is written is read back, by us and others; a damaged folder is refused with its file named."""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mambair_ds.config import UserError
from mambair_ds.data.shards import Sample, Shards, file_sha256, store_picture, write_manifest, write_shard
from mambair_ds.data.tiff import encode_tiff


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).integers(0, 256, shape, dtype=np.uint8)


GT = [noise(40 + 2 * i, 50, 3) for i in range(5)]
LQ = [gt[::2, ::2].copy() for gt in GT]


def write(folder: Path, form: str = "tif", with_lq: bool = True) -> Path:
    folder.mkdir()
    samples = [
        Sample(f"pic{i}", store_picture(gt, form), store_picture(lq, form) if with_lq else None, {"n": i})
        for i, (gt, lq) in enumerate(zip(GT, LQ, strict=True))
    ]
    shards = [write_shard(folder, 0, samples[:3]), write_shard(folder, 1, samples[3:])]
    write_manifest(folder, {"scale": 2, "channels": "rgb"}, shards)
    return folder


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (16, 7, 3), (17, 5, 1), (33, 20, 3), (100, 31, 1)])
def test_tiff_opens_elsewhere_and_is_one_block(shape: tuple[int, int, int]) -> None:
    picture = noise(*shape)
    data, pixels = encode_tiff(picture)
    np.testing.assert_array_equal(np.ndarray(shape, np.uint8, data, pixels), picture)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))).reshape(shape), picture)
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(np.atleast_3d(read)[..., ::-1], picture)


def test_dali_decodes_the_tiff() -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    data, _ = encode_tiff(GT[0])

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode():  # type: ignore[no-untyped-def]
        encoded = fn.external_source(lambda: [np.frombuffer(data, np.uint8)])
        return fn.decoders.image(encoded), fn.decoders.image_slice(encoded, start=(3, 5), shape=(20, 16), axes=(0, 1))

    pipe = decode()
    pipe.build()
    whole, region = (output.at(0) for output in pipe.run())
    np.testing.assert_array_equal(whole, GT[0])
    np.testing.assert_array_equal(region, GT[0][3:23, 5:21])


@pytest.mark.parametrize("form", ["tif", "png"])
def test_round_trip(tmp_path: Path, form: str) -> None:
    shards = pickle.loads(pickle.dumps(Shards.open(write(tmp_path / "s", form))))
    shards.verify()
    assert (len(shards), shards.scale, shards.channels, shards.has_lq) == (5, 2, 3, True)
    np.testing.assert_array_equal(shards.shapes("lq"), [lq.shape[:2] for lq in LQ])
    for i, (gt, lq) in enumerate(zip(GT, LQ, strict=True)):
        assert shards.key(i) == f"pic{i}"
        assert shards.encoding(i, "gt") == ("raw" if form == "tif" else "png")
        assert shards.shape(i, "gt") == gt.shape
        np.testing.assert_array_equal(shards.picture(i, "gt"), gt)
        np.testing.assert_array_equal(shards.crop(i, "lq", 3, 4, 5, 6), lq[3:8, 4:10])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shards.bytes(i, "lq")))), lq)


def test_crops_outside_are_refused(tmp_path: Path) -> None:
    shards = Shards.open(write(tmp_path / "s"))
    shards.crop(0, "gt", 39, 49, 1, 1)
    for region in [(-1, 0, 4, 4), (0, 47, 4, 4), (37, 0, 4, 4), (0, 0, 0, 4)]:
        with pytest.raises(ValueError, match=r"leaves pic0\.gt of 40x50"):
            shards.crop(0, "gt", *region)


def test_gt_alone(tmp_path: Path) -> None:
    shards = Shards.open(write(tmp_path / "s", with_lq=False))
    assert not shards.has_lq
    np.testing.assert_array_equal(shards.picture(4, "gt"), GT[4])
    with pytest.raises(ValueError, match="pic4 has no lq"):
        shards.picture(4, "lq")


def test_webdataset_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = write(tmp_path / "s")
    samples = list(webdataset.WebDataset(str(folder / "000001.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["pic3", "pic4"]
    assert json.loads(samples[0]["json"]) == {"n": 3}
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(samples[0]["gt.tif"]))), GT[3])


def test_index_points_at_the_members(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    head, *lines = (folder / "000000.idx").read_text().splitlines()
    assert head == "v1.2 3" and len(lines) == 3
    with tarfile.open(folder / "000000.tar") as tar:
        for key, line in zip(["pic0", "pic1", "pic2"], lines, strict=True):
            words = iter(line.split())
            components = list(zip(words, words, words, words, strict=True))
            assert [component[0] for component in components] == ["gt.tif", "json", "lq.tif"]
            for suffix, offset, size, name in components:
                member = tar.getmember(name)
                assert name == f"{key}.{suffix}"
                assert (int(offset), int(size)) == (member.offset_data, member.size)


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert {p.name: file_sha256(p) for p in first.iterdir()} == {p.name: file_sha256(p) for p in second.iterdir()}
    assert Shards.open(first).fingerprint == Shards.open(second).fingerprint


def truncate(folder: Path) -> None:
    with open(folder / "000001.tar", "r+b") as file:
        file.truncate(5000)


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return damage


def flip_sample(folder: Path) -> None:
    data = bytearray((folder / "samples.npy").read_bytes())
    data[-3] ^= 1
    (folder / "samples.npy").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"000001\.tar: has 5000 bytes, expected \d+"),
        (lambda folder: (folder / "000000.tar").unlink(), r"000000\.tar: missing"),
        (edit("000000.idx", "512", "1024"), r"000000\.idx: does not match"),
        (lambda folder: shutil.copy(folder / "000001.idx", folder / "000000.idx"), r"000000\.idx: does not match"),
        (lambda folder: (folder / "000000.idx").unlink(), r"000000\.idx: missing"),
        (flip_sample, r"samples\.npy: does not match"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: missing.*incomplete"),
        (edit("manifest.json", "shards/1", "shards/9"), r"manifest\.json: format 'mambair_ds.shards/9', expected"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: not a shard manifest"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write(tmp_path / "s")
    damage(folder)
    with pytest.raises(UserError, match=message):
        Shards.open(folder)


def test_no_shards_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Shards.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="empty"):
        Shards.open(tmp_path)


def test_verify_finds_a_changed_pixel(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    data = bytearray((folder / "000001.tar").read_bytes())
    data[3000] ^= 1
    (folder / "000001.tar").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"000001\.tar: does not match"):
        Shards.open(folder).verify()
