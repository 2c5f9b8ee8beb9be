"""Chunks as tasks for other processes: what a worker needs to know, and what it keeps from chunk to chunk.

A worker reads the plan from the store, loads the model once, and writes its chunks itself; a chunk has one
file a hook, so no two workers write to one file. That its bytes are those that the process in charge would have
written is checked, not assumed: matrix products may round differently on another processor, and could do so
with another number of threads, so the first batch of the store is run in each worker and compared bit by bit.
Measured with the MKL of torch 2.13 on AVX2, float32, one to four threads: all bits equal.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, replace

import torch

from tcsae.harvest.batches import batches_of, input_ids, run_chunk
from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.harvest.plan import provenance_of
from tcsae.store.errors import ConfigError, StoreMismatch
from tcsae.store.index import read_layout
from tcsae.store.layout import Layout
from tcsae.store.spec import Provenance
from tcsae.store.writer import StoreWriter, differences


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """One chunk to be computed and written for every hook."""

    config: HarvestConfig
    """the harvest; ``store`` is absolute"""
    provenance: Provenance
    """what the store says of itself, which a worker must be able to say too"""
    fingerprint: str
    """of the first batch, as the process in charge computes it"""
    chunk: int
    """its number"""

    def __str__(self) -> str:
        return f"{self.config.store}: chunk {self.chunk}"


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    provenance: Provenance
    writer: StoreWriter
    model: LanguageModel


_one_at_a_time = threading.Lock()
"""Hooks are attached to the model for a pass, so two threads must not run it at once."""

_ready: list[_Ready] = []
"""What this process has loaded: nothing, or one harvest's model and plan."""


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
    """
    config = task.config
    with _one_at_a_time:
        ready = _prepared(task)
        start, stop = ready.writer.rows_of(task.chunk)
        rows = run_chunk(
            ready.model,
            ready.writer.layout,
            start,
            stop,
            hooks=config.hooks,
            d_model=ready.model.d_model,
            batch_tokens=config.batch_tokens,
        )
    for hook in config.hooks:
        ready.writer.write(hook, task.chunk, rows[hook])


def release() -> None:
    """Drop the model that `compute_chunk` has kept."""
    with _one_at_a_time:
        _ready.clear()


def fingerprint(config: HarvestConfig, model: LanguageModel, layout: Layout) -> str:
    """SHA-256 over the bits of the activations of a store's first batch."""
    stop = min(config.rows_per_chunk, layout.n_rows)
    has_bos = model.bos_token_id is not None
    batch = batches_of(layout, 0, stop, batch_tokens=config.batch_tokens, has_bos=has_bos)[0]
    found = model.residuals(input_ids(layout, batch, model.bos_token_id), config.hooks)
    digest = hashlib.sha256()
    for hook in config.hooks:
        digest.update(found[hook].cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _prepared(task: ChunkTask) -> _Ready:
    if _ready and _ready[0].provenance == task.provenance and _ready[0].writer.path == task.config.store:
        return _ready[0]
    _ready.clear()
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
    _ready.append(_Ready(planned, StoreWriter(config.store, layout, planned), model))
    return _ready[0]
