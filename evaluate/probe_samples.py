"""What probes are trained and tested on: contexts and tokens with labels, split by document.

A probe is trained on documents of the store's train split and tested on documents of its test split, which the
SAE has not seen either. Nothing of a document ever stands on both sides: neighbouring contexts of one document
are so alike that a probe could know a label by recognising the document.

**Labels of contexts** (topic, source): one sample a context. Classes with fewer than `MIN_TRAIN_DOCUMENTS` or
`MIN_TEST_DOCUMENTS` documents are left out.

**Labels of tokens** (position, token, previous token), for the leak gates; the first `SKIPPED_POSITIONS` tokens
of a context and special tokens are left out, as in the temporal metrics. Position: which of `N_POSITION_BUCKETS`
equal parts of the context a token stands in, on contexts of the full length alone and one token of each part
from every context, so that a position says nothing of the document. Token, previous token: which of the
`N_TOKENS` most frequent token ids.

The samples are a function of the store and the seed, not of the SAE, so SAEs are compared in pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int64

from tcsae.evaluate.heldout import HeldOut, Indices
from tcsae.evaluate.temporal_codes import SKIPPED_POSITIONS

ContextTask = Literal["topic", "source"]
TokenTask = Literal["position", "token", "previous_token"]
CONTEXT_TASKS: tuple[ContextTask, ...] = get_args(ContextTask)
TOKEN_TASKS: tuple[TokenTask, ...] = get_args(TokenTask)

MIN_TRAIN_DOCUMENTS = 10
"""A class with fewer documents to learn from is left out."""

MIN_TEST_DOCUMENTS = 5
"""A class with fewer documents to be tested on is left out: its accuracy would be a coin's."""

MAX_CLASSES = 32
"""Classes of one task; of more, those with most training documents are kept."""

MAX_TRAIN_CONTEXTS = 4096
"""Contexts that probes learn from; SAEBench has 4,000 texts."""

MAX_TEST_CONTEXTS = 2048
"""Contexts that probes are tested on; SAEBench has 1,000 texts."""

CONTEXTS_PER_DOCUMENT = 16
"""Of a longer document, this many contexts are drawn: one book shall not outweigh a hundred articles."""

MIN_TOKENS = 8
"""Contexts with fewer counted tokens are left out."""

N_POSITION_BUCKETS = 8
"""Parts of a context that the position probe tells apart."""

N_TOKENS = 20
"""Token ids that the token probes tell apart."""

MAX_TRAIN_ROWS = 4000
"""Tokens that one gate's probes learn from."""

MAX_TEST_ROWS = 2000
"""Tokens that one gate's probes are tested on."""


class Side(NamedTuple):
    """The samples of one side of the split."""

    at: Int64[np.ndarray, " sample"]
    """contexts: place among the chosen ones of the side; tokens: row of the store"""
    label: Int64[np.ndarray, " sample"]
    """index of the class"""
    document: Int64[np.ndarray, " sample"]
    """index of the document in the store"""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be told apart, and on which samples."""

    name: ContextTask | TokenTask
    """names the figures"""
    classes: tuple[str, ...]
    """what the labels stand for"""
    train: Side
    """to learn from"""
    test: Side
    """to be tested on; no document of `train` is in it"""
    n_left_out: int
    """classes that are there, but with too few documents (or beyond the most frequent)"""


@dataclass(frozen=True, slots=True)
class NoTask:
    """A task that the store has no samples for."""

    name: ContextTask | TokenTask
    """names the figures"""
    reason: str
    """why, to follow "undefined, because" """


def choose_contexts(held_out: HeldOut, most: int, seed: int) -> HeldOut:
    """``held_out`` with at most ``most`` of its contexts (those of one document at least).

    Documents are dealt out by source and topic in turn, so that rare classes come first where not all
    documents fit; of each document at most `CONTEXTS_PER_DOCUMENT` contexts are drawn.
    """
    generator = np.random.default_rng(seed)
    table = held_out.store.documents
    document_of = _documents(held_out)
    drawn = generator.permutation(len(document_of))
    drawn = drawn[held_out.length[drawn] >= MIN_TOKENS]
    drawn = drawn[_rank_within(document_of[drawn]) < CONTEXTS_PER_DOCUMENT]
    documents = generator.permutation(held_out.documents)
    kind = [str((table["source"][int(d)].as_py(), table["topic"][int(d)].as_py())) for d in documents]
    turn = np.argsort(_rank_within(np.unique(kind, return_inverse=True)[1]), kind="stable")
    documents = documents[turn]
    n_contexts = np.bincount(document_of[drawn], minlength=held_out.store.n_documents)[documents]
    n_documents = max(1, int(np.searchsorted(np.cumsum(n_contexts), most, side="right")))
    chosen = drawn[np.isin(document_of[drawn], documents[:n_documents])]
    return held_out.only(held_out.contexts[chosen])


def _documents(held_out: HeldOut) -> Indices:
    """Index in the store of each context's document."""
    found: Indices = held_out.store.document_of_context[held_out.contexts]
    return found


