"""The loader: what an epoch holds, in which order, and going on after a stop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError, StoreCorrupt
from tcsae.train.batches import Rows, WindowLoader


def loader(
    store: ActivationStore, *, window: int = 8, batch_tokens: int = 128, seed: int = 0
) -> WindowLoader:
    return WindowLoader(
        store,
        None,
        window=window,
        batch_tokens=batch_tokens,
        seed=seed,
        min_position=0,
        device=torch.device("cpu"),
    )


@pytest.fixture
def numbered(make_store: Callable[..., ActivationStore]) -> ActivationStore:
    """Rows whose token id is the row's number."""
    lengths = np.random.default_rng(0).integers(5, 90, size=40).tolist()
    draw = torch.Generator().manual_seed(0)
    return make_store(torch.randn(sum(lengths), 4, generator=draw), lengths, dtype="float32")


def windows(batches: list[Rows], window: int = 8) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.token.reshape(-1, window).tolist()]


def test_an_epoch_holds_as_many_windows_as_fit_each_once_and_none_leaves_its_context(
    numbered: ActivationStore,
) -> None:
    one = loader(numbered, batch_tokens=8)
    found = windows([one.next() for _ in range(one.windows_per_epoch)])
    assert one.epoch == 1
    assert len(set(found)) == len(found)
    rows = [row for window in found for row in window]
    assert len(set(rows)) == len(rows)  # windows do not overlap
    per_context: dict[int, int] = {}
    for window in found:
        assert list(window) == list(range(window[0], window[0] + 8))
        context = int(np.searchsorted(numbered.context_offsets, window[0], side="right")) - 1
        assert window[-1] < numbered.context_offsets[context + 1]
        per_context[context] = per_context.get(context, 0) + 1
    lengths = np.diff(numbered.context_offsets)
    expected = {int(c): int(lengths[c] // 8) for c in numbered.contexts_in("train") if lengths[c] >= 8}
    assert per_context == expected


def test_random_phases_reach_every_token_of_the_train_split_over_epochs(numbered: ActivationStore) -> None:
    one = loader(numbered)
    n_batches = 60 * one.windows_per_epoch // one.windows_per_batch
    seen = {row for _ in range(n_batches) for row in one.next().token.tolist()}
    lengths = np.diff(numbered.context_offsets)
    fits = [c for c in numbered.contexts_in("train") if lengths[c] >= 8]
    every = {r for c in fits for r in range(numbered.context_offsets[c], numbered.context_offsets[c + 1])}
    assert seen == every


def test_the_order_is_new_each_epoch_and_the_same_for_the_same_seed(numbered: ActivationStore) -> None:
    one, again, other = loader(numbered), loader(numbered), loader(numbered, seed=1)
    n = one.windows_per_epoch // one.windows_per_batch
    first, repeated, different = (windows([x.next() for _ in range(n)]) for x in (one, again, other))
    assert first == repeated
    assert first != different
    second = windows([one.next() for _ in range(n)])
    assert first != second


def test_a_batch_that_crosses_the_end_of_an_epoch_is_whole(numbered: ActivationStore) -> None:
    one = loader(numbered)
    n = 3 * one.windows_per_epoch // one.windows_per_batch
    assert all(len(one.next().x) == 128 for _ in range(n))
    assert one.epoch in (2, 3)


def test_a_restored_loader_goes_on_with_the_next_batch(numbered: ActivationStore) -> None:
    one, resumed = loader(numbered), loader(numbered)
    # 30 batches cross an epoch's end: the store has about 100 windows a epoch, 16 a batch.
    for _ in range(30):
        one.next()
    resumed.load_state_dict(one.state_dict())
    for _ in range(30):
        assert windows([one.next()]) == windows([resumed.next()])


def test_what_is_read_ahead_is_not_taken_for_used(numbered: ActivationStore) -> None:
    one, expected = loader(numbered), loader(numbered)
    every = [windows([expected.next()]) for _ in range(12)]
    for i in range(11):
        assert (one.epoch, one.cursor) == divmod(16 * i, one.windows_per_epoch)
        assert windows([one.next()]) == every[i]
        one.begin_ring_rows(i, 32)
        state = one.state_dict()
        if i % 3 == 0:  # the batch that was read ahead is another then
            one.load_state_dict({**state, "epoch": 5, "cursor": 3})
            one.next()
            one.load_state_dict(state)
        resumed = loader(numbered)
        resumed.load_state_dict(state)
        assert windows([resumed.next()]) == every[i + 1]
        for mine, theirs in zip(one.ring_rows(i, 32), expected.ring_rows(i, 32), strict=True):
            assert torch.equal(mine, theirs)


def test_a_batch_stays_as_it_is_while_the_next_is_read(numbered: ActivationStore) -> None:
    one = loader(numbered)
    for step in range(6):
        batch = one.next()
        raw = batch.raw.clone()
        one.begin_ring_rows(step, 32)
        one.ring_rows(step, 32)  # read after the next batch: both are done now
        assert torch.equal(batch.raw, raw)
        assert torch.equal(
            batch.raw, numbered.gather(batch.token.astype(np.int64))
        )  # a token's id is its row


def test_a_damaged_chunk_is_named_at_the_step_that_needs_it(
    make_store: Callable[..., ActivationStore],
) -> None:
    x = torch.randn(1200, 4, generator=torch.Generator().manual_seed(0))
    store = make_store(x, [60] * 20, dtype="float32", rows_per_chunk=50)
    one, expected = (loader(store, batch_tokens=16) for _ in range(2))
    # Rows have their number as token id.
    needed = [set((expected.next().token // 50).tolist()) for _ in range(20)]
    first, chunk = next((i, c) for i in range(5, 20) for c in needed[i] - set().union(*needed[:i]))
    path = store.path / "activations" / store.hooks[0] / "c" / str(chunk) / "0"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    for _ in range(first):
        one.next()
    with pytest.raises(StoreCorrupt, match=f"c/{chunk}/0"):
        one.next()


def test_only_train_documents_are_read(numbered: ActivationStore) -> None:
    one, train = loader(numbered), set(numbered.documents_in("train").tolist())
    assert len(train) < numbered.n_documents
    for step in range(20):
        assert set(one.next().document.tolist()) <= train
        assert set(one.ring_rows(step, 32).document.tolist()) <= train


def test_the_ring_gets_tokens_of_contexts_in_proportion_to_their_eligible_positions(
    make_store: Callable[..., ActivationStore],
) -> None:
    # Contexts of 10 and of 25 tokens in turn; from position 4 on they have 6 and 21.
    lengths = [10, 25] * 20
    draw = torch.Generator().manual_seed(0)
    store = make_store(torch.randn(sum(lengths), 4, generator=draw), lengths, dtype="float32")
    one = WindowLoader(
        store, None, window=8, batch_tokens=64, seed=0, min_position=4, device=torch.device("cpu")
    )
    of = np.diff(store.document_offsets)
    long = short = 0
    for step in range(200):
        rows = one.ring_rows(step, 64)
        assert len(rows.raw) == 64
        assert (rows.position >= 4).all()
        drawn = of[rows.document]
        long, short = long + int((drawn == 25).sum()), short + int((drawn == 10).sum())
    train = of[store.documents_in("train")]
    expected = 21 * (train == 25).sum() / (6 * (train == 10).sum())
    assert long / short == pytest.approx(expected, rel=0.1)


def test_rows_are_normalised_to_mean_zero_and_square_norm_d_model(numbered: ActivationStore) -> None:
    one = loader(numbered)
    x = torch.cat([one.next().x.clone() for _ in range(100)]).double()
    assert x.mean(dim=0).abs().max() < 0.1
    assert x.square().sum(dim=1).mean().item() == pytest.approx(4, rel=0.1)


def test_outliers_are_zeroed_and_marked(make_store: Callable[..., ActivationStore]) -> None:
    activations = torch.ones(400, 4) + 0.1 * torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    activations[5::25] *= 500
    one = loader(make_store(activations, [50] * 8), window=5, batch_tokens=100)
    batch = one.next()
    expected = batch.position != 5
    assert (batch.valid.numpy() == expected).all()
    assert not batch.x[~batch.valid].any()
    assert (batch.eligible <= expected).all()
    assert batch.x[batch.valid].abs().max() < 20


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"window": 32, "batch_tokens": 64}, "window: 32 tokens, but the longest context .* has 25"),
        (
            {"batch_tokens": 8000},
            r"8000 tokens are 1000 windows of 8, but .* train split has \d+ \(\d+ tokens\)",
        ),
    ],
    ids=["a window longer than every context", "a batch larger than the split"],
)
def test_what_the_store_cannot_serve_is_refused_with_the_numbers(
    numbered: ActivationStore, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(numbered, **sizes)
