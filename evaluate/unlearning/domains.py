"""Forget domains: topics or sources of a store's documents, and which of their contexts are read.

Features are selected on some documents and scored on others. On the test split, the train documents select;
on any other split, every second document of each topic does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from tcsae.evaluate.config import EvaluatedSplit
from tcsae.store.errors import StoreMismatch, UnknownName
from tcsae.store.reader import ActivationStore

MIN_DOCUMENTS = 8
"""Documents that a domain, and what is outside it, must have on either side: an honest score halves them."""

ENDS_OF_FIGURES = ("control", "gain", "retain")
"""Ends of `tcsae.evaluate.unlearning.score.FIGURES`: ``honest`` of a topic "gain" is no mean ``honest_gain``."""

DEFAULT_DOMAINS = 3
"""Topics that are forgotten, one after the other, if none is named."""

Column = Literal["topic", "source"]
COLUMNS: tuple[Column, ...] = ("topic", "source")

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """The documents of one topic or source; everything else is its retain domain."""

    name: str
    """the topic or source, after its column where it could be taken for something else"""
    column: Column
    """which of the two"""
    members: Bool[np.ndarray, " document"]
    """of all the store's documents, those that are in it"""


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """Which documents select features and which are scored; never the same."""

    selecting: Bool[np.ndarray, " document"]
    """of all the store's documents"""
    scored: Bool[np.ndarray, " document"]
    """of all the store's documents"""
    rule: str
    """how they were told apart, in words"""


def sides_of(store: ActivationStore, split: EvaluatedSplit) -> Sides:
    """The documents that select and those that are scored when ``split`` is evaluated."""
    inside = np.zeros(store.n_documents, dtype=bool)
    inside[store.documents_in(split)] = True
    if split == "test":
        return Sides(~inside, inside, "selected on the train split, scored on the test split")
    seen: Counter[tuple[str | None, str | None]] = Counter()
    selecting = np.zeros_like(inside)
    columns = (store.documents[column].to_pylist() for column in COLUMNS)
    for document, kind in enumerate(zip(*columns, strict=True)):
        if inside[document]:
            selecting[document] = seen[kind] % 2 == 0
            seen[kind] += 1
    rule = f"split {split}: of each topic every second document selects, the others are scored"
    return Sides(selecting, inside & ~selecting, rule)


def find_domains(store: ActivationStore, sides: Sides, asked: Sequence[str]) -> list[Domain]:
    """The domains named by ``asked``, or the largest topics (sources, if no topic is large enough).

    A name is looked up among the topics first; ``source:NAME`` and ``topic:NAME`` say which is meant.

    Raises
    ------
    UnknownName
        neither a topic nor a source; the nearest names are listed
    StoreMismatch
        too few documents of a domain, or outside it, select or are scored; large enough ones are listed
    """
    if not asked:
        for column in COLUMNS:
            large = _large_enough(store, sides, column)
            if large:
                return told_apart([_domain(store, column, name) for name in large[:DEFAULT_DOMAINS]])
        raise StoreMismatch(
            f"{store.url}: unlearning: no topic or source has {MIN_DOCUMENTS} documents to select on and "
            f"{MIN_DOCUMENTS} to score on, inside and outside of it; harvest more documents"
        )
    named = {(one.column, one.name): one for one in (_named(store, name) for name in asked)}
    for domain in named.values():
        _check_size(store, sides, domain)
    return told_apart(list(named.values()))


def told_apart(domains: Sequence[Domain]) -> list[Domain]:
    """The domains with their column before names that two of them have, or that a figure's name could end in.

    >>> nobody = np.zeros(0, dtype=bool)
    >>> [one.name for one in told_apart([Domain("law", "topic", nobody), Domain("law", "source", nobody)])]
    ['topic:law', 'source:law']
    """
    often = Counter(one.name for one in domains)
    return [
        replace(one, name=f"{one.column}:{one.name}")
        if often[one.name] > 1 or one.name in ENDS_OF_FIGURES
        else one
        for one in domains
    ]


