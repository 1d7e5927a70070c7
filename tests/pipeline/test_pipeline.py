"""The training stream: bit for bit what numpy computes from shards and order, whatever the ranks and the resumes."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_folders import gray, photographs, write_folder

from mambair_ds.config import NetworkConfig, ShardFolderConfig, TaskConfig, TrainDataConfig, UserError
from mambair_ds.data.degradations import jpeg_roundtrip
from mambair_ds.data.order import Order, anchor
from mambair_ds.data.pipeline import TrainStream, check_train_data
from mambair_ds.data.shards import Shards
from mambair_ds.kernels.philox import DEGRADATION_STREAM, NoiseKey, normal

SR = TaskConfig(kind="sr")
GT_SIZE, BATCH, SEED = 48, 4, 2**40 + 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    colored = photographs()
    grey = {key: gray(picture) for key, picture in colored.items()}
    return {
        "raw": write_folder(root / "raw", colored),
        "png": write_folder(root / "png", colored, form="png"),
        "gt only": write_folder(root / "gt", colored, scale=1),
        "gt only, png": write_folder(root / "gtpng", colored, scale=1, form="png"),
        "grey": write_folder(root / "grey", grey, scale=1),
        "grey, png": write_folder(root / "greypng", grey, scale=1, form="png"),
        "x4": write_folder(root / "x4", colored, scale=4),
    }


def data_config(*paths, gt_size=GT_SIZE, **options):
    folders = [p if isinstance(p, ShardFolderConfig) else ShardFolderConfig(path=p) for p in paths]
    return TrainDataConfig(shards=folders, gt_size=gt_size, batch_size=BATCH, **options)


def stream(*paths, task=SR, rank=0, world_size=1, batch_size=BATCH, position=0, **options):
    data = data_config(*paths, **options)
    place = {"rank": rank, "world_size": world_size, "batch_size": batch_size, "position": position}
    return TrainStream(data, task, seed=SEED, device="cpu", **place)


def take(stream, count):
    batches = [stream.next() for _ in range(count)]
    stream.close()
    return batches


def samples_by_position(batches):
    """Position -> (lq, gt) of every sample."""
    return {
        int(p): (lq, gt)
        for batch in batches
        for p, lq, gt in zip(batch.positions, batch.lq.numpy(), batch.gt.numpy(), strict=True)
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for position in a:
        for mine, other in zip(a[position], b[position], strict=True):
            np.testing.assert_array_equal(mine, other)


def recompute(paths, weights, task, positions):
    """Position -> (lq, gt) by whole pictures, degraded before they are cropped, as published."""
    folders = [Shards.open(path) for path in paths]
    samples = Order([len(f) for f in folders], weights, SEED).samples(np.array(positions))
    scale = folders[0].scale if task.kind == "sr" else 1
    result = {}
    for i, position in enumerate(positions):
        shards, picture = folders[samples.folder[i]], samples.picture[i]
        gt = shards.picture(picture, "gt")
        lq = shards.picture(picture, "lq") if task.kind == "sr" else gt
        if task.kind == "jpeg":
            lq = jpeg_roundtrip(gt, task.quality)
        size = GT_SIZE // scale
        y = int(anchor(samples.row[i], lq.shape[0] - size + 1))
        x = int(anchor(samples.column[i], lq.shape[1] - size + 1))
        pair = []
        for image, factor in ((lq, 1), (gt, scale)):
            crop = image[y * factor : (y + size) * factor, x * factor : (x + size) * factor]
            crop = crop[:, ::-1] if samples.hflip[i] else crop
            crop = crop[::-1] if samples.vflip[i] else crop
            pair.append(crop.transpose(1, 0, 2) if samples.transpose[i] else crop)
        if task.kind == "denoise":
            noise = normal(NoiseKey(SEED, torch.tensor([position])), DEGRADATION_STREAM, (1, *pair[0].shape), "cpu")
            pair[0] = pair[0].astype(np.float32) / np.float32(255) + noise[0].numpy() * np.float32(task.sigma / 255)
        result[position] = tuple(pair)
    return result


@pytest.mark.parametrize(
    ("names", "weights", "task"),
    [
        (["raw"], [1], SR),
        (["png"], [1], SR),
        (["x4"], [1], SR),
        (["raw", "png"], [0.6, 2], SR),
        (["gt only"], [1], TaskConfig(kind="denoise", sigma=25)),
        (["gt only, png"], [1], TaskConfig(kind="denoise", sigma=15)),
        (["grey"], [1], TaskConfig(kind="denoise", sigma=50)),
        (["gt only"], [1], TaskConfig(kind="jpeg", quality=10)),
        (["gt only, png"], [1], TaskConfig(kind="jpeg", quality=40)),
        (["grey"], [1], TaskConfig(kind="jpeg", quality=10)),
        (["grey, png"], [1], TaskConfig(kind="jpeg", quality=30)),
        (["raw"], [1], TaskConfig(kind="jpeg", quality=30)),
    ],
    ids=str,
)
def test_samples_equal_numpy(folders, names, weights, task):
    paths = [folders[name] for name in names]
    shares = [ShardFolderConfig(path=p, weight=w) for p, w in zip(paths, weights, strict=True)]
    batches = take(stream(*shares, task=task), 12)
    for batch in batches:
        assert batch.gt.dtype == torch.uint8
        assert batch.lq.dtype == (torch.float32 if task.kind == "denoise" else torch.uint8)
        assert batch.positions.dtype == torch.int64
    assert_same(samples_by_position(batches), recompute(paths, weights, task, range(12 * BATCH)))


def test_crops_reach_the_corners_of_a_jpeg_picture(tmp_path):
    """Where the coding units are cut off by the picture's edge, too."""
    picture = photographs()["chelsea"][: GT_SIZE + 5, : GT_SIZE + 7]
    task = TaskConfig(kind="jpeg", quality=20)
    for name, image in (("color", picture), ("grey", gray(picture))):
        path = write_folder(tmp_path / name, {"corner": image}, scale=1)
        batches = take(stream(path, task=task), 20)
        assert_same(samples_by_position(batches), recompute([path], [1], task, range(20 * BATCH)))


