"""Which tokens become pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.train.batches import WindowLoader
from tcsae.train.config import Positives
from tcsae.train.pairs import AskedPairs, Pairs, sample_pairs

KINDS: tuple[Positives, ...] = ("window", "previous", "earlier", "other_document")


def draw_pairs(
    token: list[int] | np.ndarray,
    window: int,
    *,
    positives: Positives = "window",
    document: list[int] | np.ndarray | None = None,
    eligible: list[bool] | np.ndarray | None = None,
    anchors: int = 1000,
    seed: int = 0,
) -> Pairs:
    token = np.asarray(token)
    return sample_pairs(
        token,
        np.arange(len(token)) // window if document is None else np.asarray(document),
        np.ones(len(token), bool) if eligible is None else np.asarray(eligible),
        AskedPairs(window, anchors, positives),
        np.random.default_rng(seed),
    )


def possible_pairs(seeds: int = 60, **case: Any) -> set[tuple[int, int]]:
    """Every (anchor, positive) that some seed draws."""
    found: set[tuple[int, int]] = set()
    for seed in range(seeds):
        pairs = draw_pairs(**case, seed=seed)
        found |= set(zip(pairs.anchor.tolist(), pairs.positive.tolist(), strict=True))
    return found


@pytest.mark.parametrize("positives", ["window", "previous", "earlier"])
def test_pairs_never_cross_a_document(
    make_store: Callable[..., ActivationStore], positives: Positives
) -> None:
    # 90 documents of 9 to 29 rows; each row's activation is its document's number, so a pair tells by itself.
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 30, size=90).tolist()
    number = torch.from_numpy(np.repeat(np.arange(90.0), lengths)).float()
    store = make_store(number[:, None].repeat(1, 4), lengths, context_rows=12, dtype="float32")
    loader = _loader(store, window=4)
    for step in range(30):
        batch = loader.next()
        pairs = sample_pairs(
            batch.token,
            batch.document,
            batch.eligible,
            AskedPairs(4, 16, positives),
            np.random.default_rng(step),
        )
        assert len(pairs.anchor) == 16
        assert torch.equal(batch.raw[pairs.anchor], batch.raw[pairs.positive])
        assert (batch.document[pairs.anchor] == batch.raw[pairs.anchor, 0].numpy()).all()
        assert (batch.position[pairs.anchor] >= 2).all()
        assert (batch.position[pairs.positive] >= 2).all()
        # Within a context too: row numbers differ by positions.
        ahead = batch.position[pairs.anchor] - batch.position[pairs.positive]
        assert ((np.abs(ahead) > 0) & (np.abs(ahead) < 4)).all()
        assert positives == "window" or (ahead > 0).all()
        assert positives != "previous" or (ahead == 1).all()


def _loader(store: ActivationStore, window: int) -> WindowLoader:
    return WindowLoader(
        store,
        None,
        window=window,
        batch_tokens=64,
        seed=0,
        min_position=2,
        device=torch.device("cpu"),
    )


def test_a_positive_never_repeats_the_anchors_token() -> None:
    rng = np.random.default_rng(0)
    token = rng.integers(3, size=64)
    pairs = draw_pairs(token, 8)
    assert len(pairs.anchor) == 64
    assert (token[pairs.anchor] != token[pairs.positive]).all()


def test_positives_are_uniform_over_the_rest_of_the_window() -> None:
    counts = np.zeros((4, 4))
    for seed in range(3000):
        pairs = draw_pairs(np.arange(4), 4, seed=seed)
        counts[pairs.anchor, pairs.positive] += 1
    assert (np.diag(counts) == 0).all()
    assert np.abs(counts[~np.eye(4, dtype=bool)] / 1000 - 1).max() < 0.15


def test_special_tokens_and_early_positions_are_in_no_pair(
    make_store: Callable[..., ActivationStore],
) -> None:
    tokens = np.arange(1, 601)
    tokens[::5] = 0  # special_token_ids of the fixture's provenance
    store = make_store(
        torch.randn(600, 4, generator=torch.Generator().manual_seed(0)), [60] * 10, tokens=tokens
    )
    batch = _loader(store, window=8).next()
    assert (batch.eligible == ((batch.token != 0) & (batch.position >= 2))).all()


def test_a_narrow_arm_pairs_within_its_own_window() -> None:
    pairs = draw_pairs(np.arange(64), 4)
    assert (pairs.anchor // 4 == pairs.positive // 4).all()


# Two windows of four, of two documents. Token 1 is not eligible, tokens 2 and 3 have one id.
CASE: dict[str, Any] = {
    "token": [10, 11, 12, 12, 20, 21, 22, 10],
    "window": 4,
    "eligible": [True, False, True, True, True, True, True, True],
}
FIRST = {0, 2, 3}
SECOND = {4, 5, 6, 7}
POSSIBLE: dict[Positives, set[tuple[int, int]]] = {
    "window": {(0, 2), (0, 3), (2, 0), (3, 0)} | {(i, j) for i in SECOND for j in SECOND if i != j},
    # Not 2 with 1, which is not eligible, nor 4 with 3, of another window; 3 with 2 despite the same id.
    "previous": {(3, 2), (5, 4), (6, 5), (7, 6)},
    "earlier": {(2, 0), (3, 0), (3, 2)} | {(i, j) for i in SECOND for j in SECOND if i > j},
    # All of the other document but for id 10, which tokens 0 and 7 share.
    "other_document": {(i, j) for i in FIRST for j in SECOND} - {(0, 7)}
    | {(i, j) for i in SECOND for j in FIRST} - {(7, 0)},
}


@pytest.mark.parametrize("positives", KINDS)
def test_exactly_the_pairs_that_the_rules_allow_are_drawn(positives: Positives) -> None:
    assert possible_pairs(**CASE, positives=positives) == POSSIBLE[positives]


def test_a_placebo_is_of_another_document_even_where_one_has_several_windows() -> None:
    # Windows 0 and 2 are of document 5, window 1 of document 6.
    found = possible_pairs(
        token=list(range(6)), window=2, document=[5, 5, 6, 6, 5, 5], positives="other_document"
    )
    assert found == {(i, j) for i in (0, 1, 4, 5) for j in (2, 3)} | {
        (i, j) for i in (2, 3) for j in (0, 1, 4, 5)
    }


def test_a_placebo_differs_from_the_window_in_its_positives_alone() -> None:
    true, placebo = (
        draw_pairs(np.arange(64), 8, positives=kind, anchors=20) for kind in ("window", "other_document")
    )
    assert true.anchor.tolist() == placebo.anchor.tolist()
    assert (true.positive // 8 == true.anchor // 8).all()
    assert (placebo.positive // 8 != placebo.anchor // 8).all()


@pytest.mark.parametrize(
    ("positives", "anchor", "expected"),
    [("earlier", 3, {0, 1, 2}), ("other_document", 0, {4, 5, 6, 7})],
)
def test_positives_are_uniform_over_what_is_possible(
    positives: Positives, anchor: int, expected: set[int]
) -> None:
    counts: dict[int, int] = dict.fromkeys(expected, 0)
    for seed in range(2000):
        pairs = draw_pairs(np.arange(8), 4, positives=positives, seed=seed)
        counts[pairs.positive[pairs.anchor == anchor].item()] += 1
    assert counts.keys() == expected
    mean = 2000 / len(expected)
    assert all(abs(n / mean - 1) < 0.15 for n in counts.values())


@pytest.mark.parametrize("positives", KINDS)
def test_anchors_differ_and_are_as_many_as_asked_for_or_as_there_are(positives: Positives) -> None:
    # Of 64 tokens in windows of 8 all but each window's first have one before; the placebo has seven windows.
    able = {"window": 64, "previous": 56, "earlier": 56, "other_document": 64}[positives]
    for anchors in (10, 1000):
        pairs = draw_pairs(np.arange(64), 8, positives=positives, anchors=anchors)
        assert len(set(pairs.anchor.tolist())) == len(pairs.positive) == min(anchors, able)


@pytest.mark.parametrize("positives", KINDS)
def test_pairs_are_a_function_of_the_stream(positives: Positives) -> None:
    first, again, other = (draw_pairs(np.arange(64), 8, positives=positives, seed=s) for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_batch_of_one_document_has_no_placebo() -> None:
    pairs = draw_pairs(np.arange(8), 4, positives="other_document", document=[0] * 8)
    assert len(pairs.anchor) == len(pairs.positive) == 0
