"""Every row's place in a store, and what offsets must be like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tcsae.store.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Every row's place, known before the model runs.

    Raises `ConfigError` if the offsets do not cover the rows or a context leaves its document.
    """

    tokens: npt.NDArray[np.int32]
    """token id of each row, int32 [row]"""
    document_offsets: npt.NDArray[np.int64]
    """document i holds rows [offsets[i], offsets[i + 1]), int64 [document + 1]"""
    context_offsets: npt.NDArray[np.int64]
    """context i holds rows [offsets[i], offsets[i + 1]), int64 [context + 1]"""
    documents: pa.Table
    """one line a document: `DOCUMENT_COLUMNS` and perhaps ``text``"""

    def __post_init__(self) -> None:
        problem = offsets_problem(self.document_offsets, self.context_offsets, len(self.tokens))
        if problem:
            raise ConfigError(f"layout: {problem}")
        if self.documents.num_rows != self.n_documents:
            raise ConfigError(f"layout: {self.documents.num_rows} lines for {self.n_documents} documents")

    @property
    def n_rows(self) -> int:
        """rows of the whole store"""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """documents of the whole store"""
        return len(self.document_offsets) - 1

    @property
    def n_contexts(self) -> int:
        """contexts of the whole store"""
        return len(self.context_offsets) - 1


def offsets_problem(
    document_offsets: npt.NDArray[np.int64],
    context_offsets: npt.NDArray[np.int64],
    n_rows: int,
) -> str | None:
    """What is wrong with the offsets of a store of ``n_rows`` rows, or None.

    Both must rise strictly from 0 to ``n_rows`` (no empty document or context), and every document must
    begin where a context begins, which is the same as no context spanning two documents.

    >>> offsets_problem(np.array([0, 2, 5]), np.array([0, 2, 4, 5]), 5)
    >>> offsets_problem(np.array([0, 2, 5]), np.array([0, 3, 5]), 5)
    'the context of rows [0, 3) spans two documents: one begins at row 2'
    """
    for name, offsets in (("document_offsets", document_offsets), ("context_offsets", context_offsets)):
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != n_rows:
            return f"{name} must run from 0 to {n_rows}, got {offsets[:1].tolist()}..{offsets[-1:].tolist()}"
        if np.any(np.diff(offsets) <= 0):
            at = int(np.flatnonzero(np.diff(offsets) <= 0)[0])
            return f"{name} must rise, but entry {at + 1} is {offsets[at + 1]} after {offsets[at]}"
    inside = np.searchsorted(context_offsets, document_offsets)
    broken = np.flatnonzero(context_offsets[inside] != document_offsets)
    if broken.size:
        row = int(document_offsets[broken[0]])
        context = int(inside[broken[0]])
        span = f"[{context_offsets[context - 1]}, {context_offsets[context]})"
        return f"the context of rows {span} spans two documents: one begins at row {row}"
    return None


def documents_table(columns: dict[str, list[Any]]) -> pa.Table:
    """documents.parquet's table from columns, with the types that the format names."""
    types = {name: pa.string() for name in columns} | {"n_tokens": pa.int64()}
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
