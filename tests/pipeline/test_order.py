"""The order of samples: permutations, folders' shares, crops, and independence of the number of ranks."""

from collections import Counter
from math import factorial

import numpy as np
import pytest

from mambair_ds.data.order import Order, anchor, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1023, 1025, 3450])
def test_permute_is_a_permutation(size):
    for turn in (0, 1, 2**40):
        assert sorted(permute(np.arange(size), size, 7, 3, turn)) == list(range(size))


def test_permute_reaches_billions():
    images = permute(np.arange(1000) * 1_000_003, 3_000_000_019, 7, 3, 0)
    assert len(set(images)) == 1000
    assert 0 <= images.min() < images.max() < 3_000_000_019
    assert abs(images.mean() / 1.5e9 - 1) < 0.1


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(size):
    orders, turns = factorial(size), 200 * factorial(size)
    images = permute(np.tile(np.arange(size), turns), size, 7, 3, np.repeat(np.arange(turns), size))
    counts = np.array(list(Counter(map(tuple, images.reshape(turns, size))).values()))
    assert len(counts) == orders
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert chi_squared < orders - 1 + 5 * np.sqrt(2 * orders)


def test_permutations_differ_by_seed_stream_and_turn():
    images = [
        permute(np.arange(1000), 1000, *key) for key in [(1, 1, 1), (2, 1, 1), (2**32 + 1, 1, 1), (1, 2, 1), (1, 1, 2)]
    ]
    for i, a in enumerate(images):
        for b in images[:i]:
            assert (a == b).sum() < 10


def test_permute_mixes_per_element_arguments():
    index, size, stream, turn = np.array([[5, 10, 1, 0], [5, 1000, 2, 3], [9, 10, 1, 4]]).T
    together = permute(index, size, 7, stream, turn)
    assert together.tolist() == [permute(index[i : i + 1], size[i], 7, stream[i], turn[i])[0] for i in range(3)]


def test_every_picture_once_an_epoch():
    order = Order([37], [1.0], seed=5)
    assert order.epoch_size == 37
    epochs = order.samples(np.arange(37 * 3)).picture.reshape(3, 37)
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


def test_weights_are_exactly_balanced_and_mixed():
    counts, weights = [20, 9, 40], [1.0, 3.0, 0.25]
    order = Order(counts, weights, seed=5)
    assert order.epoch_size == 20 + 27 + 10
    samples = order.samples(np.arange(order.epoch_size * 8))
    assert (samples.epoch == np.repeat(np.arange(8), order.epoch_size)).all()
    for epoch in range(8):
        assert np.bincount(samples.folder[samples.epoch == epoch]).tolist() == [20, 27, 10]
    for folder, times in enumerate([8, 24, 2]):
        assert np.bincount(samples.picture[samples.folder == folder]).tolist() == [times] * counts[folder]
    # Shuffled together: the folders do not come one after the other.
    assert np.count_nonzero(np.diff(samples.folder)) > 200


def test_a_tiny_weight_still_takes_a_picture():
    order = Order([3, 1000], [0.01, 1.0], seed=5)
    assert order.epoch_size == 1001
    samples = order.samples(np.arange(3 * 1001))
    assert sorted(samples.picture[samples.folder == 0]) == [0, 1, 2]


def test_a_sample_depends_on_seed_and_position_only():
    order = Order([37, 11], [1.0, 2.5], seed=5)
    positions = np.array([2**40 + 17, 3, 1000, 3])
    together = order.samples(positions)
    for i, position in enumerate(positions):
        alone = order.samples(np.array([position]))
        assert together[i : i + 1] == alone
    other = Order([37, 11], [1.0, 2.5], seed=6).samples(np.arange(500))
    assert (other.picture == order.samples(np.arange(500)).picture).mean() < 0.2


def test_crops_and_flips_are_uniform_and_independent():
    samples = Order([37], [1.0], seed=5).samples(np.arange(40_000))
    rows, columns = anchor(samples.row, 5), anchor(samples.column, 5)
    table = np.zeros((5, 5, 2, 2, 2))
    flips = [flip.astype(int) for flip in (samples.hflip, samples.vflip, samples.transpose)]
    np.add.at(table, (rows, columns, *flips), 1)
    chi_squared = ((table - 200) ** 2 / 200).sum()
    assert abs(chi_squared - 199) < 5 * np.sqrt(2 * 199)


def test_anchor_covers_the_range():
    assert anchor([0, 2**32 - 1], 7).tolist() == [0, 6]
    assert anchor([0, 2**31, 2**32 - 1], [1, 1, 1]).tolist() == [0, 0, 0]
    assert anchor(2**32 - 1, 2**31 - 1) == 2**31 - 2
