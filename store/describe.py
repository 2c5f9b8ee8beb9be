"""What a store holds, in a form to print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tcsae.store.reader import ActivationStore
from tcsae.store.space import hook_bytes


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
    """different topics; a document may have none"""
    documents_by_topic: dict[str, int]
    """the most frequent topic first; "-" for none"""
    d_model: int
    """length of an activation"""
    dtype: str
    """dtype stored"""
    precision: str
    """dtype of the forward pass"""
    chunks: int
    """chunk files of each hook"""
    bytes: int
    """size of all hooks' chunk files, uncompressed"""
    codec: str
    """how chunks are stored"""
    codec_ratio: dict[str, float]
    """uncompressed bytes over stored ones, by hook, on a sample; of the hooks that it was measured for"""
    codec_error: dict[str, float]
    """squared error of the decoded rows over their variance, by hook, on a sample; likewise"""
    median_norm: dict[str, float]
    """median norm of an activation, by hook, train split; empty if that has no row"""
    outliers: dict[str, int]
    """rows whose norm is more than ten times that, by hook, train split; likewise"""
    norm_quantiles: dict[str, dict[str, float]]
    """quantiles of the norm, by hook, train split; likewise"""
    examples: tuple[str, ...]
    """beginnings of a few documents, if a decoder was given"""
    created: str
    """UTC day"""


EXAMPLES = 3

EXAMPLE_TOKENS = 32
"""tokens shown of each example"""


def describe(
    store: ActivationStore | str | Path, decode: Callable[[list[int]], str] | None = None
) -> Description:
    """Describe a finished store, opened or at a path or URL. Reads no activation.

    Parameters
    ----------
    store
        the store, or where it is; raises as `ActivationStore.open` does
    decode
        token ids to text, such as a tokenizer's ``decode``, for the examples
    """
    if not isinstance(store, ActivationStore):
        store = ActivationStore.open(store)
    made = store.provenance
    # zeros stand in the statistics of a store whose documents are all held out: not measured, so not shown
    statistics = {hook: found for hook in store.hooks if (found := store.statistics(hook)).n_rows}
    topics = store.documents["topic"].to_pylist()
    return Description(
        path=store.url,
        id=store.id,
        model=made.model,
        corpus=made.corpus,
        hooks=made.hooks,
        rows=store.n_rows,
        documents=store.n_documents,
        contexts=store.n_contexts,
        splits=dict(Counter(store.documents["split"].to_pylist()).most_common()),
        sources=dict(Counter(store.documents["source"].to_pylist()).most_common()),
        topics=len(set(topics) - {None}),
        documents_by_topic=dict(Counter("-" if topic is None else topic for topic in topics).most_common()),
        d_model=made.d_model,
        dtype=made.dtype,
        precision=made.precision,
        chunks=-(-store.n_rows // made.rows_per_chunk),
        bytes=len(made.hooks) * hook_bytes(made, store.n_rows),
        codec=made.codec,
        codec_ratio=made.measured("ratio"),
        codec_error=made.measured("relative_error"),
        norm_quantiles={hook: found.norm_quantiles for hook, found in statistics.items()},
        examples=() if decode is None else _examples(store, decode),
        median_norm={hook: found.norm_quantiles["0.5"] for hook, found in statistics.items()},
        outliers={hook: found.n_outliers for hook, found in statistics.items()},
        created=made.created,
    )


def _examples(store: ActivationStore, decode: Callable[[list[int]], str]) -> tuple[str, ...]:
    """The first tokens of documents spread evenly over the store."""
    starts = store.document_offsets[:-1][:: max(1, store.n_documents // EXAMPLES)][:EXAMPLES]
    stops = store.document_offsets[1:][:: max(1, store.n_documents // EXAMPLES)][:EXAMPLES]
    return tuple(
        decode(store.tokens[start : min(start + EXAMPLE_TOKENS, stop)].tolist())
        for start, stop in zip(starts, stops, strict=True)
    )
