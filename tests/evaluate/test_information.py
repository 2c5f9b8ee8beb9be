"""Excess mutual information of sequences with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tcsae.evaluate.information import Thirds, normalised_information, thirds_of
from tcsae.evaluate.temporal import temporal_figures
from tcsae.evaluate.temporal_features import figures

from .sequences import by_name, codes_of, markov, sums_of

LAGS = (1, 3, 8)


def test_a_two_state_markov_chain_has_the_closed_form() -> None:
    # Equilibrium 1/3 on, second eigenvalue 0.85: P(on, d later | on) = 1/3 + 2/3 * 0.85^d.
    generator = np.random.default_rng(0)
    documents = [markov(2000, generator, 6, off=0.1, on=0.05) for _ in range(40)]
    found = by_name(sums_of(codes_of(documents), LAGS))
    entropy = -(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)
    for lag in LAGS:
        stay = 1 / 3 + 2 / 3 * 0.85**lag
        joint = np.array([[2 / 3 - (1 - stay) / 3, (1 - stay) / 3], [(1 - stay) / 3, stay / 3]])
        expected = (2 * entropy + (joint * np.log(joint)).sum()) / entropy
        assert found[f"information_lag{lag}"][0].mean() == pytest.approx(expected, rel=0.05)
        assert found[f"excess_information_lag{lag}"][0].mean() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_has_no_excess_within_its_interval(seed: int) -> None:
    generator = np.random.default_rng(seed)
    documents = [generator.random((300, 50)) * (generator.random((300, 50)) < 0.2) for _ in range(30)]
    sums = sums_of(codes_of(documents), LAGS)
    result, _ = temporal_figures(
        sums, figures(sums), block_size=0, n_documents=30, n_bootstrap=500, seed=0, print_="p"
    )
    for lag in LAGS:
        estimate = result.estimates[f"excess_information_whole_lag{lag}"]
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        # one feature's NMI over 9,000 pairs has a standard error of about 0.0005; the mean of 50 of 0.0001
        assert abs(estimate.value) < 5e-4
        # 95 % of such intervals hold 0; a quarter of one's width is let go for the other 5 %
        slack = (estimate.high - estimate.low) / 4
        assert estimate.low - slack < 0 < estimate.high + slack


def test_a_feature_of_the_document_alone_is_explained_by_the_permutation() -> None:
    generator = np.random.default_rng(2)
    rates = np.where(generator.random((60, 1, 8)) < 0.5, 0.05, 0.6)
    documents = [(generator.random((200, 8)) < rate).astype(float) for rate in rates]
    found = by_name(sums_of(codes_of(documents), LAGS))
    for lag in LAGS:
        assert found[f"information_lag{lag}"][0].mean() > 0.05
        assert abs(found[f"excess_information_lag{lag}"][0].mean()) < 0.006


def test_a_feature_of_the_position_alone_is_explained_by_the_match() -> None:
    generator = np.random.default_rng(3)
    rate = np.where(np.arange(50) < 25, 0.05, 0.6)[:, None]
    documents = [(generator.random((50, 8)) < rate).astype(float) for _ in range(200)]
    found = by_name(sums_of(codes_of(documents), (1,)))
    observed, matched = found["information_lag1"][0].mean(), found["matched_information_lag1"][0].mean()
    assert observed > 0.05
    assert matched == pytest.approx(observed, rel=0.1)
    # the standard error of one feature is about 0.007, of the mean of 8 0.0025
    assert abs(found["excess_information_lag1"][0].mean()) < 0.008


def test_thirds_split_positive_values_in_three() -> None:
    generator = np.random.default_rng(5)
    f = generator.lognormal(sigma=2.0, size=(6000, 2)) * (generator.random((6000, 2)) < 0.5)
    codes = codes_of([f])
    states = thirds_of([codes], 2).states(codes.value, codes.feature)
    for feature in range(2):
        counts = torch.bincount(states[codes.feature == feature], minlength=4)
        assert (counts[1:] / counts.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


def test_a_feature_that_the_sample_does_not_show_has_one_state_beside_off() -> None:
    silent = codes_of([np.zeros((10, 1))])
    states = thirds_of([silent], 1).states(torch.tensor([1e-3, 1e3]), torch.tensor([0, 0]))
    assert states.tolist() == [1, 1]


def test_one_document_has_no_matched_pairs_and_a_constant_no_information() -> None:
    sums = sums_of(codes_of([np.ones((40, 1))]), (1,), thirds=Thirds(torch.ones(1), torch.ones(1)))
    assert sums.n_pairs[0, :, 0].tolist() == [39, 39, 0]
    found = by_name(sums)
    for name in ("information", "permuted_information", "matched_information", "excess_information"):
        assert np.isnan(found[f"{name}_lag1"]).all()


def test_miller_madow_takes_the_bias_of_small_samples_away() -> None:
    # 200 draws in 4 x 4 cells: the plain estimate is about (4 - 1)^2 / (2 * 200) = 0.0225 nats too large.
    generator = np.random.default_rng(6)
    joint = generator.multinomial(200, np.full(16, 1 / 16), size=2000).T.reshape(4, 4, 2000).astype(float)
    assert abs(normalised_information(joint).mean()) < 0.002
