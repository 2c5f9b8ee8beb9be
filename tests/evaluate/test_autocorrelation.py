"""Autocorrelation of sequences with known answers, and against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tcsae.evaluate.autocorrelation import LAGS, Codes, LagSums, autocorrelation, lag_sums


def codes_of(
    sequences: list[np.ndarray], contexts: list[int] | None = None, counted: list[np.ndarray] | None = None
) -> Codes:
    """Each sequence [row, feature] one document in one context, every token counted unless said otherwise."""
    lengths = [len(s) for s in sequences]
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    numbers = torch.arange(len(lengths)) if contexts is None else torch.tensor(contexts)
    everything = [np.ones(n, dtype=bool) for n in lengths] if counted is None else counted
    return Codes(
        f=torch.from_numpy(np.concatenate(sequences)).float(),
        counted=torch.from_numpy(np.concatenate(everything)),
        context=numbers[which],
        unit=which,
    )


def rho(codes: Codes, lags: tuple[int, ...] = LAGS) -> np.ndarray:
    n_units = int(codes.unit.max()) + 1
    sums = lag_sums([codes], n_units, codes.f.shape[1], lags)
    return autocorrelation(sums, np.ones(n_units), slice(None))[0]


def slow_rho(sequences: list[np.ndarray], lag: int) -> float:
    """One feature, in loops: pooled over sequences with the global mean."""
    values = [v for s in sequences for v in s]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    products = [(s[t] - mean) * (s[t + lag] - mean) for s in sequences for t in range(len(s) - lag)]
    return float(sum(products) / len(products) / variance)


# Known answers -----------------------------------------------------------------------------------------


def test_white_noise_has_none() -> None:
    generator = np.random.default_rng(0)
    found = rho(codes_of([generator.random((500, 20)) for _ in range(10)]))
    # 5,000 tokens: the standard error is 0.014 a feature, 0.003 for the mean of 20
    assert np.abs(found.mean(axis=1)).max() < 0.012


def test_an_ar1_process_has_the_powers_of_its_coefficient() -> None:
    generator = np.random.default_rng(0)
    x = np.zeros((60_000, 4))
    noise = generator.normal(size=x.shape)
    for t in range(1, len(x)):
        x[t] = 0.8 * x[t - 1] + noise[t]
    found = rho(codes_of([x])).mean(axis=1)
    assert found == pytest.approx([0.8**lag for lag in LAGS], abs=0.02)


def test_a_square_wave_of_period_16_turns_over_at_8_and_returns_at_16() -> None:
    wave = np.tile(np.repeat([1.0, 0.0], 8), 64)[:, None]
    found = rho(codes_of([wave]))[:, 0]
    # rho(d) = 1 - d / 4 up to the half period; edges of the finite record: about 8 / 1024
    assert found == pytest.approx([0.75, 0.5, 0.0, -1.0, 1.0, 1.0], abs=0.01)


def test_a_two_state_markov_chain_has_the_powers_of_its_second_eigenvalue() -> None:
    # P(on -> off) = 0.1, P(off -> on) = 0.05: eigenvalue 0.85
    generator = np.random.default_rng(0)
    draws = generator.random((120_000, 2))
    state, chain = np.zeros(2, dtype=bool), np.zeros_like(draws)
    for t, draw in enumerate(draws):
        state = np.where(state, draw >= 0.1, draw < 0.05)
        chain[t] = state
    found = rho(codes_of([chain])).mean(axis=1)
    assert found == pytest.approx([0.85**lag for lag in LAGS], abs=0.025)


# Definition --------------------------------------------------------------------------------------------


def test_it_is_the_loops_definition_over_documents_of_different_lengths() -> None:
    generator = np.random.default_rng(0)
    sequences = [generator.exponential(size=(n, 3)) * (1 + n % 3) for n in (40, 7, 90, 33)]
    found = rho(codes_of(sequences))
    for at, lag in enumerate(LAGS):
        for feature in range(3):
            expected = slow_rho([s[:, feature] for s in sequences], lag)
            assert found[at, feature] == pytest.approx(expected, abs=1e-5)


def test_pairs_never_cross_a_context() -> None:
    on_off = [np.ones((4, 1)), np.zeros((4, 1))]
    # mean 1/2; within a context every product is 1/4, across one it would be -1/4
    assert rho(codes_of(on_off), lags=(1, 2)) == pytest.approx(np.ones((2, 1)))


def test_tokens_that_do_not_count_are_in_no_pair_and_in_no_mean() -> None:
    generator = np.random.default_rng(0)
    x = generator.random((50, 2))
    spoilt = np.concatenate([np.full((8, 2), 1e3), x])
    counted = np.arange(58) >= 8
    assert rho(codes_of([spoilt], counted=[counted])) == pytest.approx(rho(codes_of([x])), abs=1e-4)


def test_a_hole_breaks_the_pairs_across_it_only_where_it_is_an_end() -> None:
    x = np.array([1.0, 0.0, 5.0, 1.0, 0.0])[:, None]
    counted = np.array([True, True, False, True, True])
    sums = lag_sums([codes_of([x], counted=[counted])], 1, 1, (1, 2, 3))
    # lag 1: (0,1), (3,4); lag 2: (1,3); lag 3: (0,3), (1,4)
    assert sums.n_pairs.tolist() == [[2.0, 1.0, 2.0]]


def test_a_large_constant_does_not_cost_precision() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 1))
    assert rho(codes_of([x + 1000.0])) == pytest.approx(rho(codes_of([x])), abs=2e-3)


def test_blocks_add_up_to_the_whole() -> None:
    generator = np.random.default_rng(0)
    whole = codes_of([generator.random((n, 3)) for n in (40, 50, 60)])
    cut = [Codes(*(part[a:b] for part in whole)) for a, b in ((0, 40), (40, 150))]
    one, several = lag_sums([whole], 3, 3), lag_sums(cut, 3, 3)
    ones = np.ones(3)
    assert autocorrelation(several, ones, slice(None))[0] == pytest.approx(
        autocorrelation(one, ones, slice(None))[0], abs=1e-5
    )
    assert several.firings.tolist() == one.firings.tolist()


def test_a_resample_is_the_autocorrelation_of_the_documents_drawn() -> None:
    generator = np.random.default_rng(0)
    sequences = [generator.random((n, 2)) ** 3 for n in (30, 45, 60)]
    sums = lag_sums([codes_of(sequences)], 3, 2)
    drawn = [sequences[0], sequences[2], sequences[2]]
    found, energy = autocorrelation(sums, np.array([[1.0, 0.0, 2.0]]), slice(None))
    assert found[:, 0] == pytest.approx(rho(codes_of(drawn)), abs=1e-5)
    assert energy[0] == pytest.approx(sum(np.square(s).sum(axis=0) for s in drawn), rel=1e-5)


def test_a_feature_that_never_fires_is_undefined_and_not_zero() -> None:
    x = np.zeros((30, 2))
    x[::3, 1] = 1.0
    sums: LagSums = lag_sums([codes_of([x])], 1, 2)
    found, _ = autocorrelation(sums, np.ones(1), slice(None))
    assert np.isnan(found[:, 0]).all()
    assert np.isfinite(found[:4, 1]).all()
    assert sums.firings.tolist() == [0, 10]


def test_a_lag_longer_than_every_context_is_undefined() -> None:
    assert np.isnan(rho(codes_of([np.random.default_rng(0).random((20, 1))]), lags=(1, 32))[1, 0])
