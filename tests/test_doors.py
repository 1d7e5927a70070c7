"""Whatever comes in, a door answers with one message: random settings, and random bytes in every file it reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mambair_ds.config import RunConfig, UserError, load_config, parse_yaml
from mambair_ds.data.pictures import PictureError, read_picture
from mambair_ds.data.shards import MANIFEST, Sample, Shards, store_picture, write_manifest, write_shard

VALID = """
name: tiny
network: {type: MambaIRv2Light, upscale: 2, embed_dim: 8, d_state: 4, depths: [1], num_heads: [2], inner_rank: 4,
          num_tokens: 8, mlp_ratio: 1.0, upsampler: pixelshuffledirect}
task: {kind: sr}
data: {train: {shards: [pictures], gt_size: 32, batch_size: 2}, val: {sets: {Set5: {gt: set5}}}}
train:
  total_iter: 10
  optim: {lr: 2e-4}
  scheduler: {type: MultiStepLR, milestones: [5]}
  pixel_loss: {type: L1Loss}
"""
quick = settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every setting and group of a configuration."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*path, key), *leaves(value, (*path, key)))]


LEAVES = leaves(parse_yaml(VALID))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(scalars, v, max_size=3), max_leaves=5
)


def answer(path: Path, overrides: list[str]) -> RunConfig | str:
    """The run that was read, or the message; anything else is an error of ours."""
    try:
        return load_config(path, overrides)
    except UserError as error:
        return str(error)


@quick
@given(where=st.sampled_from(LEAVES), value=values)
def test_a_config_with_a_random_value_is_read_or_answered_with_its_key(
    tmp_path: Path, where: tuple[Any, ...], value: Any
) -> None:
    tree = parse_yaml(VALID)
    node = tree
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    read = answer(path, [])
    if isinstance(read, str):
        assert str(path) in read
        assert any(str(key) in read for key in where)
    else:
        again = tmp_path / "again.yml"
        again.write_text(yaml.safe_dump(read.model_dump(mode="json")))
        assert load_config(again) == read


@quick
@given(text=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_random_bytes_as_a_config_get_a_message(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "run.yml"
    path.write_bytes(text)
    said = answer(path, [])
    assert isinstance(said, str) and str(path) in said


@quick
@given(
    key=st.sampled_from([".".join(map(str, leaf)) for leaf in LEAVES]) | st.text(max_size=12),
    value=st.text(max_size=12) | values.map(lambda v: json.dumps(v, default=str)),
)
def test_a_random_override_is_read_or_answered(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "run.yml"
    path.write_text(VALID)
    read = answer(path, [f"{key}={value}"])
    assert isinstance(read, RunConfig) or read


@quick
@given(text=st.binary(max_size=200), suffix=st.sampled_from(["png", "jpg", "tif", "webp", "bmp", "ppm"]))
def test_random_bytes_as_a_picture_get_a_reason(tmp_path: Path, text: bytes, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(text)
    refused_or_uint8(path)


def refused_or_uint8(path: Path) -> None:
    try:
        assert read_picture(path, "rgb").pixels.dtype == np.uint8
    except PictureError as error:
        assert str(error)


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """A file cut off, or with a few bytes changed."""
    if data.draw(st.booleans()):
        return whole[: data.draw(st.integers(0, len(whole) - 1))]
    changed = bytearray(whole)
    for place in data.draw(st.sets(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        changed[place] ^= data.draw(st.integers(1, 255))
    return bytes(changed)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_damaged_pictures_get_a_reason(tmp_path: Path, suffix: str) -> None:
    import cv2

    picture = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    whole = cv2.imencode(f".{suffix}", picture)[1].tobytes()

    @quick
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(damaged(data, whole))
        refused_or_uint8(path)

    check()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    samples = [Sample(f"p{i}", store_picture(picture, "tif"), None, {}) for i in range(2)]
    write_manifest(folder, {"scale": 1, "channels": "rgb"}, [write_shard(folder, 0, samples)])
    return folder


def refused(read: Callable[[], object], name: Path) -> bool:
    try:
        read()
    except UserError as error:
        assert str(name) in str(error)
        return True
    return False


@pytest.mark.parametrize("name", ["manifest.json", "samples.npy", "000000.idx", "000000.tar"])
def test_a_damaged_file_of_a_shard_folder_is_named(shards: Path, name: str) -> None:
    file, whole = shards / name, (shards / name).read_bytes()

    @quick
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        file.write_bytes(damaged(data, whole))

        def read() -> None:
            opened = Shards.open(shards)
            opened.verify()
            assert opened.scale and opened.channels and opened.picture(1, "gt").size

        # A manifest says itself what it is; every other file has its checksum there.
        assert refused(read, shards) or name == MANIFEST

    check()


@quick
@given(
    manifest=st.dictionaries(st.sampled_from(["format", "settings", "count", "shards", "samples", "skipped"]), values)
)
def test_a_manifest_of_random_content_is_refused(tmp_path: Path, manifest: dict[str, Any]) -> None:
    folder = tmp_path / "s"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps({"format": "mambair_ds.shards/1"} | manifest, default=str))
    assert refused(lambda: Shards.open(folder), folder / MANIFEST)


@quick
@given(data=st.data())
def test_a_checkpoint_of_random_content_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    from mambair_ds.training.checkpoint import newest, read

    folder = tmp_path / "checkpoints/0000001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.pt").write_bytes(b"weights")
    record = {"size": 7, "sha256": "0" * 64}
    whole = {"format": "mambair_ds.checkpoint/3", "iteration": 1, "world_size": 1, "batch": 1, "seed": 0, "stream": ""}
    whole |= {"config": {}, "files": {"weights.pt": record}}
    manifest = data.draw(st.just(whole) | values)
    if isinstance(manifest, dict):
        manifest = whole | data.draw(st.dictionaries(st.sampled_from(["format", "iteration", "files"]), values))
    text = json.dumps(manifest, default=str).encode()
    (folder / "manifest.json").write_bytes(data.draw(st.just(text) | st.just(damaged(data, text))))
    refused(lambda: read(folder, checksums=True), folder)
    newest(folder.parent)


@quick
@given(data=st.data())
def test_random_bytes_as_weights_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    from mambair_ds.weights import read_weights

    path = tmp_path / data.draw(st.sampled_from(["x.pth", "x.safetensors"]))
    path.write_bytes(data.draw(st.binary(max_size=100)))
    assert refused(lambda: read_weights(path), path)
