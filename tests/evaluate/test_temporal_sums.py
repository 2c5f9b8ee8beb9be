"""Every metric against a slow implementation that knows nothing of sums, units or sparse codes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tcsae.evaluate.information import thirds_of
from tcsae.evaluate.temporal_codes import Codes, neighbours, pairings
from tcsae.evaluate.temporal_sums import TemporalSums

from .sequences import by_name, codes_of, sparse, sums_of
from .slow_figures import Slow

LAGS = (1, 3, 8)
N_FEATURES = 3


@pytest.fixture
def text() -> Codes:
    """Four documents of two or three contexts, a fifth of the tokens not counted, steps that differ."""
    generator = np.random.default_rng(4)
    documents = [
        sparse(n, N_FEATURES, generator, density)
        for n, density in ((48, 0.5), (30, 0.2), (72, 0.7), (24, 0.4))
    ]
    n = sum(map(len, documents))
    return codes_of(
        documents,
        contexts_each=2,
        counted=generator.random(n) < 0.8,
        step=generator.uniform(0.5, 2.0, size=n),
    )


@pytest.mark.parametrize("left_out", [None, 0, 2])
def test_every_metric_is_its_loops_definition_on_all_documents_and_without_one(
    text: Codes, left_out: int | None
) -> None:
    found = by_name(sums_of(text, LAGS))
    at = 0 if left_out is None else 1 + left_out
    for feature in range(N_FEATURES):
        slow = Slow(text, feature, [d for d in range(4) if d != left_out])
        for name in ("autocorrelation", "within_autocorrelation", "persistence", "information"):
            for lag in LAGS:
                expected = getattr(slow, name)(lag)
                assert found[f"{name}_lag{lag}"][at, feature] == pytest.approx(expected, abs=1e-6), name
        for name in ("run_length", "smoothness", "total_variation"):
            assert found[name][at, feature] == pytest.approx(getattr(slow, name)(), rel=1e-6), name


def test_t_saes_smoothness_is_the_mean_over_contexts_of_the_mean_over_features_that_are_on(
    text: Codes,
) -> None:
    sums = sums_of(text, LAGS, block_size=1)
    f = text.dense()
    expected: dict[str, list[float]] = {"whole": [], "H": [], "L": []}
    for context in text.context.unique():
        slopes: list[list[float]] = [[] for _ in range(N_FEATURES)]
        rows = torch.nonzero((text.context == context) & text.counted).flatten().tolist()
        for a, b in itertools.pairwise(rows):
            if b == a + 1:
                for feature in range(N_FEATURES):
                    slopes[feature].append(float((f[b, feature] - f[a, feature]).abs() / text.step[b]))
        for part, features in (("whole", (0, 1, 2)), ("H", (0,)), ("L", (1, 2))):
            # a pair with a feature on has a slope above 0 here, where no two values are equal
            steepest = [max(slopes[feature]) for feature in features if max(slopes[feature], default=0.0) > 0]
            if steepest:
                expected[part].append(sum(steepest) / len(steepest))
    for at, part in enumerate(("whole", "H", "L")):
        above, n = sums.published[:, at].sum(axis=0)
        assert n == len(expected[part])
        assert above / n == pytest.approx(sum(expected[part]) / n, rel=1e-6)


def test_a_run_that_a_context_cuts_counts_with_the_length_that_is_seen() -> None:
    # two contexts of 6: runs of 2, 1 | 3, and 1 that the end cuts, as the border cuts 1 | 3
    x = np.array([1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1], dtype=float)[:, None]
    found = by_name(sums_of(codes_of([x], contexts_each=2), (1,)))
    assert found["run_length"][0, 0] == (2 + 1 + 3 + 1) / 4


def test_a_run_ends_at_a_token_that_does_not_count() -> None:
    x = np.ones((7, 1))
    counted = np.array([False, True, True, True, False, True, True])
    found = by_name(sums_of(codes_of([x], counted=counted), (1,)))
    assert found["run_length"][0, 0] == (3 + 2) / 2


# Nulls -------------------------------------------------------------------------------------------------


def test_every_kind_of_pair_has_the_counts_of_loops(text: Codes) -> None:
    sums = sums_of(text, LAGS, seed=7)
    thirds = thirds_of([text], N_FEATURES)
    states = torch.zeros(text.n_rows, N_FEATURES, dtype=torch.int64)
    states[text.row, text.feature] = thirds.states(text.value, text.feature)
    expected = np.zeros((3, 3, 4, 4, 4, N_FEATURES), dtype=int)
    for kind, at, pairing in pairings(text, LAGS, np.random.default_rng([7])):
        for first, second in enumerate(pairing.second.tolist()):
            if second == text.n_rows:
                continue
            assert text.counted[first]
            assert text.counted[second]
            same = text.document[first] == text.document[second]
            assert bool(same) == (kind < 2)
            for feature in range(N_FEATURES):
                a, b = int(states[first, feature]), int(states[second, feature])
                expected[kind, at, a, b, int(text.document[first]), feature] += 1
    for kind in range(3):
        for at in range(3):
            assert np.array_equal(sums.joint(kind, at), expected[kind, at])


def test_a_permutation_moves_tokens_and_neither_adds_nor_loses_any(text: Codes) -> None:
    sums = sums_of(text, LAGS)
    assert np.array_equal(sums.n_pairs[:, 1], sums.n_pairs[:, 0])


def test_a_matched_pair_has_the_places_of_the_pair_that_it_stands_for() -> None:
    # contexts 0 and 1 are the first half: 0 (6 tokens) is matched with 3 (5 tokens), 1 (4) with 2 (3)
    codes = codes_of([np.ones((n, 1)) for n in (6, 4, 3, 5)])
    found = {
        kind: pairing.second.tolist() for kind, _, pairing in pairings(codes, (2,), np.random.default_rng(0))
    }
    none = 18
    # starts are 0, 6, 10, 13; a second token that the other context does not reach is nobody's
    assert found[2][:6] == [15, 16, 17, none, none, none]
    assert found[2][6:10] == [12, none, none, none]
    assert found[2][10:13] == [8, none, none]
    assert found[2][13:] == [2, 3, 4, none, none]


def test_neighbours_are_next_to_each_other_in_one_context() -> None:
    codes = codes_of([np.ones((3, 1)), np.ones((2, 1))])
    assert neighbours(codes).second.tolist() == [1, 2, 5, 4, 5]
    assert neighbours(codes).first.tolist() == [5, 0, 1, 5, 3]


# Adding up ---------------------------------------------------------------------------------------------


def cut(codes: Codes, rows: list[int]) -> list[Codes]:
    """Blocks that begin at ``rows``."""
    blocks = []
    for start, stop in zip(rows, [*rows[1:], codes.n_rows], strict=True):
        inside = (codes.row >= start) & (codes.row < stop)
        blocks.append(
            Codes(
                codes.row[inside] - start,
                codes.feature[inside],
                codes.value[inside],
                codes.d_sae,
                *(part[start:stop] for part in codes[4:]),
            )
        )
    return blocks


def test_a_document_may_go_on_in_the_next_block(text: Codes) -> None:
    # contexts begin at 0, 24 | 48, 63 | 78, 114 | 150, 162
    whole, blocks = sums_of(text, LAGS), sums_of(cut(text, [0, 24, 63, 114, 162]), LAGS)
    assert np.array_equal(blocks.n, whole.n)
    assert blocks.values == pytest.approx(whole.values)
    assert blocks.published == pytest.approx(whole.published)
    assert np.array_equal(blocks.n_pairs[:, 0], whole.n_pairs[:, 0])
    for at in range(len(LAGS)):
        assert np.array_equal(blocks.joint(0, at), whole.joint(0, at))


def test_documents_without_a_counted_token_are_no_units() -> None:
    counted = np.array([True] * 6 + [False] * 4 + [True] * 5)
    sums = sums_of(codes_of([np.ones((n, 1)) for n in (6, 4, 5)], counted=counted), (1,))
    assert sums.without_empty_units().n.tolist() == [6, 5]


def test_memory_is_what_the_bound_on_units_reckons_with() -> None:
    from tcsae.evaluate.temporal_sums import bytes_per_unit

    sums = TemporalSums.zeros(3, 50, LAGS)
    assert sums.values.nbytes + sums.cells.nbytes == 3 * bytes_per_unit(50, 3)