def _named(store: ActivationStore, asked: str) -> Domain:
    names = {column: set(store.documents[column].to_pylist()) - {None} for column in COLUMNS}
    column, _, rest = asked.partition(":")
    for prefix in COLUMNS:
        if column == prefix and rest in names[prefix]:
            return _domain(store, prefix, rest)
    for among in COLUMNS:
        if asked in names[among]:
            return _domain(store, among, asked)
    raise UnknownName.among(
        f"topic or source of {store.url}", asked, sorted(names["topic"] | names["source"])
    )


def _domain(store: ActivationStore, column: Column, name: str) -> Domain:
    return Domain(name, column, np.array([value == name for value in store.documents[column].to_pylist()]))


def _sizes(sides: Sides, members: Bool[np.ndarray, " document"]) -> dict[str, int]:
    return {
        f"{where} that {what}": int(np.count_nonzero(which & side))
        for where, which in (("in it", members), ("outside", ~members))
        for what, side in (("select", sides.selecting), ("are scored", sides.scored))
    }


def _check_size(store: ActivationStore, sides: Sides, domain: Domain) -> None:
    sizes = _sizes(sides, domain.members)
    if min(sizes.values()) >= MIN_DOCUMENTS:
        return
    large = _large_enough(store, sides, domain.column)
    found = ", ".join(f"{number} documents {what}" for what, number in sizes.items())
    instead = f"large enough: {', '.join(large[:10])}" if large else f"no {domain.column} is large enough"
    raise StoreMismatch(
        f"{store.url}: {domain.column} {domain.name!r}: {found}; expected at least {MIN_DOCUMENTS} of each; "
        f"{instead}"
    )


def _large_enough(store: ActivationStore, sides: Sides, column: Column) -> list[str]:
    """Names with enough documents on all sides, those with most scored documents first."""
    documents: defaultdict[str, list[int]] = defaultdict(list)
    for document, name in enumerate(store.documents[column].to_pylist()):
        if name is not None:
            documents[name].append(document)
    n_scored = {}
    for name, numbers in documents.items():
        if len(numbers) < 2 * MIN_DOCUMENTS:
            continue
        members = np.zeros(store.n_documents, dtype=bool)
        members[numbers] = True
        if min(_sizes(sides, members).values()) >= MIN_DOCUMENTS:
            n_scored[name] = int(np.count_nonzero(members & sides.scored))
    return sorted(n_scored, key=lambda name: (-n_scored[name], name))


def draw_contexts(
    store: ActivationStore, documents: Bool[np.ndarray, " document"], max_tokens: int, seed: int
) -> Indices:
    """Contexts of ``documents``, as many as have ``max_tokens`` tokens together, but at least one.

    Documents take turns: each gives one of its contexts at random before any gives a second, so that as
    many documents as possible are seen. The order does not depend on ``documents``: what two domains have
    in common is drawn for both.
    """
    generator = np.random.default_rng(seed)
    turn_of_document = generator.permutation(store.n_documents)
    chance = generator.random(store.n_contexts)
    contexts = np.flatnonzero(documents[store.document_of_context])
    owner = store.document_of_context[contexts]
    grouped = np.lexsort((chance[contexts], owner))
    contexts, owner = contexts[grouped], owner[grouped]
    # owners [4, 4, 7] begin at [0, 2], so the rounds are [0, 1, 0]
    begins = np.flatnonzero(np.diff(owner, prepend=-1))
    rounds = np.arange(len(owner)) - np.repeat(begins, np.diff(begins, append=len(owner)))
    order = np.lexsort((turn_of_document[owner], rounds))
    contexts = contexts[order]
    lengths = store.context_offsets[contexts + 1] - store.context_offsets[contexts]
    n_drawn = max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right")))
    return np.sort(contexts[:n_drawn])
