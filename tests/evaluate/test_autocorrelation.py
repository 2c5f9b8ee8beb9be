"""Autocorrelation and timescale of sequences with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from tcsae.evaluate.autocorrelation import timescale
from tcsae.evaluate.temporal_codes import LAGS

from .sequences import by_name, codes_of, markov, rho, signed_sums_of, sparse, sums_of

# Known answers -----------------------------------------------------------------------------------------


def test_white_noise_has_none() -> None:
    generator = np.random.default_rng(0)
    found = rho(signed_sums_of([generator.random((500, 20)) for _ in range(10)]))
    # 5,000 tokens: the standard error is 0.014 a feature, 0.003 for the mean of 20
    assert np.abs(found.mean(axis=1)).max() < 0.012


def test_an_ar1_process_has_the_powers_of_its_coefficient_and_their_sum() -> None:
    generator = np.random.default_rng(0)
    x = np.zeros((60_000, 4))
    noise = generator.normal(size=x.shape)
    for t in range(1, len(x)):
        x[t] = 0.8 * x[t - 1] + noise[t]
    sums = signed_sums_of([x])
    found = rho(sums).mean(axis=1)
    assert found == pytest.approx([0.8**lag for lag in LAGS], abs=0.02)
    # 0.8 + 0.64 + ... up to lag 32 is 4 (1 - 0.8^32); lags at which noise hides rho add a little
    assert timescale(rho(sums), LAGS).mean() == pytest.approx(4.0, abs=0.3)


def test_a_square_wave_of_period_16_turns_over_at_8_and_returns_at_16() -> None:
    wave = np.tile(np.repeat([1.0, 0.0], 8), 64)[:, None]
    found = by_name(sums_of(codes_of([wave])))
    # rho(d) = 1 - d / 4 up to the half period; edges of the finite record: about 8 / 1024
    autocorrelation = [float(found[f"autocorrelation_lag{lag}"][0, 0]) for lag in LAGS]
    assert autocorrelation == pytest.approx([0.75, 0.5, 0.0, -1.0, 1.0, 1.0], abs=0.01)
    # on at t + d, given on at t: (8 - d) / 8 up to the half period; half of the tokens are on
    persistence = [float(found[f"persistence_lag{lag}"][0, 0]) for lag in LAGS]
    assert persistence == pytest.approx([3 / 8, 1 / 4, 0.0, -1 / 2, 1 / 2, 1 / 2], abs=0.01)
    assert found["run_length"][0, 0] == 8
    # 127 turns, of height 1, over 512 tokens that are on
    assert found["total_variation"][0, 0] == pytest.approx(127 / 512)


def test_a_two_state_markov_chain_has_the_powers_of_its_second_eigenvalue() -> None:
    # P(on -> off) = 0.1, P(off -> on) = 0.05: eigenvalue 0.85
    chain = markov(120_000, np.random.default_rng(0), 2, off=0.1, on=0.05)
    found = by_name(sums_of(codes_of([chain])))
    for lag in LAGS:
        assert found[f"autocorrelation_lag{lag}"][0].mean() == pytest.approx(0.85**lag, abs=0.025)
        # P(on d later | on) - P(on) = (2 / 3) 0.85^d
        assert found[f"persistence_lag{lag}"][0].mean() == pytest.approx(2 / 3 * 0.85**lag, abs=0.02)
    assert found["run_length"][0].mean() == pytest.approx(10, rel=0.05)
    assert found["timescale"][0].mean() == pytest.approx(0.85 * (1 - 0.85**32) / 0.15, rel=0.05)


def test_a_feature_of_the_document_alone_correlates_but_not_within_documents() -> None:
    generator = np.random.default_rng(2)
    rates = np.where(generator.random((60, 1, 8)) < 0.5, 0.05, 0.6)
    sums = sums_of(codes_of([(generator.random((200, 8)) < rate).astype(float) for rate in rates]))
    # variance of the rate over that of the feature: 0.0756 / 0.219
    assert rho(sums).mean(axis=1) == pytest.approx([0.345] * 6, abs=0.05)
    assert rho(sums, "within_autocorrelation").mean(axis=1) == pytest.approx([0.0] * 6, abs=0.015)


# Definition --------------------------------------------------------------------------------------------


def test_pairs_never_cross_a_context() -> None:
    on_off = [np.ones((4, 1)), np.zeros((4, 1))]
    # mean 1/2; within a context every product is 1/4, across one it would be -1/4
    assert rho(sums_of(codes_of(on_off), lags=(1, 2))) == pytest.approx(np.ones((2, 1)))


def test_tokens_that_do_not_count_are_in_no_pair_and_in_no_mean() -> None:
    x = sparse(50, 2, np.random.default_rng(0))
    spoilt = np.concatenate([np.full((8, 2), 1e3), x])
    with_hole = sums_of(codes_of([spoilt], counted=np.arange(58) >= 8))
    assert rho(with_hole) == pytest.approx(rho(sums_of(codes_of([x]))), abs=1e-9)


def test_a_hole_breaks_the_pairs_across_it_only_where_it_is_an_end() -> None:
    x = np.array([1.0, 0.0, 5.0, 1.0, 0.0])[:, None]
    counted = np.array([True, True, False, True, True])
    sums = sums_of(codes_of([x], counted=counted), (1, 2, 3))
    # lag 1: (0,1), (3,4); lag 2: (1,3); lag 3: (0,3), (1,4)
    assert sums.n_pairs[:, 0].tolist() == [[2, 1, 2]]


def test_a_large_constant_does_not_cost_precision() -> None:
    x = np.random.default_rng(0).random((300, 4)).round(3) * 8
    assert rho(signed_sums_of([x + 1024.0])) == pytest.approx(rho(signed_sums_of([x])), abs=1e-4)


def test_a_feature_that_never_fires_is_undefined_and_not_zero() -> None:
    x = np.zeros((30, 2))
    x[::3, 1] = 1.0
    sums = sums_of(codes_of([x]))
    found = rho(sums)
    assert np.isnan(found[:, 0]).all()
    assert np.isfinite(found[:4, 1]).all()
    assert sums.once("firings").tolist() == [[0, 10]]
    assert np.isnan(timescale(found, LAGS)[0])


def test_a_lag_longer_than_every_context_is_undefined() -> None:
    assert np.isnan(rho(sums_of(codes_of([sparse(20, 1, np.random.default_rng(0))]), lags=(1, 32)))[1, 0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([0.5, 0.25, 0.0625], 0.5 + 0.25 + 0.125 + 0.0625, id="geometric"),
        pytest.param([0.5, -0.1, 0.9], 0.5, id="stops before the first lag that is not positive"),
        pytest.param([-0.2, 0.5, 0.5], 0.0, id="nothing at lag 1"),
        pytest.param([1.0, 1.0, 1.0], 4.0, id="never falls"),
        pytest.param([0.5, np.nan, 0.9], 0.5, id="contexts too short for the second lag"),
        pytest.param([np.nan, 0.5, 0.5], np.nan, id="undefined"),
    ],
)
def test_the_timescale_is_the_sum_up_to_where_the_correlation_ends(
    values: list[float], expected: float
) -> None:
    found = timescale(np.array(values), (1, 2, 4))
    assert found == pytest.approx(expected, nan_ok=True)
