"""Forget domains: which documents select and are scored, which contexts are drawn, refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tcsae.evaluate.unlearning.domains import (
    MIN_DOCUMENTS,
    Domain,
    draw_contexts,
    find_domains,
    sides_of,
    told_apart,
)
from tcsae.evaluate.unlearning.score import FIGURES
from tcsae.store import ActivationStore
from tcsae.store.errors import StoreMismatch, UnknownName

StoreFactory = Callable[..., ActivationStore]


@pytest.fixture
def store(make_store: StoreFactory) -> ActivationStore:
    """400 documents of 4 to 60 rows in contexts of 25; about 40 of them are in the test split."""
    lengths = np.random.default_rng(0).integers(4, 61, size=400).tolist()
    return make_store(torch.randn(sum(lengths), 16), lengths)


def test_on_the_test_split_the_train_documents_select(store: ActivationStore) -> None:
    sides = sides_of(store, "test")
    assert np.array_equal(np.flatnonzero(sides.selecting), store.documents_in("train"))
    assert np.array_equal(np.flatnonzero(sides.scored), store.documents_in("test"))


@pytest.mark.parametrize("split", ["train", "all"])
def test_on_another_split_every_second_document_of_each_topic_selects(
    store: ActivationStore, split: str
) -> None:
    sides = sides_of(store, split)  # type: ignore[arg-type]
    inside = np.isin(np.arange(store.n_documents), store.documents_in(split))  # type: ignore[arg-type]
    assert np.array_equal(sides.selecting ^ sides.scored, inside)
    topics = np.array(store.documents["topic"].to_pylist())
    for topic in ("even", "odd"):
        of_topic = sides.selecting[inside & (topics == topic)]
        assert abs(2 * np.count_nonzero(of_topic) - len(of_topic)) <= 2


def test_the_largest_topics_come_if_none_is_named_and_a_source_is_found_too(store: ActivationStore) -> None:
    sides = sides_of(store, "test")
    topics = store.documents["topic"].to_pylist()
    n_scored = {t: sum(topics[d] == t for d in store.documents_in("test")) for t in ("even", "odd")}
    assert min(n_scored.values()) >= MIN_DOCUMENTS
    expected = sorted(n_scored, key=lambda t: (-n_scored[t], t))
    assert [one.name for one in find_domains(store, sides, [])] == expected
    (odd,) = find_domains(store, sides, ["topic:odd"])
    assert odd.column == "topic"
    assert np.array_equal(odd.members, np.arange(400) % 2 == 1)


def test_a_topic_that_is_asked_for_by_two_names_is_one_domain(store: ActivationStore) -> None:
    found = find_domains(store, sides_of(store, "test"), ["odd", "topic:odd", "even"])
    assert [(one.column, one.name) for one in found] == [("topic", "odd"), ("topic", "even")]


def test_names_that_could_be_taken_for_something_else_have_their_column_before_them() -> None:
    nobody = np.zeros(0, dtype=bool)
    domains = [
        Domain("law", "topic", nobody),
        Domain("law", "source", nobody),
        Domain("art", "topic", nobody),
        Domain("gain", "topic", nobody),
    ]
    names = [one.name for one in told_apart(domains)]
    assert names == ["topic:law", "source:law", "art", "topic:gain"]
    of_topics = {f"{figure}_{name}" for figure in FIGURES for name in names}
    assert not of_topics & set(FIGURES)
    assert len(of_topics) == len(FIGURES) * len(names)


def test_an_unknown_topic_names_the_nearest(store: ActivationStore) -> None:
    with pytest.raises(UnknownName, match="'evn'; did you mean: even"):
        find_domains(store, sides_of(store, "test"), ["evn"])


def test_a_source_with_nothing_outside_is_refused_with_numbers(store: ActivationStore) -> None:
    with pytest.raises(
        StoreMismatch,
        match=r"source 'by hand': .*0 documents outside that select.*at least 8.*no source is large enough",
    ):
        find_domains(store, sides_of(store, "test"), ["by hand"])


def test_a_topic_with_too_few_documents_is_refused_and_says_that_no_other_will_do(
    make_store: StoreFactory,
) -> None:
    store = make_store(torch.randn(15 * 30, 16), [30] * 15)
    sides = sides_of(store, "all")
    with pytest.raises(StoreMismatch, match=r"topic 'odd': 4 documents in it that select, 3 documents in it"):
        find_domains(store, sides, ["odd"])
    with pytest.raises(StoreMismatch, match="no topic or source has 8 documents to select on"):
        find_domains(store, sides, [])


def test_documents_take_turns_and_what_two_domains_share_is_drawn_for_both(store: ActivationStore) -> None:
    everything = np.ones(400, dtype=bool)
    few = draw_contexts(store, everything, 1000, seed=0)
    owners = store.document_of_context[few]
    assert len(np.unique(owners)) == len(owners)  # no document's second context before another's first
    lengths = np.diff(store.context_offsets)
    assert 1000 - 25 <= lengths[few].sum() <= 1000
    even = np.arange(400) % 2 == 0
    half = draw_contexts(store, even, 1000, seed=0)
    assert set(few[even[owners]]) <= set(half)
    assert np.array_equal(draw_contexts(store, everything, 10**9, seed=0), np.arange(store.n_contexts))
    assert len(draw_contexts(store, everything, 1, seed=0)) == 1
    assert not np.array_equal(few, draw_contexts(store, everything, 1000, seed=1))
