"""Which part of a store is copied: some of its hooks, and a run of whole documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tcsae.store.errors import ConfigError, UnknownName
from tcsae.store.layout import Layout
from tcsae.store.reader import ActivationStore
from tcsae.store.spec import Provenance


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a store as asked for; whether it is inside the store is known once that is open."""

    hooks: tuple[str, ...]
    """in the store's order"""
    documents: tuple[int, int] | None
    """[start, stop) of the documents; None: not bounded"""
    rows: tuple[int, int] | None
    """instead, [start, stop) of the rows; None: not bounded"""


def select(
    made: Provenance,
    hooks: tuple[str, ...] | None,
    documents: tuple[int, int] | None,
    rows: tuple[int, int] | None,
) -> Part | None:
    """The part asked for, or None if it is the whole store.

    Raises
    ------
    ConfigError
        documents and rows are both given, or no hook is
    UnknownName
        the store has no such hook
    """
    if documents is not None and rows is not None:
        raise ConfigError("documents, rows: give one of them")
    for hook in hooks or ():
        if hook not in made.hooks:
            raise UnknownName.among("hook of the source", hook, made.hooks)
    if hooks == ():
        raise ConfigError("hooks: expected at least one")
    kept = made.hooks if hooks is None else tuple(hook for hook in made.hooks if hook in hooks)
    if kept == made.hooks and documents is None and rows is None:
        return None
    return Part(kept, documents, rows)


def document_range(store: ActivationStore, part: Part | None) -> tuple[int, int]:
    """Documents [start, stop) of ``part``, rows widened to whole documents.

    Raises `ConfigError` if the part is empty or leaves the store.
    """
    start, stop = 0, store.n_documents
    if part is not None and part.documents is not None:
        start, stop = part.documents
        _check_inside("documents", start, stop, store.n_documents)
    if part is not None and part.rows is not None:
        first, last = part.rows
        _check_inside("rows", first, last, store.n_rows)
        start = int(np.searchsorted(store.document_offsets, first, side="right")) - 1
        stop = int(np.searchsorted(store.document_offsets, last, side="left"))
    return start, stop


def layout_of(store: ActivationStore, first: int, last: int) -> Layout:
    """Layout of documents [first, last) as a store of their own."""
    begin, end = (int(store.document_offsets[i]) for i in (first, last))
    contexts = store.context_offsets
    inside = contexts[(contexts >= begin) & (contexts <= end)]
    return Layout(
        np.ascontiguousarray(store.tokens[begin:end]),
        store.document_offsets[first : last + 1] - begin,
        inside - begin,
        store.documents.slice(first, last - first),
    )


def _check_inside(what: str, start: int, stop: int, n: int) -> None:
    if not 0 <= start < stop <= n:
        raise ConfigError(f"{what}: expected a range inside 0:{n}, not empty, got {start}:{stop}")
