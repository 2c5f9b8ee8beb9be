"""What a store has before its first chunk: all that is known of it without the model, and a lock on it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tcsae.store.atomic import (
    PARTIAL,
    exclusive,
    partial_file,
    remove_partials,
    sync_folders,
    write_atomically,
)
from tcsae.store.chunks import write_raw
from tcsae.store.errors import StoreBusy, StoreExists
from tcsae.store.layout import Layout
from tcsae.store.metadata import (
    DIGESTED,
    ROOT,
    TABLE_DIGESTS,
    Sizes,
    array_metadata,
    read_root,
    root_metadata,
    table_digests,
)
from tcsae.store.spec import (
    ACTIVATIONS,
    CHECKSUMS,
    CONTEXT_OFFSETS,
    DOCUMENT_OFFSETS,
    DOCUMENTS_FILE,
    TOKENS,
    TRUTH,
    Provenance,
)
from tcsae.store.truth import Truth, truth_chunks, write_truth

LOCK = ".writer.lock"

FOLDERS = (TOKENS, DOCUMENT_OFFSETS, CONTEXT_OFFSETS, ACTIVATIONS, CHECKSUMS, TRUTH)

_GROUPS = f"({ACTIVATIONS}|{CHECKSUMS}|{TRUTH})"

_ARRAYS = f"({TOKENS}|{DOCUMENT_OFFSETS}|{CONTEXT_OFFSETS}|{_GROUPS}/[^/]+)"

PLANNED = re.compile(
    rf"({re.escape(LOCK)}|({ROOT}|{DOCUMENTS_FILE}|{_GROUPS}/{ROOT}|{_ARRAYS}/({ROOT}|c/\d+(/0)?))({PARTIAL})?)"
)
"""Files that a planning phase which was killed may leave, or a store that was deleted in part: none that cannot be
written again."""


def write_plan(
    path: Path, layout: Layout, made: Provenance, attributes: dict[str, str], truth: Truth | None
) -> None:
    """Write every file but the chunks and their checksums, the root group last and not complete.

    Call it while holding the lock. ``attributes`` are kept in the root group with those of ``made``.
    """
    if (truth is None) != (made.truth is None):
        raise ValueError(f"{path}: a truth is written where the provenance names one, and only there")
    remove_partials(path)
    for name in (ACTIVATIONS, CHECKSUMS, TRUTH):
        # chunks under no plan are of a store that was deleted in part, and no one knows of which model
        _remove(path / name)
    sizes = Sizes(layout.n_rows, layout.n_documents, layout.n_contexts)
    for name, content in array_metadata(made, sizes).items():
        write_atomically(path / name, content, sync_folder=False)
    for name, values in (
        (TOKENS, layout.tokens.astype("<i4")),
        (DOCUMENT_OFFSETS, layout.document_offsets.astype("<i8")),
        (CONTEXT_OFFSETS, layout.context_offsets.astype("<i8")),
    ):
        body = np.ascontiguousarray(values).view(np.uint8)
        write_raw(path / name / "c" / "0", body, sync_folder=False)
    if truth is not None:
        write_truth(path, truth)
    with partial_file(path / DOCUMENTS_FILE, sync_folder=False) as beside:
        pq.write_table(layout.documents, beside, compression="zstd")
    sync_folders(path)
    planned = {TABLE_DIGESTS: table_digests(path, digested_files(made)), **attributes}
    write_atomically(path / ROOT, root_metadata(made, **planned, complete=False))


def digested_files(made: Provenance) -> tuple[str, ...]:
    """Names of the files whose SHA-256 is kept in the root group."""
    return (*DIGESTED, *truth_chunks(made))


def refuse_existing(path: Path) -> None:
    """Raise `StoreExists` if ``path`` holds a store, or anything but what a killed planning phase leaves."""
    if (path / ROOT).exists():
        is_complete = read_root(path).get("complete")
        state = (
            "a finished store, which --resume checks and mends"
            if is_complete
            else "an unfinished store: add --resume"
        )
        raise StoreExists(f"{path}: already holds {state}; choose another path or delete it")
    if path.exists() and not (path.is_dir() and all(map(PLANNED.fullmatch, _files(path)))):
        raise StoreExists(f"{path}: exists and is not a store; choose another path")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only writer of the store at ``path`` for the block; raises `StoreBusy` if there is another."""
    busy = StoreBusy(f"{path}: another process is writing to this store; wait for it or stop it")
    with exclusive(path / LOCK, busy):
        yield


def _files(path: Path) -> Iterator[str]:
    """Names of the files in a folder, and of the folders in it that are not a store's; links are not followed."""
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name).relative_to(path).as_posix() for name in names)
    yield from (entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in FOLDERS)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
