"""Which tokens become pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tcsae.store import ActivationStore
from tcsae.train.batches import WindowLoader
from tcsae.train.pairs import sample_pairs


def test_pairs_never_cross_a_document(make_store: Callable[..., ActivationStore]) -> None:
    # 90 documents of 9 to 29 rows; each row's activation is its document's number, so a pair tells by itself.
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 30, size=90).tolist()
    number = torch.from_numpy(np.repeat(np.arange(90.0), lengths)).float()
    store = make_store(number[:, None].repeat(1, 4), lengths, context_rows=12, dtype="float32")
    loader = _loader(store, window=4)
    for step in range(30):
        batch = loader.next()
        pairs = sample_pairs(batch.token, batch.eligible, 4, 16, np.random.default_rng(step))
        assert len(pairs.anchor) == 16
        assert torch.equal(batch.raw[pairs.anchor], batch.raw[pairs.positive])
        assert (batch.document[pairs.anchor] == batch.raw[pairs.anchor, 0].numpy()).all()
        assert (batch.position[pairs.anchor] >= 2).all()
        assert (batch.position[pairs.positive] >= 2).all()
        # Within a context too: row numbers differ by positions.
        apart = np.abs(batch.position[pairs.anchor] - batch.position[pairs.positive])
        assert ((apart > 0) & (apart < 4)).all()


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
    pairs = sample_pairs(token, np.ones(64, bool), 8, 64, rng)
    assert (token[pairs.anchor] != token[pairs.positive]).all()


def test_positives_are_uniform_over_the_rest_of_the_window() -> None:
    counts = np.zeros((4, 4))
    for seed in range(3000):
        pairs = sample_pairs(np.arange(4), np.ones(4, bool), 4, 4, np.random.default_rng(seed))
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
    pairs = sample_pairs(np.arange(64), np.ones(64, bool), 4, 64, np.random.default_rng(0))
    assert (pairs.anchor // 4 == pairs.positive // 4).all()
