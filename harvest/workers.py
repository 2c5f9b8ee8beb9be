"""Chunks as tasks for other processes: what a worker needs to know, and what it keeps from chunk to chunk.

A worker reads the plan from the store, loads the model once, and writes its chunks itself; a chunk has one
file a hook, so no two workers write to one file. That its bytes are those that the process in charge would have
written is checked, not assumed: matrix products may round differently on another processor, and could do so
with another number of threads, so one batch of the store (`fingerprint`) is run in each worker and compared bit by bit.
Measured with the MKL of torch 2.13 on AVX2, float32, one to four threads: all bits equal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from tcsae.harvest.batches import batches_of, input_ids, padded_tokens, run_chunk
from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.harvest.plan import provenance_of
from tcsae.store.errors import ConfigError, StoreMismatch
from tcsae.store.index import read_layout
from tcsae.store.kept import Kept
from tcsae.store.layout import Layout
from tcsae.store.spec import Provenance
from tcsae.store.writer import StoreWriter, differences


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """One chunk to be computed and written for every hook."""

    run: str
    """of its own for every call of `tcsae.harvest.harvest`"""
    config: HarvestConfig
    """the harvest; ``store`` is absolute"""
    provenance: Provenance
    """what the store says of itself, which a worker must be able to say too"""
    fingerprint: str
    """`fingerprint`, as the process in charge computes it"""
    chunk: int
    """its number"""

    def __str__(self) -> str:
        return f"{self.config.store}: chunk {self.chunk}"


class _Ready(NamedTuple):
    """What a worker needs for every chunk of one harvest."""

    writer: StoreWriter
    model: LanguageModel


_kept = Kept[_Ready]()
"""Hooks are attached to the model for a pass, so two threads must not run it at once."""


def compute_chunk(task: ChunkTask) -> None:
    """Compute one chunk in this process and write it.

    Raises
    ------
    ConfigError
        this process rounds differently from the one in charge
    StoreMismatch
        this process has another model or other package versions than the store was planned with
    ActivationError, DiskFull
        as `StoreWriter.write` raises them
    Interrupted
        the harvest is over; nothing is written after that
    """
    config = task.config
    with _kept.of(task.run, partial(_prepared, task)) as (writer, model):
        start, stop = writer.rows_of(task.chunk)
        rows = run_chunk(
            model,
            writer.layout,
            start,
            stop,
            hooks=config.hooks,
            d_model=model.d_model,
            batch_tokens=config.batch_tokens,
            on_rows=lambda _: _kept.check(task.run),
        )
    for hook in config.hooks:
        with _kept.before_the_end(task.run):
            writer.write(hook, task.chunk, rows[hook])


def release(run: str) -> None:
    """Drop the model that `compute_chunk` has kept for ``run``, at the latest after the batch that it is at."""
    _kept.end(run)


def fingerprint(config: HarvestConfig, model: LanguageModel, layout: Layout) -> str:
    """SHA-256 over the bits of the activations of the largest batch of a store's first chunk, which any difference in
    how a machine rounds is likeliest to show in."""
    stop = min(config.rows_per_chunk, layout.n_rows)
    has_bos = model.bos_token_id is not None
    batches = batches_of(layout, 0, stop, batch_tokens=config.batch_tokens, has_bos=has_bos)
    batch = max(batches, key=lambda one: padded_tokens([one]))
    found = model.residuals(input_ids(layout, batch, model.bos_token_id), config.hooks)
    digest = hashlib.sha256()
    for hook in config.hooks:
        digest.update(found[hook].cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _prepared(task: ChunkTask) -> _Ready:
    config, planned = task.config, task.provenance
    # By the name in the plan: a folder's is absolute there, and a worker may run in another folder.
    model = load_model(planned.model, precision=config.precision, device=config.device)
    here = replace(provenance_of(config, model, planned.corpus_sha256), model=planned.model)
    differing = differences(planned, here)
    if differing:
        raise StoreMismatch(
            f"{config.store}: a worker differs from what was planned: {'; '.join(differing)}; give all workers "
            "the same model and the same packages"
        )
    layout = read_layout(config.store)
    if fingerprint(config, model, layout) != task.fingerprint:
        raise ConfigError(
            f"workers: expected every process to round alike, got other last bits from one ({model.device}, "
            f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}), so the store would "
            "not be reproducible; use workers with one kind of processor and the same OMP_NUM_THREADS everywhere"
        )
    return _Ready(StoreWriter(config.store, layout, planned), model)
