"""Harvesting a synthetic corpus: the same plan, chunks and promises as with a model, which is not needed."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.synthetic import (
    GENERATOR,
    ID_PREFIX,
    DocumentCodes,
    SyntheticSource,
    dictionary,
    process_sha256,
)
from tcsae.harvest.synthetic_settings import NAME, SyntheticSettings, parse_synthetic
from tcsae.harvest.tokens import cut, offsets_of
from tcsae.store.errors import ConfigError
from tcsae.store.layout import Layout, documents_table
from tcsae.store.progress import progress
from tcsae.store.spec import DOCUMENT_COLUMNS, Provenance, split_of
from tcsae.store.truth import Truth
from tcsae.store.writer import StoreWriter

BYTE_DECIDING = ("tcsae", "numpy", "scipy")
"""packages whose version may change an activation's last bits or the numbers drawn"""

SAMPLE_DOCUMENTS = 8
"""documents drawn and timed by a dry run"""


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticPlan:
    """Everything that is known before the first row."""

    layout: Layout
    """every row's place"""
    provenance: Provenance
    """from which parameters"""
    truth: Truth
    """the dictionary"""


def synthetic_plan(config: HarvestConfig) -> SyntheticPlan:
    """Draw the dictionary and every document's tokens.

    Raises
    ------
    UnknownName, ConfigError, CorpusError
        as `parse_synthetic`; the dictionary cannot be drawn; ``max_tokens`` is below one document
    """
    settings = parse_synthetic(config.corpus)
    truth = dictionary(settings)
    source = SyntheticSource(settings, truth)
    columns: dict[str, list[Any]] = {name: [] for name in DOCUMENT_COLUMNS}
    digest = hashlib.sha256()
    tokens = []
    with progress(n_documents(config, settings), "document", "plan synthetic documents") as bar:
        for number in range(bar.total):
            codes = source.codes(number)
            tokens.append(source.tokens(codes.values))
            line = _line(number, codes, tokens[-1], settings)
            digest.update(f"{len(line['id'])}:{line['id']}:{line['sha256']};".encode())
            for name in DOCUMENT_COLUMNS:
                columns[name].append(line[name])
            bar.update()
    document_offsets = offsets_of(columns["n_tokens"])
    layout = Layout(
        tokens=np.concatenate(tokens),
        document_offsets=document_offsets,
        context_offsets=cut(document_offsets, config.context_length),
        documents=documents_table(columns),
    )
    return SyntheticPlan(layout, provenance_of(config, settings, digest.hexdigest()), truth)


def n_documents(config: HarvestConfig, settings: SyntheticSettings) -> int:
    """Documents that fit into ``max_tokens``, at most those asked for; raises `ConfigError` if none does."""
    if config.max_tokens is None:
        return settings.documents
    if config.max_tokens < settings.length:
        raise ConfigError(
            f"max_tokens: expected at least the {settings.length:,} tokens of a document, got "
            f"{config.max_tokens:,}; raise it or lower length"
        )
    return min(settings.documents, config.max_tokens // settings.length)


def provenance_of(config: HarvestConfig, settings: SyntheticSettings, corpus_sha256: str) -> Provenance:
    """The attributes of a store made with these settings."""
    return Provenance(
        model=NAME,
        model_revision=str(GENERATOR),
        model_sha256=process_sha256(settings),
        tokenizer_sha256=hashlib.sha256(f"strongest of {settings.n_fast} fast features".encode()).hexdigest(),
        hooks=(NAME,),
        d_model=settings.d_model,
        context_length=config.context_length,
        bos_token_id=None,
        special_token_ids=(),
        vocab_size=settings.n_fast + 1,
        dtype=config.dtype,
        precision=config.precision,
        rows_per_chunk=config.rows_per_chunk,
        corpus=config.corpus,
        corpus_sha256=corpus_sha256,
        max_tokens=config.max_tokens,
        versions={name: importlib.metadata.version(name) for name in BYTE_DECIDING},
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        truth={
            "features": settings.features,
            "generator": GENERATOR,
            "parameters": settings.to_dict(),
        },
    )


def first_document_sha256(source: SyntheticSource) -> str:
    """SHA-256 over the bits of the first document's activations, as `metadata.FIRST_BATCH` of a model's."""
    return hashlib.sha256(source.activations(0, source.codes(0).values).tobytes()).hexdigest()


class ChunkMaker:
    """Rows of a store's chunks, drawn document by document.

    A document is always drawn whole, so its rows do not depend on where chunks begin; one that goes on in the
    next chunk is kept until then.
    """

    def __init__(self, source: SyntheticSource, layout: Layout) -> None:
        self._source = source
        self._offsets = layout.document_offsets
        self._last: tuple[int, Tensor] | None = None

    def rows(self, start: int, stop: int) -> Float[Tensor, "row d_model"]:
        """Activations of rows ``[start, stop)``, float32."""
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        parts = []
        for document in range(first, last):
            begin = int(self._offsets[document])
            parts.append(self._document(document)[max(start - begin, 0) : stop - begin])
        return torch.cat(parts)

    def _document(self, number: int) -> Float[Tensor, "row d_model"]:
        if self._last is None or self._last[0] != number:
            codes = self._source.codes(number).values
            self._last = number, torch.from_numpy(self._source.activations(number, codes))
        return self._last[1]


def write_chunks(
    source: SyntheticSource, writer: StoreWriter, missing: list[int], on_rows: Callable[[int], Any]
) -> None:
    """Draw and write the ``missing`` chunks; ``on_rows`` is told the rows of each."""
    maker = ChunkMaker(source, writer.layout)
    for chunk in missing:
        start, stop = writer.rows_of(chunk)
        writer.write(NAME, chunk, maker.rows(start, stop))
        on_rows(stop - start)


def seconds_for(source: SyntheticSource, n_rows: int) -> float:
    """Estimated time to draw ``n_rows`` rows, from a few documents."""
    began = time.perf_counter()
    for number in range(SAMPLE_DOCUMENTS):
        source.activations(number, source.codes(number).values)
    return (time.perf_counter() - began) / (SAMPLE_DOCUMENTS * source.settings.length) * n_rows


def _line(
    number: int,
    codes: DocumentCodes,
    tokens: np.ndarray[Any, np.dtype[np.int32]],
    settings: SyntheticSettings,
) -> dict[str, Any]:
    """A document's line in documents.parquet; its text, were it written, would be its token ids in decimal."""
    name = f"{ID_PREFIX}{number:06d}"
    text = " ".join(map(str, tokens.tolist()))
    return {
        "id": name,
        "source": f"source-{codes.topic % settings.sources}",
        "topic": f"topic-{codes.topic}",
        "split": split_of(name),
        "n_tokens": len(tokens),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
