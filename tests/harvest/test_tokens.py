"""Rows are the documents' tokens, in order, without special tokens; contexts never span documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from tcsae.harvest import Document, LanguageModel
from tcsae.harvest.corpus import Corpus
from tcsae.harvest.tokens import cut, offsets_of, tokenise
from tcsae.store.errors import ConfigError, CorpusError


def corpus_of(texts: Iterable[str]) -> Corpus:
    return Corpus(
        "by hand", lambda: iter([Document(f"d{i}", t, "by hand", None) for i, t in enumerate(texts)])
    )


class Words:
    """A tokenizer of one token a word: its length."""

    def __call__(self, texts: list[str], *, add_special_tokens: bool, **_: Any) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def test_rows_are_the_tokens_of_the_documents_in_order() -> None:
    layout = tokenise(corpus_of(["a bb ccc dddd", "eeeee ff"]), Words(), rows_per_context=3).layout
    assert layout.tokens.tolist() == [1, 2, 3, 4, 5, 2]
    assert layout.document_offsets.tolist() == [0, 4, 6]
    assert layout.context_offsets.tolist() == [0, 3, 4, 6]
    assert layout.documents["id"].to_pylist() == ["d0", "d1"]
    assert layout.documents["n_tokens"].to_pylist() == [4, 2]


def test_contexts_of_exact_multiples_leave_no_empty_one() -> None:
    assert cut(np.array([0, 6, 9]), 3).tolist() == [0, 3, 6, 9]
    assert offsets_of([6, 3]).tolist() == [0, 6, 9]


def test_documents_of_one_token_are_skipped_and_counted() -> None:
    tokenised = tokenise(corpus_of(["a b", "alone", "c d"]), Words(), rows_per_context=3)
    assert tokenised.layout.documents["id"].to_pylist() == ["d0", "d2"]
    assert str(tokenised.skips) == "1 shorter than two tokens (first: d1)"


def test_a_corpus_of_single_tokens_is_refused() -> None:
    with pytest.raises(CorpusError, match="all 2 rows are bad: 2 shorter than two tokens"):
        tokenise(corpus_of(["a", "b"]), Words(), rows_per_context=3)


@pytest.mark.parametrize(("bound", "documents"), [(5, 1), (6, 2), (7, 2), (8, 3)])
def test_whole_documents_are_taken_while_they_fit(bound: int, documents: int) -> None:
    corpus = corpus_of(["a b c d", "e f", "g h"])
    layout = tokenise(corpus, Words(), rows_per_context=9, max_tokens=bound).layout
    assert layout.n_documents == documents
    assert layout.n_rows <= bound


def test_a_bound_below_the_first_document_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="expected at least the 4 tokens of the first document 'd0', got 3"):
        tokenise(corpus_of(["a b c d"]), Words(), rows_per_context=3, max_tokens=3)


def test_the_corpus_hash_follows_ids_and_texts() -> None:
    def sha256(*texts: str) -> str:
        return tokenise(corpus_of(texts), Words(), rows_per_context=3).corpus_sha256

    assert sha256("a b", "c d") == sha256("a b", "c d")
    assert len({sha256("a b", "c d"), sha256("c d", "a b"), sha256("a b"), sha256("a b", "c e")}) == 4


def test_a_tokenizer_that_adds_a_bos_by_itself_adds_none_here(smollm2: LanguageModel) -> None:
    tokens = tokenise(corpus_of(["Hello world, hello"]), smollm2.tokenizer, rows_per_context=9).layout.tokens
    assert not set(tokens.tolist()) & set(smollm2.special_token_ids)
    assert smollm2.tokenizer.decode(tokens) == "Hello world, hello"


@pytest.mark.parametrize(
    ("bound", "shown"), [(None, "2.00/3.00"), (6, "6.00/6.00")], ids=["in documents", "in tokens"]
)
def test_reading_shows_how_far_it_is(
    bound: int | None, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [Document(f"d{i}", t, "by hand", None) for i, t in enumerate(["a b c d", "e f"])]
    tokenise(Corpus("by hand", lambda: iter(documents), 3), Words(), rows_per_context=9, max_tokens=bound)
    assert shown in capsys.readouterr().err
