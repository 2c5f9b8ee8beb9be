"""The documents that figures rest on, in blocks of stored rows and in batches for the model.

A token counts ("kept") if it is not one of the tokenizer's special tokens; figures from stored activations
also leave out the store's outliers (rows with a norm above ten times the median, which would each outweigh
thousands of others in a variance) and count them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.evaluate.config import EvaluatedSplit
from tcsae.store.errors import StoreMismatch
from tcsae.store.reader import ActivationStore

BLOCK_ROWS = 2048
"""Rows of a block: large enough for full speed, small enough to stay near the caches."""

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Block:
    """Stored rows of whole contexts of some held-out documents, in document order."""

    x: Float[Tensor, "row d_model"]
    """raw activations, float32"""
    kept: Bool[Tensor, " row"]
    """neither special nor an outlier"""
    n_outliers: int
    """outliers among the tokens that are not special"""
    position: Int64[Tensor, " row"]
    """from the context's first stored token, which is 0"""
    context: Int64[Tensor, " row"]
    """number of the context in the store"""
    document: Int64[Tensor, " row"]
    """index of the document among the held-out ones"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Contexts as the model reads them: the BOS put back in front, padded on the right.

    Padding cannot change what stands before it in a causal model; it is neither kept nor a target.
    """

    input_ids: Int64[Tensor, "batch position"]
    """token ids, padding is 0"""
    keep: Bool[Tensor, "batch position"]
    """neither a special token nor padding"""
    length: tuple[int, ...]
    """real tokens of each row, BOS included"""
    document: tuple[int, ...]
    """index of each row's document among the replayed ones"""


class HeldOut:
    """One split of a store at one hook.

    Raises
    ------
    StoreMismatch
        the split has no document
    """

    def __init__(self, store: ActivationStore, hook: str, split: EvaluatedSplit) -> None:
        self.store = store
        self.hook = hook
        self.split = split
        self.documents: Indices = store.documents_in(split)
        if not len(self.documents):
            raise StoreMismatch(
                f"{store.url}: no document in split {split!r} ({store.n_documents} documents in all); "
                "harvest more documents or evaluate on another split"
            )
        self.contexts: Indices = store.contexts_in(split)
        self.outlier_norm = store.statistics(hook).outlier_norm
        self._special = np.array(store.provenance.special_token_ids, dtype=np.int64)
        index_of = np.full(store.n_documents, -1, dtype=np.int64)
        index_of[self.documents] = np.arange(len(self.documents))
        self.document_of_context: Indices = index_of[store.document_of_context[self.contexts]]
        self.start: Indices = store.context_offsets[self.contexts]
        self.length: Indices = store.context_offsets[self.contexts + 1] - self.start

    @property
    def n_documents(self) -> int:
        """documents of the split"""
        return len(self.documents)

    @property
    def n_tokens(self) -> int:
        """stored tokens of the split"""
        return int(self.length.sum())

    def units(self, most: int) -> Int64[Tensor, " document"]:
        """Unit of each held-out document: itself, or document number modulo ``most`` if there are more.

        Dealing documents out in turn keeps neighbours (which may share a source) apart, so the groups are
        as exchangeable as the documents.
        """
        return torch.arange(self.n_documents) % min(most, self.n_documents)

    def only(self, contexts: Indices) -> HeldOut:
        """The same documents with those of their contexts alone that are among ``contexts``, in order."""
        part = copy.copy(self)
        chosen = np.isin(self.contexts, contexts)
        part.contexts, part.document_of_context = self.contexts[chosen], self.document_of_context[chosen]
        part.start, part.length = self.start[chosen], self.length[chosen]
        return part

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[Block]:
        """Every stored token of the split once, in order, about ``rows`` at a time, contexts whole."""
        ends = np.cumsum(self.length)
        first = 0
        while first < len(self.contexts):
            done = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + rows, side="right")))
            yield self.block(np.arange(first, last))
            first = last

    def block(self, contexts: Indices) -> Block:
        """Every stored token of some contexts, which are numbered within the split, in the order given."""
        spans = [(int(self.start[c]), int(self.start[c] + self.length[c])) for c in contexts]
        x = torch.cat([self.store.rows(a, b, self.hook) for a, b in spans]).to(torch.float32)
        tokens = np.concatenate([self.store.tokens[a:b] for a, b in spans])
        lengths = self.length[contexts]
        real = torch.from_numpy(~np.isin(tokens, self._special))
        outlier = torch.linalg.vector_norm(x, dim=-1) > self.outlier_norm
        return Block(
            x=x,
            kept=real & ~outlier,
            n_outliers=int((real & outlier).sum()),
            position=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
            context=torch.from_numpy(np.repeat(self.contexts[contexts], lengths)),
            document=torch.from_numpy(np.repeat(self.document_of_context[contexts], lengths)),
        )

    def batches(self, max_tokens: int, batch_size: int, seed: int) -> list[Batch]:
        """Whole contexts drawn at random until ``max_tokens`` stored tokens, in batches for the model.

        The contexts are drawn without regard to length and then sorted by it, so that a batch holds rows of
        about one length and little is spent on padding. The last batch may be smaller. At least one context
        is drawn. Documents are numbered in the order of the store among those drawn.
        """
        order = np.random.default_rng(seed).permutation(len(self.contexts))
        n_drawn = max(1, int(np.searchsorted(np.cumsum(self.length[order]), max_tokens, side="right")))
        drawn = np.sort(order[:n_drawn])
        _, document = np.unique(self.document_of_context[drawn], return_inverse=True)
        by_length = np.argsort(self.length[drawn], kind="stable")[::-1]
        parts = [by_length[at : at + batch_size] for at in range(0, n_drawn, batch_size)]
        return [self._batch(drawn[part], document[part]) for part in parts]

    def batch_of(self, contexts: Indices) -> Batch:
        """The contexts with these numbers in the store as one batch, in this order; all must be here."""
        at = np.searchsorted(self.contexts, contexts)
        return self._batch(at, self.document_of_context[at])

    def _batch(self, contexts: Indices, document: Indices) -> Batch:
        bos = self.store.provenance.bos_token_id
        front = [] if bos is None else [bos]  # 0 is a BOS (Pythia's)
        rows = [
            [*front, *self.store.tokens[self.start[c] : self.start[c] + self.length[c]].tolist()]
            for c in contexts
        ]
        longest = max(len(row) for row in rows)
        input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        length = torch.tensor([len(row) for row in rows])
        special = torch.isin(input_ids, torch.from_numpy(self._special))
        return Batch(
            input_ids=input_ids,
            keep=~special & (torch.arange(longest) < length[:, None]),
            length=tuple(length.tolist()),
            document=tuple(int(d) for d in document),
        )
