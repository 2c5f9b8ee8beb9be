"""Documents as tokens, laid out row by row and cut into the contexts that the model will read."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tcsae.harvest.corpus import BadRow, Corpus, Document, Skips
from tcsae.store.errors import ConfigError, CorpusError
from tcsae.store.layout import Layout, documents_table
from tcsae.store.progress import progress
from tcsae.store.spec import DOCUMENT_COLUMNS, split_of

DOCUMENTS_AT_ONCE = 64
"""Documents given to the tokenizer together; it works on them in parallel."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokenised:
    """A corpus laid out in rows, and what was left out."""

    layout: Layout
    """every row's place"""
    corpus_sha256: str
    """SHA-256 over the id and the text of each document, in order"""
    skips: Skips
    """rows of the corpus that became no document"""


def tokenise(
    corpus: Corpus, tokenizer: Any, *, rows_per_context: int, max_tokens: int | None = None
) -> Tokenised:
    """Tokenise a corpus in order and lay it out.

    No special token is added, whatever the tokenizer would do by itself: a BOS is the model's business and
    has no row. A document of fewer than two tokens has nothing that could last and is skipped.

    Parameters
    ----------
    corpus
        read once, from the start
    tokenizer
        a Hugging Face tokenizer
    rows_per_context
        tokens of a document that one forward pass takes; its last context is as long as what is left
    max_tokens
        whole documents are taken, in order, up to the first that would go beyond this many rows

    Raises
    ------
    CorpusError
        the corpus cannot be read, or no document has two tokens
    ConfigError
        the first usable document is longer than ``max_tokens``
    """
    pieces: list[npt.NDArray[np.int32]] = []
    columns: dict[str, list[Any]] = {name: [] for name in DOCUMENT_COLUMNS}
    digest = hashlib.sha256()
    n_rows = 0
    reading = _with_progress(_token_ids(corpus, tokenizer), corpus, max_tokens)
    for document, ids in reading:
        if len(ids) < 2:
            corpus.skips.add(BadRow(document.id, "shorter than two tokens"))
            continue
        if max_tokens is not None and n_rows + len(ids) > max_tokens:
            reading.close()  # ends the progress bar's line before an error is printed
            if not pieces:
                raise ConfigError(
                    f"max_tokens: expected at least the {len(ids):,} tokens of the first document "
                    f"{document.id!r}, got {max_tokens:,}; raise it"
                )
            break
        text_sha256 = hashlib.sha256(document.text.encode()).hexdigest()
        digest.update(f"{len(document.id)}:{document.id}:{text_sha256};".encode())
        pieces.append(np.array(ids, dtype=np.int32))
        n_rows += len(ids)
        row = {
            "id": document.id,
            "source": document.source,
            "topic": document.topic,
            "split": split_of(document.id),
            "n_tokens": len(ids),
            "sha256": text_sha256,
        }
        for name in DOCUMENT_COLUMNS:
            columns[name].append(row[name])
    if not pieces:
        raise CorpusError(
            f"{corpus.spec}: all {corpus.skips.total:,} rows are bad: {corpus.skips}; expected texts of two "
            "tokens or more"
        )
    document_offsets = offsets_of(columns["n_tokens"])
    layout = Layout(
        tokens=np.concatenate(pieces),
        document_offsets=document_offsets,
        context_offsets=cut(document_offsets, rows_per_context),
        documents=documents_table(columns),
    )
    return Tokenised(layout, digest.hexdigest(), corpus.skips)


def offsets_of(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Half-open row ranges of pieces of the given lengths.

    >>> offsets_of([3, 2]).tolist()
    [0, 3, 5]
    """
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def cut(document_offsets: npt.NDArray[np.int64], rows_per_context: int) -> npt.NDArray[np.int64]:
    """Contexts of at most ``rows_per_context`` rows that never span two documents.

    For documents [0, 5) and [5, 7) and three rows a context, the contexts are [0, 3), [3, 5), [5, 7).

    >>> cut(np.array([0, 5, 7]), 3).tolist()
    [0, 3, 5, 7]
    """
    starts = [np.arange(start, stop, rows_per_context) for start, stop in pairwise(document_offsets)]
    return np.concatenate([*starts, document_offsets[-1:]]).astype(np.int64)


def _with_progress(
    tokenised: Iterator[tuple[Document, list[int]]], corpus: Corpus, max_tokens: int | None
) -> Generator[tuple[Document, list[int]], None, None]:
    """Show how far the reading is: in tokens if they are bounded, else in documents."""
    total = corpus.n_rows if max_tokens is None else max_tokens
    with progress(total, "document" if max_tokens is None else "token", f"read {corpus.spec}") as bar:
        for document, ids in tokenised:
            yield document, ids
            bar.update(1 if max_tokens is None else len(ids))


def _token_ids(documents: Iterable[Document], tokenizer: Any) -> Iterator[tuple[Document, list[int]]]:
    reading = iter(documents)
    while together := list(islice(reading, DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(
            [document.text for document in together],
            add_special_tokens=False,
            return_attention_mask=False,
            truncation=False,
            verbose=False,  # else a document longer than the model's context is warned about; it will be cut
        )
        yield from zip(together, encoded["input_ids"], strict=True)