def _rank_within(keys: Indices) -> Indices:
    """How many earlier items have the same key.

    >>> _rank_within(np.array([7, 3, 7, 7, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(keys, kind="stable")
    inside = keys[order]
    rank = np.empty(len(keys), dtype=np.int64)
    rank[order] = np.arange(len(keys)) - np.searchsorted(inside, inside)
    return rank


def context_task(name: ContextTask, train: HeldOut, test: HeldOut) -> Task | NoTask:
    """The probe of documents' topics or sources, one sample a context."""
    column = train.store.documents[name].to_pylist()
    named = {value for value in column if value is not None}
    if len(named) < 2:
        only = f"every document has the one {name} {next(iter(named))!r}" if named else f"no {name} is named"
        return NoTask(name, f"{only} in the store")
    sides = []
    for side in (train, test):
        document = _documents(side)
        known = np.array([column[d] is not None for d in document], dtype=bool)
        names = np.array([column[d] for d in document[known]], dtype=str)
        sides.append((np.flatnonzero(known), names, document[known]))
    return _task(name, sides, MAX_CLASSES)


def position_task(train: HeldOut, test: HeldOut, seed: int) -> Task | NoTask:
    """The probe of a token's place in its context."""
    longest = max(int(side.length.max(initial=0)) for side in (train, test))
    if longest < SKIPPED_POSITIONS + N_POSITION_BUCKETS:
        return NoTask(
            "position",
            f"the longest context has {longest} tokens, of which {N_POSITION_BUCKETS} parts after the first "
            f"{SKIPPED_POSITIONS} cannot be made",
        )
    edges = np.linspace(SKIPPED_POSITIONS, longest, N_POSITION_BUCKETS + 1).astype(np.int64)
    generator = np.random.default_rng([seed, 1])
    sides = []
    for side, most in ((train, MAX_TRAIN_ROWS), (test, MAX_TEST_ROWS)):
        full = generator.permutation(np.flatnonzero(side.length == longest))
        full = np.sort(full[: most // N_POSITION_BUCKETS])
        rows = side.start[full][:, None] + generator.integers(
            edges[:-1], edges[1:], size=(len(full), N_POSITION_BUCKETS)
        )
        names = np.array([f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)])
        sides.append(_of_rows(side, rows.ravel(), np.tile(names, len(full))))
    return _task("position", sides, N_POSITION_BUCKETS)


def token_task(
    name: Literal["token", "previous_token"], train: HeldOut, test: HeldOut, seed: int
) -> Task | NoTask:
    """The probe of which token stands here, or stood one before."""
    back = 1 if name == "previous_token" else 0
    generator = np.random.default_rng([seed, 2 + back])
    found = []
    for side in (train, test):
        spans = zip(side.start, side.length, strict=True)
        # after no row, since there may be no context
        found.append(
            np.concatenate([np.arange(0), *(np.arange(a + SKIPPED_POSITIONS, a + n) for a, n in spans)])
        )
    tokens = train.store.tokens
    special = train.store.provenance.special_token_ids
    ids, counts = np.unique(np.asarray(tokens[found[0] - back]), return_counts=True)
    counts = np.where(np.isin(ids, special), 0, counts)
    frequent = ids[np.argsort(-counts, kind="stable")[:N_TOKENS]]
    frequent = frequent[~np.isin(frequent, special)]
    sides = []
    for side, rows, most in zip((train, test), found, (MAX_TRAIN_ROWS, MAX_TEST_ROWS), strict=True):
        rows = generator.permutation(rows[np.isin(tokens[rows - back], frequent)])
        here = np.asarray(tokens[rows - back]).astype(np.int64)
        kept = _rank_within(here) < most // N_TOKENS
        order = np.argsort(rows[kept])
        sides.append(_of_rows(side, rows[kept][order], here[kept][order].astype(str)))
    return _task(name, sides, N_TOKENS)


Labelled = tuple[Indices, np.ndarray, Indices]
"""Where each sample is, its class's name and its document."""


def _of_rows(side: HeldOut, rows: Indices, names: np.ndarray) -> Labelled:
    """Samples at ``rows`` of the store; special tokens are left out."""
    store = side.store
    real = ~np.isin(store.tokens[rows], store.provenance.special_token_ids)
    document = np.searchsorted(store.document_offsets, rows[real], side="right") - 1
    return rows[real], names[real], document


def _task(name: ContextTask | TokenTask, sides: Sequence[Labelled], most: int) -> Task | NoTask:
    """The task of the classes with enough documents on both sides."""
    n_documents = [_documents_of_classes(names, document) for _, names, document in sides]
    there = sorted(set().union(*n_documents))
    enough = [
        one
        for one in there
        if n_documents[0].get(one, 0) >= MIN_TRAIN_DOCUMENTS
        and n_documents[1].get(one, 0) >= MIN_TEST_DOCUMENTS
    ]
    if len(enough) < 2:
        return NoTask(
            name,
            f"{len(enough)} of {len(there)} classes ({name}) have {MIN_TRAIN_DOCUMENTS} documents of the train "
            f"split and {MIN_TEST_DOCUMENTS} of the test split, and telling apart takes two",
        )
    # sorted() is stable: of equally frequent classes the first by name
    classes = tuple(sorted(sorted(enough, key=lambda one: -n_documents[0][one])[:most]))
    made = []
    for at, names, document in sides:
        kept = np.isin(names, classes)
        label = np.searchsorted(np.array(classes), names[kept]).astype(np.int64)
        made.append(Side(at[kept].astype(np.int64), label, document[kept].astype(np.int64)))
    return Task(name, classes, train=made[0], test=made[1], n_left_out=len(there) - len(classes))


def _documents_of_classes(names: np.ndarray, document: Indices) -> dict[str, int]:
    """Number of distinct documents of each class."""
    pairs = {(str(name), int(one)) for name, one in zip(names, document, strict=True)}
    counts: dict[str, int] = {}
    for name, _ in pairs:
        counts[name] = counts.get(name, 0) + 1
    return counts
