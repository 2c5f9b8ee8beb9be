"""What a store holds, in a form to print."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tcsae.store.chunks import chunk_bytes
from tcsae.store.reader import ActivationStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What a store holds."""

    path: str
    """folder of the store"""
    id: str
    """hash over its settings, tokens and checksums: equal for equal content"""
    model: str
    """model that was run"""
    corpus: str
    """documents it read"""
    hooks: tuple[str, ...]
    """activations stored of every row"""
    rows: int
    """tokens"""
    documents: int
    """documents, both splits"""
    contexts: int
    """forward passes"""
    splits: dict[str, int]
    """documents by split"""
    sources: dict[str, int]
    """documents by source, the most frequent first"""
    topics: int
    """different topics"""
    d_model: int
    """length of an activation"""
    dtype: str
    """dtype stored"""
    precision: str
    """dtype of the forward pass"""
    chunks: int
    """chunk files of each hook"""
    bytes: int
    """size of all hooks' chunk files"""
    median_norm: dict[str, float]
    """median norm of an activation, by hook, train split"""
    outliers: dict[str, int]
    """rows whose norm is more than ten times that, by hook, train split"""
    created: str
    """UTC day"""


def describe(path: str | Path) -> Description:
    """Describe the finished store at ``path``; raises as `ActivationStore.open` does. Reads no activation."""
    store = ActivationStore.open(path)
    made = store.provenance
    n_chunks = -(-store.n_rows // made.rows_per_chunk)
    statistics = {hook: store.statistics(hook) for hook in store.hooks}
    return Description(
        path=str(store.path),
        id=store.id,
        model=made.model,
        corpus=made.corpus,
        hooks=made.hooks,
        rows=store.n_rows,
        documents=store.n_documents,
        contexts=store.n_contexts,
        splits=dict(Counter(store.documents["split"].to_pylist()).most_common()),
        sources=dict(Counter(store.documents["source"].to_pylist()).most_common()),
        topics=len(set(store.documents["topic"].to_pylist())),
        d_model=made.d_model,
        dtype=made.dtype,
        precision=made.precision,
        chunks=n_chunks,
        bytes=n_chunks * len(made.hooks) * chunk_bytes(made.rows_per_chunk, made.d_model, made.dtype),
        median_norm={hook: found.norm_quantiles["0.5"] for hook, found in statistics.items()},
        outliers={hook: found.n_outliers for hook, found in statistics.items()},
        created=made.created,
    )
