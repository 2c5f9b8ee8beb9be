"""What a harvest would do and how long it would take, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tcsae.harvest.batches import Batch, batches_of, input_ids, padded_tokens
from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.harvest.plan import check_space, make_plan
from tcsae.harvest.resume import is_begun, model_to_go_on_with, settings_begun_with, source_to_go_on_with
from tcsae.harvest.synthetic import SyntheticSource
from tcsae.harvest.synthetic_run import seconds_for, synthetic_plan
from tcsae.harvest.synthetic_settings import is_synthetic, parse_synthetic
from tcsae.store.chunks import chunk_path
from tcsae.store.index import read_layout
from tcsae.store.layout import Layout
from tcsae.store.space import free_bytes, hook_bytes
from tcsae.store.spec import Dtype, Precision, Provenance

SAMPLE_SECONDS = 3.0
"""How long a dry run lets the model run to estimate the whole time."""


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
    """rows of the corpus that became no document, by reason; empty when resumed: it is not read again"""


def dry_run(config: HarvestConfig) -> DryRun:
    """Plan a harvest and time a few batches. **Writes nothing**, wherever the store would be.

    It loads the model and reads the corpus (or draws the documents of a synthetic one), so it finds what a
    harvest would find wrong with them, and raises what a harvest would raise, `StoreExists` and `DiskFull` with the
    numbers included. With ``config.resume`` it compares with the store that was begun what a resumed harvest
    compares, no more: the corpus is not read again, and if no chunk is missing no model is loaded. Chunks that are
    there need neither space nor time; that they are whole is not checked.
    """
    return _of_begun(config) if is_begun(config) else _of_new(config)


def _of_new(config: HarvestConfig) -> DryRun:
    if is_synthetic(config.corpus):
        drawn = synthetic_plan(config)
        missing = _chunks_of(drawn.layout, drawn.provenance)
        check_space(config.store, drawn.provenance, len(missing))
        source = SyntheticSource(parse_synthetic(config.corpus), drawn.truth)
        seconds = seconds_for(source, _rows_of(drawn.layout, drawn.provenance, missing))
        return _found(config, drawn.layout, drawn.provenance, missing, seconds)
    model = load_model(config.model, precision=config.precision, device=config.device)
    plan = make_plan(config, model)
    missing = _chunks_of(plan.layout, plan.provenance)
    check_space(config.store, plan.provenance, len(missing))
    seconds = _estimate(config, model, plan.layout, missing)
    return _found(config, plan.layout, plan.provenance, missing, seconds, dict(plan.skips.counts))


def _of_begun(config: HarvestConfig) -> DryRun:
    made = settings_begun_with(config)
    layout = read_layout(config.store)
    missing = [chunk for chunk in _chunks_of(layout, made) if not _is_there(config.store, made, chunk)]
    seconds = 0.0
    if missing and is_synthetic(config.corpus):
        source = source_to_go_on_with(config, made, len(missing))
        seconds = seconds_for(source, _rows_of(layout, made, missing))
    elif missing:
        model, _ = model_to_go_on_with(config, made, layout, len(missing))
        seconds = _estimate(config, model, layout, missing)
    return _found(config, layout, made, missing, seconds)


def _found(
    config: HarvestConfig,
    layout: Layout,
    made: Provenance,
    missing: Sequence[int],
    seconds: float,
    skipped: dict[str, int] | None = None,
) -> DryRun:
    per_hook = hook_bytes(made, layout.n_rows)
    return DryRun(
        store=str(config.store),
        rows=layout.n_rows,
        documents=layout.n_documents,
        contexts=layout.n_contexts,
        chunks=len(_chunks_of(layout, made)),
        missing_chunks=len(missing),
        hooks=made.hooks,
        d_model=made.d_model,
        dtype=made.dtype,
        precision=made.precision,
        bytes_per_hook=per_hook,
        total_bytes=per_hook * len(made.hooks),
        free_bytes=free_bytes(config.store),
        seconds=seconds,
        tokens_per_second=_rows_of(layout, made, missing) / seconds if seconds else 0.0,
        skipped=skipped or {},
    )


def _chunks_of(layout: Layout, made: Provenance) -> range:
    return range(-(-layout.n_rows // made.rows_per_chunk))


def _is_there(store: Path, made: Provenance, chunk: int) -> bool:
    return all(chunk_path(store, hook, chunk).exists() for hook in made.hooks)


def _rows_of(layout: Layout, made: Provenance, chunks: Sequence[int]) -> int:
    """Rows that the chunks hold together."""
    size = made.rows_per_chunk
    return sum(min(size, layout.n_rows - chunk * size) for chunk in chunks)


def _estimate(config: HarvestConfig, model: LanguageModel, layout: Layout, chunks: Sequence[int]) -> float:
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
