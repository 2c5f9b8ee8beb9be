"""The two-level bootstrap against loops, hand calculations and known coverage."""

from __future__ import annotations

import numpy as np
import pytest

from tcsae.evaluate.compare.bootstrap import (
    PerSeed,
    Resampled,
    ends,
    over_seeds,
    p_value,
    seed_counts,
)
from tcsae.evaluate.compare.contrast import described
from tcsae.evaluate.intervals import bca_ends, resample_counts


def crossed(values: np.ndarray, n_draws: int = 300) -> PerSeed:
    """Means over documents of ``values`` [seed, document], as `evaluate` saves them."""
    n = values.shape[1]
    counts = resample_counts(n, n_draws, 0)
    total = values.sum(axis=1, keepdims=True)
    return PerSeed(values.mean(axis=1), values @ counts.T / n, ((total - values) / (n - 1),))


def test_a_resample_is_the_mean_over_the_seeds_drawn_on_one_resample_of_documents() -> None:
    figure = crossed(np.random.default_rng(0).normal(size=(3, 7)), n_draws=4)
    found = over_seeds(figure, 10)
    counts = seed_counts(3, 10)
    for r in range(10):
        drawn = [s for s in range(3) for _ in range(int(counts[r, s]))]
        assert len(drawn) == 3
        assert found.draws[r] == pytest.approx(sum(figure.draws[s, r % 4] for s in drawn) / 3)


@pytest.mark.parametrize(
    ("draws", "variance", "reason"),
    [
        ([1.0, np.nan, 2.0], 0.1, "no interval, because 1 of 3 resamples are undefined"),
        ([1.0, 1.5, 2.0], np.nan, "no interval, because it is undefined without one of the documents"),
        ([1.0, 1.0, 1.0], 0.0, "no interval, because nothing varies"),
        ([1.1, 1.5, 2.0], 0.1, "no interval, because all resamples lie on one side of it"),
    ],
)
def test_a_figure_without_interval_says_why(draws: list[float], variance: float, reason: str) -> None:
    found = Resampled(1.0, np.array(draws), 0.0, variance, 4.0, 5)
    assert ends(found) is None
    figure = described(found, None)
    assert (figure.value, figure.low, figure.reason) == (1.0, None, reason)


def test_one_seed_is_the_saved_draws_over_documents() -> None:
    figure = crossed(np.random.default_rng(1).exponential(size=(1, 60)), n_draws=2000)
    found = over_seeds(figure)
    assert np.array_equal(found.draws, figure.draws[0])
    assert found.df == pytest.approx(59)
    interval = ends(found)
    assert interval is not None
    # 60 documents: Student's quantile and n - 1 widen the plain BCa interval by about 4 %, more on the
    # side of the longer tail
    plain = bca_ends(found.value, found.draws, figure.left_out[0][0])
    assert plain is not None
    width = (interval.high - interval.low) / (plain[1] - plain[0])
    assert 1.03 < width < 1.1


def test_the_variance_is_that_of_the_analysis_of_variance() -> None:
    # seeds 1 and 3 apart, documents -1, 0, 1, no interaction:
    # V_seeds = var(1, 3) / 2 = 1, V_documents = var(-1, 0, 1) / 3 = 1 / 3, df = (4/3)^2 / (1 / 1 + (1/9) / 2)
    found = over_seeds(crossed(np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])))
    assert found.variance == pytest.approx(4 / 3)
    assert found.df == pytest.approx((16 / 9) / (1 + 1 / 18))


