"""Made-up stores of benchmarks: what they say of themselves, and where their documents lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tcsae.store import Layout, Provenance, split_of
from tcsae.store.layout import documents_table

HOOK = "blocks.0.hook_resid_post"
CONTEXT = 127
"""rows of a context"""


def provenance(d_model: int, *, rows_per_chunk: int, vocab_size: int = 1) -> Provenance:
    """Of a store that no model made."""
    return Provenance(
        model="benchmark",
        model_revision="",
        model_sha256="",
        tokenizer_sha256="",
        hooks=(HOOK,),
        d_model=d_model,
        context_length=CONTEXT + 1,
        bos_token_id=0,
        special_token_ids=(0,),
        vocab_size=vocab_size,
        dtype="float16",
        precision="float32",
        rows_per_chunk=rows_per_chunk,
        corpus="benchmark",
        corpus_sha256="",
        max_tokens=None,
        versions={},
        created="2026-01-01",
    )


def layout_of(
    tokens: npt.NDArray[np.int32],
    documents: npt.NDArray[np.int64],
    contexts: npt.NDArray[np.int64],
    split: Callable[[str], str] = split_of,
) -> Layout:
    """Documents and contexts that begin at these rows; ``split`` says in which one a document is, by its number."""
    ids = [str(i) for i in range(len(documents) - 1)]
    table = documents_table(
        {
            "id": ids,
            "source": ["benchmark"] * len(ids),
            "topic": ["none"] * len(ids),
            "split": [split(name) for name in ids],
            "n_tokens": np.diff(documents).tolist(),
            "sha256": [""] * len(ids),
        }
    )
    return Layout(tokens, documents, contexts, table)


def even_layout(tokens: npt.NDArray[np.int32]) -> Layout:
    """Documents of four contexts."""
    n_rows = len(tokens)
    documents, contexts = (
        np.unique(np.append(np.arange(0, n_rows, rows), n_rows)) for rows in (4 * CONTEXT, CONTEXT)
    )
    return layout_of(tokens, documents, contexts)
