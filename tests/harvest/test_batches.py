"""A chunk's rows are its contexts' activations, in place, whatever the chunk's borders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tcsae.harvest.batches import BATCH_COST, batches_of, contexts_of, input_ids, padded_tokens, run_chunk
from tcsae.harvest.tokens import cut, offsets_of
from tcsae.store import Layout
from tcsae.store.layout import documents_table

LENGTHS = [7, 2, 30, 11, 5, 19]


def make_layout(rows_per_context: int = 8) -> Layout:
    offsets = offsets_of(LENGTHS)
    table = documents_table({"id": [str(i) for i in range(len(LENGTHS))]})
    return Layout(
        np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, cut(offsets, rows_per_context), table
    )


class Running:
    """A causal model of two dimensions: the token, and the sum of the tokens up to it."""

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id

    def residuals(self, input_ids: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        activation = torch.stack([input_ids, input_ids.cumsum(1)], dim=-1).float()
        return {hook: activation * (i + 1) for i, hook in enumerate(hooks)}


@pytest.mark.parametrize("bos", [None, 0, 50], ids=["without BOS", "with BOS 0", "with BOS 50"])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 16, 1000])
def test_rows_are_each_contexts_own_whatever_the_chunks(bos: int | None, rows_per_chunk: int) -> None:
    layout = make_layout()
    expected = []
    for start, stop in zip(layout.context_offsets[:-1], layout.context_offsets[1:], strict=True):
        tokens = layout.tokens[start:stop]
        expected += list(zip(tokens, np.cumsum(tokens) + (bos or 0), strict=True))
    got = []
    for start in range(0, layout.n_rows, rows_per_chunk):
        stop = min(start + rows_per_chunk, layout.n_rows)
        rows = run_chunk(Running(bos), layout, start, stop, hooks=["a", "b"], d_model=2, batch_tokens=20)
        assert torch.equal(rows["b"], 2 * rows["a"])
        got.append(rows["a"])
    assert torch.equal(torch.cat(got), torch.tensor(np.array(expected)).float())


def test_batches_hold_each_overlapping_context_once_within_the_bound() -> None:
    layout = make_layout()
    first, last = contexts_of(layout, 10, 50)
    batches = batches_of(layout, 10, 50, batch_tokens=20, has_bos=True)
    assert sorted(np.concatenate([batch.contexts for batch in batches])) == list(range(first, last))
    assert layout.context_offsets[first] <= 10 < layout.context_offsets[first + 1]
    assert layout.context_offsets[last - 1] < 50 <= layout.context_offsets[last]
    assert all(len(batch.contexts) * batch.length <= 20 for batch in batches)
    assert padded_tokens(batches) <= 20 * len(batches)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_sorted_contexts_costs_less(seed: int) -> None:
    stream = np.random.default_rng(seed)
    lengths = np.sort(stream.integers(1, 900, size=9))[::-1]
    most = 2000

    def cost(inside: tuple[int, ...]) -> float:
        cuts = [0, *inside, len(lengths)]
        batches = [lengths[a:b] for a, b in itertools.pairwise(cuts)]
        if any(len(batch) > max(1, most // batch[0]) for batch in batches):
            return np.inf
        return sum(batch[0] * len(batch) + BATCH_COST for batch in batches)

    offsets = np.r_[0, np.cumsum(lengths)]
    layout = Layout(
        np.zeros(offsets[-1], np.int32),
        offsets,
        offsets,
        documents_table({"id": [str(n) for n in range(len(lengths))]}),
    )
    batches = batches_of(layout, 0, int(offsets[-1]), batch_tokens=most, has_bos=False)
    ways = (
        inside for n in range(len(lengths)) for inside in itertools.combinations(range(1, len(lengths)), n)
    )
    assert padded_tokens(batches) + BATCH_COST * len(batches) == min(map(cost, ways))


def test_progress_counts_every_row_once() -> None:
    layout = make_layout()
    counted: list[int] = []
    run_chunk(Running(0), layout, 10, 50, hooks=["a"], d_model=2, batch_tokens=20, on_rows=counted.append)
    assert sum(counted) == 40


def test_padding_is_on_the_right() -> None:
    layout = make_layout(rows_per_context=3)
    batch = batches_of(layout, 0, 9, batch_tokens=100, has_bos=True)[0]
    # documents of 7 and 2 rows in contexts of 3, 3, 1 and 2; the longest first, then in order
    assert input_ids(layout, batch, 50).tolist() == [
        [50, 1, 2, 3],
        [50, 4, 5, 6],
        [50, 8, 9, 0],
        [50, 7, 0, 0],
    ]