def test_the_interaction_of_seeds_and_documents_is_counted_once() -> None:
    # only interaction: both seeds' means and both documents' means are 0, so all of V is what is left, 0
    figure = crossed(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert over_seeds(figure).variance == 0.0
    # 6 seeds x 30 documents of independent noise: the variance of the mean is 1 / 180
    generator = np.random.default_rng(0)
    variances = [over_seeds(crossed(generator.normal(size=(6, 30)), 10), 10).variance for _ in range(300)]
    # V is bounded below by V_seeds and V_documents, so it is a little too large, never two or three times
    assert 1 / 180 < np.mean(variances) < 1.5 / 180


def test_the_acceleration_of_one_level_is_efrons() -> None:
    # values 0, 0, 3: influences (-1, -1, 2) / 3, cubes 6 / 27, squares 6 / 9: a = (6 / 27) / (6 (6 / 9)^1.5)
    found = over_seeds(crossed(np.array([[0.0, 0.0, 3.0]])))
    assert found.acceleration == pytest.approx((6 / 27) / (6 * (6 / 9) ** 1.5))


def test_the_acceleration_of_two_levels_sums_over_both() -> None:
    # seeds' means 0 and 0 and 3 (deviations over 3: -1/3, -1/3, 2/3), documents -1, 1 (influences -1/2, 1/2)
    values = np.array([[0.0], [0.0], [3.0]]) + np.array([-1.0, 1.0])
    found = over_seeds(crossed(values))
    assert found.acceleration == pytest.approx((6 / 27) / (6 * (6 / 9 + 1 / 2) ** 1.5))


@pytest.mark.parametrize("n_seeds", [1, 2, 5])
@pytest.mark.parametrize("shift", [0.0, 0.3, 1.5])
def test_the_interval_leaves_the_null_out_exactly_if_p_is_below_five_percent(
    n_seeds: int, shift: float
) -> None:
    generator = np.random.default_rng(n_seeds)
    for _ in range(40):
        values = generator.normal(shift, 0.3, (n_seeds, 1)) + generator.exponential(size=(n_seeds, 25)) - 1
        found = over_seeds(crossed(values), 2000)
        interval, p = ends(found), p_value(found, 0.0)
        assert interval is not None
        assert interval.method == "bca"
        assert p is not None
        assert (p < 0.05) == (not interval.low <= 0 <= interval.high)


def test_one_sided_p_is_that_of_the_one_sided_bound() -> None:
    values = np.random.default_rng(3).normal(size=(5, 1)) + np.random.default_rng(4).normal(size=(5, 30))
    found = over_seeds(crossed(values))
    bounds = ends(found, 0.90)
    assert bounds is not None
    assert p_value(found, bounds.high, "less") == pytest.approx(0.05, abs=1e-3)
    assert p_value(found, bounds.low, "greater") == pytest.approx(0.05, abs=1e-3)
    assert p_value(found, bounds.high + 1, "less") < 0.05  # type: ignore[operator]  # not None: asserted above


def test_p_goes_on_falling_beyond_the_outermost_resample() -> None:
    found = over_seeds(crossed(np.random.default_rng(0).normal(10, 0.1, (5, 20))))
    assert found.draws.min() > 9.8
    near, far = p_value(found, 9.8), p_value(found, 9.0)
    assert near is not None
    assert far is not None
    # the share of resamples beyond could only say: less than 1 in 10,000
    assert 0 < far < near < 1e-2
    assert far < 1e-4


def test_a_figure_that_does_not_vary_has_neither_interval_nor_p() -> None:
    found = over_seeds(crossed(np.full((3, 5), 2.0)))
    assert ends(found) is None
    assert p_value(found, 0.0) is None
    assert ends(Resampled(1.0, np.ones(5), 0.0, 0.0, 4.0, 5)) is None


@pytest.mark.parametrize(
    ("n_seeds", "of_seeds", "of_documents", "of_both"),
    [
        pytest.param(5, 0.3, 1.0, 1.0, id="five seeds, both levels"),
        pytest.param(5, 1.0, 0.1, 0.1, id="five seeds, which vary most", marks=pytest.mark.slow),
        pytest.param(5, 0.0, 1.0, 1.0, id="five seeds that do not vary", marks=pytest.mark.slow),
        pytest.param(1, 0.0, 1.0, 1.0, id="one seed", marks=pytest.mark.slow),
    ],
)
def test_intervals_cover_as_often_as_they_say(
    n_seeds: int, of_seeds: float, of_documents: float, of_both: float
) -> None:
    # 500 data sets: the standard error of a coverage of 95 % is 1 %
    generator = np.random.default_rng(0)
    covered = plain = 0
    for _ in range(500):
        values = (
            generator.normal(0, of_seeds, (n_seeds, 1))
            + generator.normal(0, of_documents, 60)
            + generator.normal(0, of_both, (n_seeds, 60))
        )
        found = over_seeds(crossed(values, 500), 2000)
        interval = ends(found)
        assert interval is not None
        covered += interval.low <= 0 <= interval.high
        low, high = np.quantile(found.draws, [0.025, 0.975])
        plain += low <= 0 <= high
    assert 0.92 <= covered / 500 <= 0.975
    if of_seeds == 1.0:
        assert plain / 500 < 0.90  # what the expansion of the levels is for