def test_noise_has_the_published_strength(folders):
    batches = take(stream(folders["gt only"], task=TaskConfig(kind="denoise", sigma=50)), 10)
    noise = torch.cat([lq - gt for lq, gt in (batch.to_float() for batch in batches)])
    assert abs(noise.mean()) < 0.002
    assert abs(noise.std() * 255 - 50) < 0.3
    assert max(batch.lq.max() for batch in batches) > 1.2  # not clipped


def test_to_float_is_numpys_division(folders):
    [batch] = take(stream(folders["raw"]), 1)
    lq, gt = batch.to_float()
    assert lq.shape == (BATCH, 3, GT_SIZE // 2, GT_SIZE // 2)
    assert gt.is_contiguous(memory_format=torch.channels_last)
    expected = batch.gt.numpy().transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(gt.numpy(), expected)


@pytest.mark.parametrize("options", [{"use_hflip": False}, {"use_rot": False}, {"use_hflip": False, "use_rot": False}])
def test_flips_can_be_turned_off(tmp_path, options):
    ramp = np.arange(GT_SIZE, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp, np.uint8(0)), axis=2)
    batches = take(stream(write_folder(tmp_path / "ramp", {"ramp": picture}), **options), 20)
    orientations = {gt[:2, :2, :2].tobytes() for batch in batches for gt in batch.gt.numpy()}
    plain = picture[:2, :2, :2].tobytes()
    assert plain in orientations
    assert len(orientations) == (1 if len(options) == 2 else 4 if "use_hflip" in options else 2)


@pytest.mark.parametrize("task", [SR, TaskConfig(kind="denoise", sigma=25)], ids=str)
def test_resume_is_exact(folders, task):
    name = "raw" if task.kind == "sr" else "gt only"
    whole = stream(folders[name], task=task)
    first = take(whole, 7)
    assert whole.position == 7 * BATCH
    second = take(stream(folders[name], task=task, position=3 * BATCH), 4)
    assert_same(samples_by_position(second), samples_by_position(first[3:]))


@pytest.mark.parametrize("task", [SR, TaskConfig(kind="denoise", sigma=25)], ids=str)
def test_any_number_of_ranks_sees_the_same_stream(folders, task):
    """Two ranks, then three from where they stopped: together one rank's stream, nothing twice, nothing left out."""
    name = "raw" if task.kind == "sr" else "gt only"
    together = []
    for rank in range(2):
        part = stream(folders[name], task=task, rank=rank, world_size=2)
        together += take(part, 2)
        assert part.position == 2 * 2 * BATCH
    for rank in range(3):
        batches = take(stream(folders[name], task=task, rank=rank, world_size=3, batch_size=2, position=16), 3)
        assert all((batch.positions % 3 == rank).all() for batch in batches)
        together += batches
    assert sum(len(batch.positions) for batch in together) == 34
    assert_same(samples_by_position(together), recompute([folders[name]], [1], task, range(34)))


def test_threads_do_not_matter(folders):
    one, four = (take(stream(folders["png"], threads=threads), 6) for threads in (1, 4))
    assert_same(samples_by_position(one), samples_by_position(four))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "task"), [("raw", SR), ("png", SR), ("grey", TaskConfig(kind="jpeg", quality=40))])
