"""LQ made from GT while training: bicubic by the MATLAB rule, and the second-order chain."""

import numpy as np
import pytest
import torch
from shard_folders import photographs, write_folder

from mambair_ds.config import DegradationConfig, DegradationStage, TaskConfig, TrainDataConfig, UserError
from mambair_ds.data.degradations import resize_uint8
from mambair_ds.data.pipeline import TrainStream
from mambair_ds.data.real_world import _sinc, degrade, sample_generator

SECOND = TaskConfig.model_validate({"kind": "sr", "degradation": {"type": "second_order"}})
BICUBIC = TaskConfig.model_validate({"kind": "sr", "degradation": {"type": "bicubic"}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("gt") / "shards", photographs(), scale=1)


def take(folder, task, count=3, **place):
    data = TrainDataConfig.model_validate({"shards": [str(folder)], "gt_size": 32, "batch_size": 2})
    defaults = {"rank": 0, "world_size": 1, "batch_size": 2, "position": 0, "scale": 4}
    stream = TrainStream(data, task, seed=5, device="cpu", **(defaults | place))
    batches = [stream.next() for _ in range(count)]
    stream.close()
    return {int(p): (lq, gt) for b in batches for p, lq, gt in zip(b.positions, b.lq, b.gt, strict=True)}


def test_bicubic_is_matlabs_of_the_crop(folder):
    for lq, gt in take(folder, BICUBIC).values():
        assert lq.shape == (8, 8, 3)
        # The crop is turned after it was made, and MATLAB's rule turns with it.
        difference = lq.numpy().astype(int) - resize_uint8(gt.numpy(), 0.25).astype(int)
        assert np.abs(difference).max() <= 1


def test_samples_are_those_of_their_position_on_any_ranks_and_after_a_restart(folder):
    whole = take(folder, SECOND, 4)
    shared = take(folder, SECOND, 2, rank=0, world_size=2) | take(folder, SECOND, 2, rank=1, world_size=2)
    later = take(folder, SECOND, 2, position=4)
    assert whole.keys() == shared.keys()
    for position, (lq, gt) in whole.items():
        assert lq.shape == (8, 8, 3) and lq.dtype == torch.uint8
        assert torch.equal(lq, shared[position][0]) and torch.equal(gt, shared[position][1])
        if position in later:
            assert torch.equal(lq, later[position][0])
    assert len({lq.numpy().tobytes() for lq, _ in whole.values()}) == len(whole)


def test_the_chain_degrades_within_reason():
    from skimage import data

    gt = data.chelsea()[40:168, 100:228]
    config = DegradationConfig(type="second_order")
    values = [degrade(gt, 4, config, sample_generator(0, i)).astype(float) for i in range(24)]
    clean = resize_uint8(gt, 0.25).astype(float)
    errors = [np.abs(value - clean).mean() for value in values]
    assert 2 < np.mean(errors) < 40 and max(errors) < 80
    assert np.mean(np.mean(values, axis=0) - clean) == pytest.approx(0, abs=6)  # no drift of brightness
    grey = degrade(gt[..., :1], 2, config, sample_generator(0, 0))
    assert grey.shape == (64, 64, 1)


def test_a_chain_of_nothing_is_a_resize():
    quiet = DegradationStage(
        blur_prob=0, resize_prob=(0, 0, 1), gaussian_noise_prob=1, noise_range=(0, 0), jpeg_range=(100, 100)
    )
    config = DegradationConfig(type="second_order", first=quiet, second=quiet, final_sinc_prob=0)
    gt = np.full((32, 32, 3), 90, np.uint8)
    assert np.abs(degrade(gt, 2, config, sample_generator(1, 2)).astype(int) - 90).max() <= 2


def test_sinc_filters_pass_what_is_slow_and_stop_what_is_fast():
    kernel = _sinc(21, np.random.default_rng(3))
    response = np.abs(np.fft.fft2(kernel, (64, 64)))
    assert response[0, 0] == pytest.approx(1) and response[32, 32] < 0.2


def test_shards_without_lq_need_a_degradation(folder):
    with pytest.raises(UserError, match=r"task\.degradation"):
        take(folder, TaskConfig(kind="sr"))


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"kernel_prob": [1, 1, 0, 0, 0, 0]}, "sums to 2"),
        ({"noise_range": [5, 1]}, "is no range"),
        ({"blur_prob": 2}, "less"),
    ],
)
def test_impossible_stages_are_refused(stage, words):
    with pytest.raises(ValueError, match=words):
        DegradationStage.model_validate(stage)
