"""What a store has after its last chunk: checksums, statistics, an id, and the word that it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tcsae.store.atomic import sync_folders, write_atomically
from tcsae.store.chunks import read_checked, write_raw
from tcsae.store.layout import Layout
from tcsae.store.metadata import (
    PLANNED_ATTRIBUTES,
    ROOT,
    TABLE_DIGESTS,
    read_root,
    root_metadata,
    store_id,
    table_digests,
)
from tcsae.store.parallel import Pool
from tcsae.store.planning import digested_files
from tcsae.store.progress import progress
from tcsae.store.spec import CHECKSUMS, Provenance
from tcsae.store.statistics import (
    ChunkRows,
    NormCounts,
    chunk_rows,
    count_norms,
    quantiles_of,
    train_statistics,
)


def complete_store(path: Path, layout: Layout, made: Provenance, pool: Pool) -> None:
    """Read every chunk of every hook twice, by the workers of ``pool``, and mark the store as complete.

    The bytes that are written are the same whoever reads. Call it while holding the store's lock. Raises
    `StoreCorrupt` if a chunk is missing or damaged.
    """
    tables: dict[str, npt.NDArray[np.uint32]] = {}
    found: dict[str, Any] = {}
    n_chunks = -(-layout.n_rows // made.rows_per_chunk)
    with progress(2 * n_chunks * len(made.hooks), "chunk", f"finish {path.name}") as bar:
        for hook in made.hooks:
            # absolute: a scheduler's workers may have been started in another folder
            chunks = chunk_rows(path.absolute(), made, layout, hook)
            checksums: list[int] = []
            quantiles = quantiles_of(_looks(chunks, pool, checksums, bar.update))
            tables[hook] = np.array(checksums, dtype="<u4")
            write_raw(path / CHECKSUMS / hook / "c" / "0", tables[hook].view(np.uint8))
            statistics = train_statistics(chunks, quantiles, made.d_model, pool=pool, on_chunk=bar.update)
            found[hook] = statistics.to_dict()
    identity = store_id(made, layout.tokens, tables.values())
    begun = {TABLE_DIGESTS: table_digests(path, digested_files(made))} | read_root(path)
    planned = {name: begun[name] for name in PLANNED_ATTRIBUTES if name in begun}
    attributes = {**planned, "statistics": found, "id": identity, "complete": True}
    sync_folders(path)  # of every chunk and table, before the root group says that they are there
    write_atomically(path / ROOT, root_metadata(made, **attributes))


class _Look(NamedTuple):
    checksum: int
    """CRC-32C of the chunk file's body"""
    norms: NormCounts
    """of its rows of the train split"""


def _look(task: ChunkRows) -> _Look:
    rows, checksum = read_checked(task.store, task.made, task.hook, task.chunk)
    return _Look(checksum, count_norms(rows, task.is_train))


def _looks(
    chunks: list[ChunkRows], pool: Pool, checksums: list[int], on_chunk: Callable[[], Any]
) -> Iterator[NormCounts]:
    """The norms of each chunk in turn, whose checksum is appended to ``checksums``."""
    for found in pool.map_in_order(_look, chunks):
        checksums.append(found.checksum)
        on_chunk()
        yield found.norms
