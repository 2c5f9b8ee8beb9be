"""Harvesting: plan, then compute the chunks that are missing, here or on workers."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tcsae.harvest.batches import run_chunk
from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.harvest.plan import check_space, make_plan
from tcsae.harvest.resume import is_begun, model_to_go_on_with, settings_begun_with, source_to_go_on_with
from tcsae.harvest.synthetic import SyntheticSource
from tcsae.harvest.synthetic_run import first_document_sha256, synthetic_plan, write_chunks
from tcsae.harvest.synthetic_settings import is_synthetic, parse_synthetic
from tcsae.harvest.workers import ChunkTask, compute_chunk, fingerprint, release
from tcsae.store.interrupt import interruptible
from tcsae.store.parallel import HERE, Pool, check_scheduler, task_pool
from tcsae.store.progress import progress
from tcsae.store.writer import StoreWriter

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestSummary:
    """What a harvest has done."""

    path: Path
    """the finished store"""
    rows: int
    """tokens stored"""
    documents: int
    """documents stored"""
    contexts: int
    """forward passes that the rows come from"""
    hooks: tuple[str, ...]
    """activations stored of every row"""
    chunks: int
    """chunk files of each hook"""
    computed_chunks: int
    """those that this call computed; the others were there"""
    seconds: float
    """time in forward passes and writing"""
    tokens_per_second: float
    """rows computed a second; 0 if none was"""
    skipped: dict[str, int] = field(default_factory=dict)
    """rows of the corpus that became no document, by reason; empty when resumed: it is not read again"""


def harvest(config: HarvestConfig) -> HarvestSummary:
    """Run the model over the corpus once and store its activations.

    With ``config.resume``, an unfinished store is completed, a finished one is checked chunk by chunk and
    mended, and without a store one is begun. Killed at any moment and resumed with the same settings, a
    store has the bytes of an uninterrupted one; with workers, it has the bytes that one process gives it.

    Raises
    ------
    ModelNotFound, CorpusError, UnknownName, ConfigError
        what was asked for is not there, or cannot work; nothing is written
    StoreExists
        there is something at the path and ``resume`` is not set
    StoreMismatch
        the store to resume was begun with other settings, all that differ are named, or on a machine that
        rounds differently
    StoreBusy
        another process is writing to the store
    DiskFull
        what is missing does not fit on the disk (checked first), or the disk has filled up since
    ActivationError
        an activation is NaN, Inf or overflows the stored dtype; its chunk is not written
    WorkersLost
        worker processes died again and again on the same chunk; the finished ones stay
    Interrupted
        Ctrl-C or SIGTERM; finished chunks stay
    """
    begun = is_begun(config)  # refused now, not once the corpus is read
    with interruptible(
        f"{config.store}: interrupted; finished chunks are kept, run the same command with --resume to go on"
    ):
        if is_synthetic(config.corpus):
            return _resume_synthetic(config) if begun else _begin_synthetic(config)
        return _resume(config) if begun else _begin(config)


def _begin_synthetic(config: HarvestConfig) -> HarvestSummary:
    plan = synthetic_plan(config)
    check_space(config.store, plan.provenance, -(-plan.layout.n_rows // config.rows_per_chunk))
    source = SyntheticSource(parse_synthetic(config.corpus), plan.truth)
    first = first_document_sha256(source)
    with StoreWriter.create(
        config.store, plan.layout, plan.provenance, first_batch_sha256=first, truth=plan.truth
    ) as writer:
        return _compute(writer, writer.missing(), _drawing(source), {}, HERE)


def _resume_synthetic(config: HarvestConfig) -> HarvestSummary:
    stored = settings_begun_with(config)
    with StoreWriter.resume(config.store, stored) as writer:
        missing = writer.missing()
        if missing:
            source = source_to_go_on_with(config, stored, len(missing))
            return _compute(writer, missing, _drawing(source), {}, HERE)
        return _nothing_missing(config, writer)


def _drawing(source: SyntheticSource) -> Compute:
    return lambda writer, missing, on_rows: write_chunks(source, writer, missing, on_rows)


def _nothing_missing(config: HarvestConfig, writer: StoreWriter) -> HarvestSummary:
    if writer.is_finished:
        log.info("%s: is complete, nothing to do", config.store)
    else:
        with _pool(config, _new_run()) as pool:
            writer.finish(pool)
    return _summary(writer, 0, 0, 0.0, {})


def _begin(config: HarvestConfig) -> HarvestSummary:
    model = load_model(config.model, precision=config.precision, device=config.device)
    plan = make_plan(config, model)
    n_chunks = -(-plan.layout.n_rows // config.rows_per_chunk)
    check_space(config.store, plan.provenance, n_chunks)
    first = fingerprint(config, model, plan.layout)
    skipped, run = dict(plan.skips.counts), _new_run()
    if config.scheduler is not None:
        check_scheduler(config.scheduler)  # before anything is written
    with (
        StoreWriter.create(config.store, plan.layout, plan.provenance, first_batch_sha256=first) as writer,
        _pool(config, run) as pool,  # left first: no worker writes any more when another may hold the lock
    ):
        compute = _way(config, model, first, run, pool)
        del model  # with workers, which have their own, nothing holds it any more
        return _compute(writer, writer.missing(), compute, skipped, pool)


def _resume(config: HarvestConfig) -> HarvestSummary:
    stored = settings_begun_with(config)
    with StoreWriter.resume(config.store, stored) as writer:
        missing = writer.missing()
        if not missing:
            return _nothing_missing(config, writer)
        model, first = model_to_go_on_with(config, stored, writer.layout, len(missing))
        run = _new_run()
        with _pool(config, run) as pool:
            compute = _way(config, model, first, run, pool)
            del model
            return _compute(writer, missing, compute, {}, pool)


Compute = Callable[[StoreWriter, list[int], Callable[[int], Any]], None]
"""Computes and writes chunks of a store, and says after each step how many rows are done."""


def _new_run() -> str:
    """A name for what workers keep, which no other call has."""
    return uuid.uuid4().hex


def _pool(config: HarvestConfig, run: str) -> AbstractContextManager[Pool]:
    """Where chunks are computed and then summed up."""
    return task_pool(workers=config.workers, scheduler=config.scheduler, release=partial(release, run))


def _way(config: HarvestConfig, model: LanguageModel, first: str, run: str, pool: Pool) -> Compute:
    """How chunks are computed: in this process with its model, or by workers, which load it themselves."""
    if pool is HERE:
        return lambda writer, missing, on_rows: _compute_here(config, model, writer, missing, on_rows)
    return lambda writer, missing, on_rows: _compute_on_workers(
        config, first, run, writer, missing, on_rows, pool
    )


def _compute_here(
    config: HarvestConfig,
    model: LanguageModel,
    writer: StoreWriter,
    missing: list[int],
    on_rows: Callable[[int], Any],
) -> None:
    for chunk in missing:
        start, stop = writer.rows_of(chunk)
        rows = run_chunk(
            model,
            writer.layout,
            start,
            stop,
            hooks=config.hooks,
            d_model=model.d_model,
            batch_tokens=config.batch_tokens,
            on_rows=on_rows,
        )
        for hook in config.hooks:
            writer.write(hook, chunk, rows[hook])


def _compute_on_workers(
    config: HarvestConfig,
    expected: str,
    run: str,
    writer: StoreWriter,
    missing: list[int],
    on_rows: Callable[[int], Any],
    pool: Pool,
) -> None:
    there = replace(config, store=config.store.absolute())
    tasks = [ChunkTask(run, there, writer.provenance, expected, chunk) for chunk in missing]
    for task, _ in pool.map(compute_chunk, tasks):
        start, stop = writer.rows_of(task.chunk)
        on_rows(stop - start)


def _compute(
    writer: StoreWriter, missing: list[int], compute: Compute, skipped: dict[str, int], pool: Pool
) -> HarvestSummary:
    began = time.perf_counter()
    todo = sum(stop - start for start, stop in map(writer.rows_of, missing))
    n_rows = writer.layout.n_rows
    with progress(n_rows, "token", f"harvest {writer.path.name}", initial=n_rows - todo) as bar:
        compute(writer, missing, bar.update)
    seconds = time.perf_counter() - began
    writer.finish(pool)
    return _summary(writer, len(missing), todo, seconds, skipped)


def _summary(
    writer: StoreWriter, computed_chunks: int, computed_rows: int, seconds: float, skipped: dict[str, int]
) -> HarvestSummary:
    return HarvestSummary(
        path=writer.path,
        rows=writer.layout.n_rows,
        documents=writer.layout.n_documents,
        contexts=writer.layout.n_contexts,
        hooks=writer.provenance.hooks,
        chunks=writer.n_chunks,
        computed_chunks=computed_chunks,
        seconds=seconds,
        tokens_per_second=computed_rows / seconds if computed_rows else 0.0,
        skipped=skipped,
    )
