"""Bootstrap intervals against hand calculations, loops and known coverage."""

from __future__ import annotations

import itertools
from statistics import NormalDist

import numpy as np
import pytest

from tcsae.evaluate.intervals import (
    bca_ends,
    bootstrap,
    interval,
    percentile_ends,
    resample_counts,
)


def mean_of(sums: np.ndarray) -> np.ndarray:
    """Mean from the columns (total, count)."""
    return sums[..., :1] / sums[..., 1:]


def test_percentile_ends_are_the_interpolated_quantiles() -> None:
    # 0, 1, ..., 100: the 2.5 % point lies half way between the third and fourth smallest
    assert percentile_ends(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert percentile_ends(np.arange(101.0), level=0.5) == pytest.approx((25.0, 75.0))


def test_bca_is_the_percentile_interval_where_there_is_neither_bias_nor_skew() -> None:
    draws = np.arange(-50.0, 51.0)  # symmetric about the value 0
    left_out = np.array([-1.0, 1.0])  # jackknife without skew
    assert bca_ends(0.0, draws, left_out) == pytest.approx(percentile_ends(draws))


def test_bca_shifts_by_the_bias_and_the_acceleration_that_a_hand_calculation_gives() -> None:
    # 101 draws 0..100 and value 60: 60 below, one tie, so z0 = quantile(60.5 / 101)
    # jackknife 0, 0, 3: mean 1, deviations 1, 1, -2: sum of cubes -6, of squares 6: a = -6 / (6 * 6^1.5)
    normal = NormalDist()
    z0, a = normal.inv_cdf(60.5 / 101), -1 / 6**1.5
    expected = []
    for z in (-1.959963984540054, 1.959963984540054):
        share = normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
        expected.append(100 * share)  # the quantile of 0..100
    assert bca_ends(60.0, np.arange(101.0), np.array([0.0, 0.0, 3.0])) == pytest.approx(expected)


def test_bca_does_not_exist_where_all_draws_lie_on_one_side_or_no_unit_matters() -> None:
    assert bca_ends(200.0, np.arange(101.0), np.array([0.0, 1.0])) is None
    assert bca_ends(50.0, np.arange(101.0), np.array([1.0, 1.0])) is None


def test_a_resample_by_counts_is_the_metric_of_the_documents_drawn() -> None:
    sums = np.array([[1.0, 2.0], [6.0, 3.0], [5.0, 1.0]])
    counts = resample_counts(3, 50, seed=1)
    found = bootstrap(sums, mean_of, counts)
    for draw, times in zip(found.draws[:, 0], counts.astype(int), strict=True):
        drawn = list(itertools.chain.from_iterable([i] * n for i, n in enumerate(times)))
        assert draw == pytest.approx(sum(sums[i, 0] for i in drawn) / sum(sums[i, 1] for i in drawn))
    assert found.value == pytest.approx([12 / 6])
    assert found.leave_one_out[:, 0] == pytest.approx([11 / 4, 6 / 3, 7 / 5])


def test_resamples_are_a_function_of_their_arguments_so_that_saes_are_resampled_in_pairs() -> None:
    assert np.array_equal(resample_counts(7, 20, seed=3), resample_counts(7, 20, seed=3))
    assert not np.array_equal(resample_counts(7, 20, seed=3), resample_counts(7, 20, seed=4))


def test_the_paired_interval_of_a_difference_forgets_what_both_share() -> None:
    generator = np.random.default_rng(0)
    shared, counts = generator.normal(0, 10, 40), resample_counts(40, 500, seed=0)
    one = bootstrap(np.stack([shared, np.ones(40)], 1), mean_of, counts)
    other = bootstrap(np.stack([shared + generator.normal(1, 0.1, 40), np.ones(40)], 1), mean_of, counts)
    difference = other.draws[:, 0] - one.draws[:, 0]
    low, high = percentile_ends(difference)
    assert 0.9 < low < 1 < high < 1.1
    alone = percentile_ends(one.draws[:, 0])
    assert alone[1] - alone[0] > 50 * (high - low)


def test_intervals_contain_the_mean_of_a_skewed_population_about_as_often_as_they_say() -> None:
    # exponential, mean 1, 40 units, 400 samples: the standard error of a coverage of 95 % is 1.1 %
    generator = np.random.default_rng(0)
    counts = resample_counts(40, 500, seed=0)
    covered = {"bca": 0, "percentile": 0}
    for _ in range(400):
        sample = generator.exponential(size=40)
        found = bootstrap(np.stack([sample, np.ones(40)], 1), mean_of, counts)
        ends = bca_ends(float(found.value[0]), found.draws[:, 0], found.leave_one_out[:, 0])
        assert ends is not None
        covered["bca"] += ends[0] <= 1 <= ends[1]
        low, high = percentile_ends(found.draws[:, 0])
        covered["percentile"] += low <= 1 <= high
    assert 0.90 < covered["bca"] / 400 < 0.98
    assert 0.88 < covered["percentile"] / 400 < 0.98


def test_an_interval_is_never_a_point_where_the_resamples_vary() -> None:
    # the value is what most resamples are below, as with few documents, and 5 of 100 are those documents themselves
    draws, left_out = np.r_[np.linspace(0, 0.9, 95), np.ones(5)], np.array([0.9, 0.8, 0.95, 0.85, 0.9])
    assert bca_ends(1.0, draws, left_out) is None
    found = interval(1.0, draws, left_out)
    assert (found.method, found.high) == ("percentile", 1.0)
    assert found.low == pytest.approx(0.9 / 94 * 99 * 0.025)


def test_one_document_gives_a_value_and_says_why_it_has_no_interval() -> None:
    found = interval(0.5, np.full(100, 0.5), np.array([np.nan]))
    assert (found.value, found.low, found.high) == (0.5, None, None)
    assert found.reason is not None
    assert "one document" in found.reason


def test_an_undefined_figure_is_none_with_its_reason_and_never_a_number() -> None:
    found = interval(float("nan"), np.full(9, np.nan), np.zeros(3), undefined="nothing fires")
    assert found.value is None
    assert found.reason == "undefined, because nothing fires"


def test_undefined_resamples_take_the_interval_away_but_not_the_value() -> None:
    found = interval(1.0, np.array([1.0, np.nan, 2.0]), np.zeros(3))
    assert (found.value, found.low) == (1.0, None)
    assert found.reason == "no interval, because 1 of 3 resamples are undefined"
