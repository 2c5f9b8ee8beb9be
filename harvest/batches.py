"""One chunk of the store: which contexts it needs, in which batches they run, and where their rows go.

A chunk is computed on its own. The contexts that overlap it are sorted by length and cut into batches where
that leaves the least to compute, so what a batch holds follows from the layout and the batch size alone, never
from what has run before: matrix products round differently for other shapes, and only so are a resumed store's
bytes those of an uninterrupted one. A context that crosses a chunk's border runs for both chunks: with 127 rows a
context and 16,384 a chunk, that is at most 1.6 % of the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tcsae.store.layout import Layout

BATCH_COST = 64
"""What a batch costs beyond its tokens, in tokens: a batch less is worth that much padding. A fit of times over sizes
gives 40 in float32 and 90 in bfloat16 for SmolLM2 on two cores; between 32 and 128 the work changes by 1 %."""


class Batch(NamedTuple):
    """Contexts that run together, padded on the right to the longest."""

    contexts: npt.NDArray[np.int64]
    """indices into the layout's contexts"""
    length: int
    """tokens of the longest, a BOS included"""


@runtime_checkable
class Model(Protocol):
    """What running a chunk needs of a language model."""

    @property
    def bos_token_id(self) -> int | None:
        """token that precedes every context, or None"""

    def residuals(
        self, input_ids: Int[Tensor, "batch position"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch position d_model"]]:
        """activations at the hooks"""


def contexts_of(layout: Layout, start: int, stop: int) -> tuple[int, int]:
    """Contexts ``[first, last)`` that hold any of the rows ``[start, stop)``."""
    first = int(np.searchsorted(layout.context_offsets, start, side="right")) - 1
    last = int(np.searchsorted(layout.context_offsets, stop, side="left"))
    return first, last


def batches_of(layout: Layout, start: int, stop: int, *, batch_tokens: int, has_bos: bool) -> list[Batch]:
    """Batches that cover the rows ``[start, stop)``, longest contexts first.

    Of contexts of 3, 9, 8 and 2 tokens, with 18 tokens a batch, the batches are (9, 8) and (3, 2):

    >>> from tcsae.store.layout import documents_table
    >>> ids = ["a", "b", "c", "d"]
    >>> offsets = np.array([0, 3, 12, 20, 22])
    >>> layout = Layout(np.zeros(22, np.int32), offsets, offsets, documents_table({"id": ids}))
    >>> [batch.contexts.tolist() for batch in batches_of(layout, 0, 22, batch_tokens=18, has_bos=False)]
    [[1, 2], [0, 3]]
    """
    first, last = contexts_of(layout, start, stop)
    lengths = np.diff(layout.context_offsets[first : last + 1]) + has_bos
    order = np.argsort(-lengths, kind="stable")
    cuts = _cuts(lengths[order], batch_tokens)
    return [Batch(first + order[a:b], int(lengths[order[a]])) for a, b in itertools.pairwise(cuts)]


def _cuts(lengths: npt.NDArray[np.int64], batch_tokens: int) -> list[int]:
    """Where to cut contexts of falling ``lengths``: least padded tokens and `BATCH_COST` a batch.

    A second batch is worth it where it saves more padding than it costs:

    >>> _cuts(np.array([900, 890, 200, 190]), 4096)
    [0, 2, 4]
    >>> _cuts(np.array([30, 28, 22, 20]), 4096)
    [0, 4]
    """
    n = len(lengths)
    cost, begin = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
    cost[0] = 0.0
    for at, length in enumerate(lengths.tolist()):
        ends = slice(at + 1, at + 1 + max(1, batch_tokens // length))
        with_this = cost[at] + BATCH_COST + length * np.arange(1, len(cost[ends]) + 1)
        begin[ends] = np.where(with_this < cost[ends], at, begin[ends])
        cost[ends] = np.minimum(with_this, cost[ends])
    cuts = [n]
    while cuts[-1]:
        cuts.append(int(begin[cuts[-1]]))
    return cuts[::-1]


def padded_tokens(batches: Sequence[Batch]) -> int:
    """Tokens that the model reads for the batches, BOS and padding included."""
    return sum(len(batch.contexts) * batch.length for batch in batches)


def input_ids(layout: Layout, batch: Batch, bos_token_id: int | None) -> Int[Tensor, "batch position"]:
    """Token ids of a batch: perhaps a BOS, the context, then padding of zeros that nothing attends to."""
    ids = np.zeros((len(batch.contexts), batch.length), dtype=np.int64)
    lead = 0 if bos_token_id is None else 1
    if bos_token_id is not None:
        ids[:, 0] = bos_token_id
    for line, context in zip(ids, batch.contexts, strict=True):
        start, stop = layout.context_offsets[context : context + 2]
        line[lead : lead + stop - start] = layout.tokens[start:stop]
    return torch.from_numpy(ids)


def run_chunk(
    model: Model,
    layout: Layout,
    start: int,
    stop: int,
    *,
    hooks: Sequence[str],
    d_model: int,
    batch_tokens: int,
    on_rows: Callable[[int], None] = lambda _: None,
) -> dict[str, Float[Tensor, "row d_model"]]:
    """Activations of the rows ``[start, stop)`` at every hook, in the pass's dtype, BOS rows left out.

    ``on_rows`` hears, after each batch, how many of the rows it gave.
    """
    rows: dict[str, Tensor] = {}
    lead = 0 if model.bos_token_id is None else 1
    for batch in batches_of(layout, start, stop, batch_tokens=batch_tokens, has_bos=bool(lead)):
        found = model.residuals(input_ids(layout, batch, model.bos_token_id), hooks)
        for hook in hooks if not rows else ():
            rows[hook] = torch.full((stop - start, d_model), torch.nan, dtype=found[hook].dtype)
        n_rows = 0
        for line, begin, end in _overlaps(layout, batch, start, stop):
            offset = lead - int(layout.context_offsets[batch.contexts[line]])
            for hook in hooks:
                rows[hook][begin - start : end - start] = found[hook][line, begin + offset : end + offset]
            n_rows += end - begin
        on_rows(n_rows)
    return rows


def _overlaps(layout: Layout, batch: Batch, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """For each line of the batch, the rows ``[begin, end)`` of its context that lie in ``[start, stop)``."""
    for line, context in enumerate(batch.contexts):
        begin, end = (int(row) for row in layout.context_offsets[context : context + 2])
        yield line, max(begin, start), min(end, stop)
