"""What a harvest will do, known before the model runs: every row's place, the bytes, the time."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tcsae.harvest.batches import Batch, batches_of, input_ids, padded_tokens
from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.corpus import Skips, read_corpus
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.harvest.synthetic import SyntheticSource
from tcsae.harvest.synthetic_run import seconds_for, synthetic_plan
from tcsae.harvest.synthetic_settings import is_synthetic, parse_synthetic
from tcsae.harvest.tokens import tokenise
from tcsae.store.chunks import chunk_path
from tcsae.store.errors import ConfigError, DiskFull
from tcsae.store.layout import Layout
from tcsae.store.metadata import ROOT, read_root
from tcsae.store.planning import refuse_existing
from tcsae.store.space import free_bytes, hook_bytes
from tcsae.store.spec import Dtype, Precision, Provenance
from tcsae.store.writer import refuse_other_settings

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 3.0
"""How long a dry run lets the model run to estimate the whole time."""

BYTE_DECIDING = ("tcsae", "torch", "transformers", "transformer_lens", "tokenizers")
"""Packages whose version may change an activation's last bits or a token."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything that the writer and the chunks' runner need."""

    layout: Layout
    """every row's place"""
    provenance: Provenance
    """who, from what, with which settings"""
    skips: Skips
    """rows of the corpus that became no document"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What a harvest would do. Nothing was written to find out."""

    store: str
    """where the store would be"""
    rows: int
    """tokens stored"""
    documents: int
    """documents, whole"""
    contexts: int
    """forward passes, if each were run alone"""
    chunks: int
    """chunk files of each hook"""
    missing_chunks: int
    """those that are still to be computed: all, unless a store is resumed"""
    hooks: tuple[str, ...]
    """activations stored"""
    d_model: int
    """numbers of one activation"""
    dtype: Dtype
    """dtype stored"""
    precision: Precision
    """dtype of the forward pass"""
    bytes_per_hook: int
    """bytes of one hook's chunk files, the last one padded to full size"""
    total_bytes: int
    """bytes of the whole store, tables excepted (they are below 1 %)"""
    free_bytes: int
    """bytes free on the store's disk"""
    seconds: float
    """estimated time of the missing chunks' forward passes in one process on this device, from a sample"""
    tokens_per_second: float
    """rows a second behind that estimate; 0 if nothing is missing"""
    skipped: dict[str, int]
    """rows of the corpus that became no document, by reason"""


def make_plan(config: HarvestConfig, model: LanguageModel) -> Plan:
    """Tokenise the corpus and lay out its rows.

    Raises
    ------
    UnknownName
        the model has no such hook, or the corpus no such part
    CorpusError
        the corpus cannot be read, or none of it is usable
    ConfigError
        the contexts are longer than the model can read
    """
    model.check_hooks(config.hooks)
    if model.max_context is not None and config.context_length > model.max_context:
        raise ConfigError(
            f"context_length: expected at most the {model.max_context} tokens that {model.name} can read, "
            "got "
            f"{config.context_length}; lower it"
        )
    tokenised = tokenise(
        read_corpus(config.corpus),
        model.tokenizer,
        rows_per_context=config.context_length - (model.bos_token_id is not None),
        max_tokens=config.max_tokens,
    )
    if tokenised.skips.total:
        log.warning("%s: skipped %s", config.corpus, tokenised.skips)
    return Plan(tokenised.layout, provenance_of(config, model, tokenised.corpus_sha256), tokenised.skips)


