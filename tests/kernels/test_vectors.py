"""Vectors of sixteen float32 numbers in compiled functions: the same numbers as numpy's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mambair_ds.kernels.cpu import exp2, jit
from mambair_ds.kernels.vectors import LANES, largest, load, power_of_two, prefetch, spread, store, total, totals

rng = np.random.default_rng(7)
A, B = rng.standard_normal((2, 3, 2 * LANES)).astype(np.float32)
TWO = np.float32(2)


def test_numbers_come_from_where_the_index_says_and_go_there() -> None:
    @jit
    def move(source: Any, target: Any) -> None:
        prefetch(source, (1, 5))
        store(target, (np.int32(0), 3), load(source, (1, 5)))
        store(target[2], 0, load(source[2], LANES))

    target = np.zeros_like(A)
    move(A, target)
    assert np.array_equal(target[0, 3 : 3 + LANES], A[1, 5 : 5 + LANES])
    assert np.array_equal(target[2, :LANES], A[2, LANES:])
    assert np.count_nonzero(target) == 2 * LANES


@pytest.mark.parametrize(
    "formula",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: TWO - a,
        lambda a, b: b * TWO,
    ],
)
def test_arithmetic_is_numpys(formula: Callable[[Any, Any], Any]) -> None:
    inner = jit(formula)

    @jit
    def compute(a: Any, b: Any, target: Any) -> None:
        store(target, 0, inner(load(a, (0, 0)), load(b, (0, 0))))

    target = np.empty(LANES, np.float32)
    compute(A, B, target)
    assert np.array_equal(target, formula(A[0, :LANES], B[0, :LANES]))


def test_a_product_and_its_sum_are_rounded_once() -> None:
    @jit
    def compute(a: Any, b: Any, target: Any) -> None:
        store(target, 0, load(a, (0, 0)) * load(b, (0, 0)) + load(a, (1, 0)))

    target = np.empty(LANES, np.float32)
    compute(A, B, target)
    a, b, c = (x.astype(np.float64) for x in (A[0, :LANES], B[0, :LANES], A[1, :LANES]))
    assert np.array_equal(target, (a * b + c).astype(np.float32))


def test_smaller_and_larger_leave_what_is_no_number_on_the_left() -> None:
    @jit
    def compute(a: Any, target: Any) -> None:
        store(target, (0, 0), max(load(a, 0), np.float32(0)))
        store(target, (1, 0), min(load(a, 0), spread(np.float32(0))))

    a = A[0, :LANES].copy()
    a[3] = np.nan
    target = np.empty((2, LANES), np.float32)
    compute(a, target)
    assert np.array_equal(target, [np.maximum(a, 0), np.minimum(a, 0)], equal_nan=True)


def test_sums_and_the_largest_are_of_all_sixteen() -> None:
    @jit
    def compute(a: Any, target: Any) -> Any:
        store(target, 0, totals(a, 2))
        return total(load(a, (0, 0))), largest(load(a, (0, 0)))

    rows = rng.standard_normal((LANES + 4, LANES)).astype(np.float32)
    target = np.empty(LANES, np.float32)
    everything, most = compute(rows, target)
    np.testing.assert_allclose(target, rows[2 : LANES + 2].sum(1, dtype=np.float64), atol=2e-6)
    assert everything == pytest.approx(rows[0].sum(dtype=np.float64), abs=2e-6)
    assert most == rows[0].max()


def test_powers_of_two_are_the_same_for_a_vector_and_a_number() -> None:
    @jit
    def of_vector(x: Any, target: Any) -> None:
        store(target, 0, exp2(load(x, 0)))

    @jit
    def of_numbers(x: Any, target: Any) -> None:
        for i in range(len(x)):
            target[i] = exp2(x[i])

    x = np.linspace(-140, 140, LANES).astype(np.float32)
    one, other = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    of_vector(x, one)
    of_numbers(x, other)
    assert np.array_equal(one, other)
    np.testing.assert_allclose(one, np.exp2(np.clip(x, -126, 126).astype(np.float64)), rtol=2e-7)


def test_a_power_comes_from_the_lowest_bits() -> None:
    @jit
    def compute(k: Any) -> Any:
        return power_of_two(k + np.float32(1.5 * 2**23))

    assert [compute(np.float32(k)) for k in (-126, -1, 0, 5)] == [2.0**-126, 0.5, 1, 32]