def test_a_gpu_gives_the_same_samples(folders, name, task):
    """JPEG is DALI's own on a GPU, close to the CPU library's; all else is the same bit for bit."""
    place = {"seed": SEED, "rank": 0, "world_size": 1, "batch_size": BATCH}
    streams = [TrainStream(data_config(folders[name]), task, device=device, **place) for device in ("cpu", "cuda")]
    for here, there in zip(*(take(stream, 8) for stream in streams), strict=True):
        assert there.gt.is_cuda and there.lq.is_cuda
        assert torch.equal(here.gt, there.gt.cpu())
        assert torch.equal(here.to_float()[1], there.to_float()[1].cpu())
        if task.kind == "sr":
            assert torch.equal(here.lq, there.lq.cpu())
        else:
            assert (here.lq.float() - there.lq.cpu().float()).abs().mean() < 1


def test_position_counts_consumed_batches(folders):
    a = stream(folders["raw"])
    assert (a.position, a.epoch, a.pictures, a.epoch_size) == (0, 0, 5, 5)
    a.next()
    a.next()
    assert (a.position, a.epoch) == (2 * BATCH, 1)
    a.close()


def network(upscale, in_chans=3):
    shape = {"embed_dim": 8, "d_state": 2, "depths": [1], "num_heads": [1], "inner_rank": 2, "num_tokens": 4}
    upsampler = "" if upscale == 1 else "pixelshuffledirect"
    return NetworkConfig(type="MambaIRv2", upscale=upscale, in_chans=in_chans, upsampler=upsampler, **shape)


def test_checksum_covers_what_decides_the_samples(folders):
    def checksum(data, task=SR):
        upscale = 4 if "x4" in str(data.shards[0].path) else 2 if task.kind == "sr" else 1
        return check_train_data(data, task, network(upscale))

    data = data_config(folders["raw"])
    checksums = [
        checksum(data),
        checksum(data_config(folders["x4"])),
        checksum(data_config(folders["raw"], gt_size=32)),
        checksum(data_config(folders["raw"], use_rot=False)),
        checksum(data_config(ShardFolderConfig(path=folders["raw"], weight=2))),
        checksum(data, TaskConfig(kind="denoise", sigma=15)),
        checksum(data, TaskConfig(kind="denoise", sigma=25)),
    ]
    assert len(set(checksums)) == len(checksums)
    assert checksum(data_config(folders["raw"], threads=4)) == checksums[0]


def test_closing_leaves_no_thread(folders):
    before = set(threading.enumerate())
    opened = stream(folders["raw"])
    opened.next()
    opened.close()
    opened.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(ValueError, match="closed"):
        opened.next()


def test_a_picture_smaller_than_a_crop(folders):
    with pytest.raises(UserError, match=r"gt_size is 140, but 1 of 5 pictures.* coins of 130x130"):
        stream(folders["raw"], gt_size=140)


def test_folders_that_do_not_fit(folders):
    with pytest.raises(UserError, match="without LQ"):
        stream(folders["gt only"])
    with pytest.raises(UserError, match=r"scale 4, but .* with 2"):
        stream(folders["raw"], folders["x4"])
    with pytest.raises(UserError, match="1 channels, but of 3"):
        stream(folders["gt only"], folders["grey"], task=TaskConfig(kind="jpeg", quality=10))
    with pytest.raises(UserError, match="no multiple of 4"):
        stream(folders["x4"], gt_size=50)


def test_shards_that_do_not_fit_the_network(folders):
    check_train_data(data_config(folders["raw"]), SR, network(2))
    with pytest.raises(UserError, match=r"scale 2, network\.upscale is 4"):
        check_train_data(data_config(folders["raw"]), SR, network(4))
    with pytest.raises(UserError, match=r"3 channels, network\.in_chans is 1"):
        check_train_data(data_config(folders["raw"]), TaskConfig(kind="jpeg", quality=10), network(1, in_chans=1))


def damage(shards, key, which, at):
    """Overwrite a few bytes of a stored picture, which leaves the sizes as they were."""
    i = next(i for i in range(len(shards)) if shards.key(i) == key)
    data = shards.bytes(i, which)
    for tar in shards.folder.glob("*.tar"):
        content = tar.read_bytes()
        if data in content:
            tar.write_bytes(content.replace(data, data[:at] + b"\xff\x00\xff\x00" * 4 + data[at + 16 :]))


@pytest.mark.parametrize("at", [1, 5000], ids=["header", "pixels"])
def test_an_undecodable_picture_is_named(tmp_path, at):
    path = write_folder(tmp_path / "broken", photographs(), form="png")
    damage(Shards.open(path), "chelsea", "gt", at)
    opened = stream(path)
    with pytest.raises(UserError, match=r"broken: sample chelsea: its gt cannot be decoded"):
        take(opened, 10)
    assert opened.position % BATCH == 0


def test_a_shard_lost_while_training_is_named(tmp_path):
    path = write_folder(tmp_path / "lost", photographs())
    opened = stream(path)
    for tar in path.glob("*.tar"):
        tar.unlink()
    with pytest.raises(UserError, match=r"lost: sample \w+: cannot read its gt"):
        take(opened, 10)