def provenance_of(config: HarvestConfig, model: LanguageModel, corpus_sha256: str) -> Provenance:
    """The attributes of a store that ``config`` and ``model`` make from the corpus with that hash."""
    return Provenance(
        model=model.name,
        model_revision=model.revision,
        model_sha256=model.sha256,
        tokenizer_sha256=model.tokenizer_sha256,
        hooks=config.hooks,
        d_model=model.d_model,
        context_length=config.context_length,
        bos_token_id=model.bos_token_id,
        special_token_ids=model.special_token_ids,
        vocab_size=model.vocab_size,
        dtype=config.dtype,
        precision=config.precision,
        rows_per_chunk=config.rows_per_chunk,
        corpus=config.corpus,
        corpus_sha256=corpus_sha256,
        max_tokens=config.max_tokens,
        versions={name: importlib.metadata.version(name) for name in BYTE_DECIDING},
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def check_space(store: Path, provenance: Provenance, n_chunks: int) -> None:
    """Raise `DiskFull`, with the numbers, unless ``n_chunks`` more chunks of every hook fit on the disk."""
    n_hooks = len(provenance.hooks)
    per_hook = hook_bytes(provenance, n_chunks * provenance.rows_per_chunk)
    free = free_bytes(store)
    if free < per_hook * n_hooks:
        raise DiskFull(
            f"{store}: expected {per_hook * n_hooks:,} bytes free for {n_chunks:,} chunks of {n_hooks} hooks in "
            f"{provenance.dtype} ({per_hook:,} bytes a hook), got {free:,}; free some space, lower --max-tokens or "
            "store fewer hooks"
        )


def dry_run(config: HarvestConfig) -> DryRun:
    """Plan a harvest and time a few batches. **Writes nothing**, wherever the store would be.

    It loads the model and reads the corpus (or draws the documents of a synthetic one), so it finds what a
    harvest would find wrong with them, and raises what a harvest would raise, `StoreExists` and `DiskFull` with the
    numbers included. With ``config.resume``, chunks that are there need neither space nor time; that they are whole
    is not checked.
    """
    begun = (config.store / ROOT).exists()
    if not (begun and config.resume):
        refuse_existing(config.store)
    if is_synthetic(config.corpus):
        drawn = synthetic_plan(config)
        source = SyntheticSource(parse_synthetic(config.corpus), drawn.truth)
        return _dry_run(
            config,
            drawn.layout,
            drawn.provenance,
            lambda chunks: seconds_for(source, _rows_of(config, drawn.layout, chunks)),
            {},
        )
    model = load_model(config.model, precision=config.precision, device=config.device)
    plan = make_plan(config, model)
    layout = plan.layout
    return _dry_run(
        config,
        layout,
        plan.provenance,
        lambda chunks: _estimate(config, model, layout, chunks),
        dict(plan.skips.counts),
    )


def _dry_run(
    config: HarvestConfig,
    layout: Layout,
    made: Provenance,
    estimate: Callable[[list[int]], float],
    skipped: dict[str, int],
) -> DryRun:
    n_chunks = -(-layout.n_rows // config.rows_per_chunk)
    missing = list(range(n_chunks))
    if (config.store / ROOT).exists():  # to be resumed: `dry_run` has refused it otherwise
        begun = Provenance.from_dict(read_root(config.store), str(config.store / ROOT))
        refuse_other_settings(config.store, begun, made)
        missing = [chunk for chunk in missing if not _is_there(config.store, made, chunk)]
    check_space(config.store, made, len(missing))
    per_hook = hook_bytes(made, layout.n_rows)
    seconds = estimate(missing) if missing else 0.0
    return DryRun(
        store=str(config.store),
        rows=layout.n_rows,
        documents=layout.n_documents,
        contexts=layout.n_contexts,
        chunks=n_chunks,
        missing_chunks=len(missing),
        hooks=made.hooks,
        d_model=made.d_model,
        dtype=config.dtype,
        precision=config.precision,
        bytes_per_hook=per_hook,
        total_bytes=per_hook * len(made.hooks),
        free_bytes=free_bytes(config.store),
        seconds=seconds,
        tokens_per_second=_rows_of(config, layout, missing) / seconds if seconds else 0.0,
        skipped=skipped,
    )


def _is_there(store: Path, made: Provenance, chunk: int) -> bool:
    return all(chunk_path(store, hook, chunk).exists() for hook in made.hooks)


def _rows_of(config: HarvestConfig, layout: Layout, chunks: list[int]) -> int:
    """Rows that the chunks hold together."""
    size = config.rows_per_chunk
    return sum(min(size, layout.n_rows - chunk * size) for chunk in chunks)


def _estimate(config: HarvestConfig, model: LanguageModel, layout: Layout, chunks: list[int]) -> float:
    """Seconds that the forward passes of ``chunks`` will take, from batches of the first run for a few seconds."""
    has_bos = model.bos_token_id is not None

    def batches(chunk: int) -> list[Batch]:
        start = chunk * config.rows_per_chunk
        stop = min(start + config.rows_per_chunk, layout.n_rows)
        return batches_of(layout, start, stop, batch_tokens=config.batch_tokens, has_bos=has_bos)

    sample = batches(chunks[0])
    model.residuals(input_ids(layout, sample[0], model.bos_token_id), config.hooks)  # warms caches up
    done = 0
    began = time.perf_counter()
    while sample and time.perf_counter() - began < SAMPLE_SECONDS:
        # From both ends in turn, since the batches are sorted by length.
        batch = sample.pop(0 if len(sample) % 2 else -1)
        found = model.residuals(input_ids(layout, batch, model.bos_token_id), config.hooks)
        found[config.hooks[0]].cpu()  # a GPU works on after the call returns; the copy waits for it
        done += padded_tokens([batch])
    elapsed = time.perf_counter() - began
    return elapsed * sum(padded_tokens(batches(chunk)) for chunk in chunks) / done
