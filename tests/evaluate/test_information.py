"""Excess mutual information of sequences with known answers, and against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tcsae.evaluate.autocorrelation import Codes
from tcsae.evaluate.information import (
    Thirds,
    excess,
    information,
    information_sums,
    normalised_information,
    thirds_of,
)

LAGS = (1, 3, 8)


def codes_of(documents: list[np.ndarray], contexts_each: int = 1) -> Codes:
    """Documents [row, feature] one after the other, each cut into equal contexts; every token counts."""
    lengths = torch.tensor([len(d) for d in documents])
    unit = torch.repeat_interleave(torch.arange(len(documents)), lengths)
    within = torch.cat([torch.arange(int(n)) * contexts_each // int(n) for n in lengths])
    return Codes(
        f=torch.from_numpy(np.concatenate(documents)).float(),
        counted=torch.ones(int(lengths.sum()), dtype=torch.bool),
        context=unit * contexts_each + within,
        unit=unit,
    )


def nmi(codes: Codes, lags: tuple[int, ...] = LAGS) -> np.ndarray:
    """[kind, lag, feature]."""
    n_units, d_sae = int(codes.unit.max()) + 1, codes.f.shape[1]
    sums = information_sums([codes], thirds_of([codes], d_sae), n_units, d_sae, lags=lags)
    return information(sums, np.ones(n_units), slice(None))


def markov(n: int, generator: np.random.Generator, features: int, off: float, on: float) -> np.ndarray:
    """Two-state chains with P(on -> off) = ``off`` and P(off -> on) = ``on``, begun in equilibrium."""
    draws = generator.random((n, features))
    state = generator.random(features) < on / (on + off)
    chain = np.zeros((n, features))
    for t in range(n):
        chain[t] = state
        state = np.where(state, draws[t] >= off, draws[t] < on)
    return chain


def test_a_two_state_markov_chain_has_the_closed_form() -> None:
    # Equilibrium 1/3 on, second eigenvalue 0.85: P(on, d later | on) = 1/3 + 2/3 * 0.85^d.
    generator = np.random.default_rng(0)
    codes = codes_of([markov(2000, generator, 6, off=0.1, on=0.05) for _ in range(40)])
    found = nmi(codes)
    entropy = -(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)
    for at, lag in enumerate(LAGS):
        stay = 1 / 3 + 2 / 3 * 0.85**lag
        joint = np.array([[2 / 3 - (1 - stay) / 3, (1 - stay) / 3], [(1 - stay) / 3, stay / 3]])
        expected = (2 * entropy + (joint * np.log(joint)).sum()) / entropy
        assert found[0, at].mean() == pytest.approx(expected, rel=0.05)
        assert excess(found)[at].mean() == pytest.approx(expected, rel=0.06)


def test_noise_has_no_excess() -> None:
    generator = np.random.default_rng(1)
    documents = [generator.random((300, 50)) * (generator.random((300, 50)) < 0.2) for _ in range(30)]
    found = excess(nmi(codes_of(documents)))
    # One feature's NMI over 9,000 pairs has a standard error of about 0.0005; the mean of 50 of 0.0001.
    assert np.abs(found.mean(axis=1)).max() < 5e-4


def test_a_feature_of_the_document_alone_is_explained_by_the_permutation() -> None:
    generator = np.random.default_rng(2)
    rates = np.where(generator.random((60, 1, 8)) < 0.5, 0.05, 0.6)
    documents = [(generator.random((200, 8)) < rate).astype(float) for rate in rates]
    found = nmi(codes_of(documents))
    assert found[0].mean() > 0.05
    assert np.abs(excess(found).mean(axis=1)).max() < 0.003


def test_a_feature_of_the_position_alone_is_explained_by_the_match() -> None:
    generator = np.random.default_rng(3)
    rate = np.where(np.arange(50) < 25, 0.05, 0.6)[:, None]
    documents = [(generator.random((50, 8)) < rate).astype(float) for _ in range(200)]
    found = nmi(codes_of(documents), (1,))
    assert found[0].mean() > 0.05
    assert found[2].mean() == pytest.approx(found[0].mean(), rel=0.1)
    # The standard error of one feature is about 0.007, of the mean of 8 0.0025.
    assert abs(excess(found).mean()) < 0.008


def test_pairs_stay_within_a_context_and_the_counts_equal_loops() -> None:
    generator = np.random.default_rng(4)
    documents = [generator.random((24, 5)) * (generator.random((24, 5)) < 0.5) for _ in range(3)]
    codes = codes_of(documents, contexts_each=2)
    counted = torch.from_numpy(generator.random(72) < 0.8)
    codes = codes._replace(counted=counted)
    thirds = thirds_of([codes], 5)
    sums = information_sums([codes], thirds, 3, 5, lags=(3,))
    states = thirds.states(codes.f)
    expected = np.zeros((3, 5, 16), dtype=int)
    n = np.zeros(3, dtype=int)
    for t in range(72 - 3):
        if counted[t] and counted[t + 3] and codes.context[t] == codes.context[t + 3]:
            n[codes.unit[t]] += 1
            for feature in range(5):
                expected[codes.unit[t], feature, 4 * states[t, feature] + states[t + 3, feature]] += 1
    expected[:, :, 0] = 0
    assert np.array_equal(sums.cells[0, 0], expected)
    assert np.array_equal(sums.n[0, 0], n)
    # A permutation moves tokens, it adds and loses none.
    assert np.array_equal(sums.n[1, 0], n)


def test_thirds_split_positive_values_in_three_and_leave_zeros_off() -> None:
    generator = np.random.default_rng(5)
    f = torch.from_numpy(generator.lognormal(sigma=2.0, size=(6000, 2)) * (generator.random((6000, 2)) < 0.5))
    codes = codes_of([f.numpy()])
    states = thirds_of([codes], 2).states(codes.f)
    assert torch.equal(states == 0, codes.f == 0)
    for feature in range(2):
        counts = torch.bincount(states[:, feature].long(), minlength=4)[1:]
        assert (counts / counts.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


def test_one_document_has_no_matched_pairs_and_a_constant_no_information() -> None:
    codes = codes_of([np.ones((40, 1))])
    sums = information_sums([codes], Thirds(torch.ones(1), torch.ones(1)), 1, 1, lags=(1,))
    assert sums.n[:, 0, 0].tolist() == [39, 39, 0]
    assert np.isnan(information(sums, np.ones(1), slice(None))).all()


def test_miller_madow_takes_the_bias_of_small_samples_away() -> None:
    # 200 draws in 4 x 4 cells: the plain estimate is about (4 - 1)^2 / (2 * 200) = 0.0225 nats too large.
    generator = np.random.default_rng(6)
    joint = generator.multinomial(200, np.full(16, 1 / 16), size=2000).reshape(2000, 4, 4).astype(float)
    assert abs(normalised_information(joint).mean()) < 0.002
