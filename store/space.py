"""Bytes that a store takes, counted before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from tcsae.store.chunks import CHECKSUM_BYTES, chunk_bytes
from tcsae.store.layout import Layout
from tcsae.store.spec import Provenance

TABLE_MARGIN = 2**20
"""bytes for the metadata files of a store"""

CODEC_MARGIN = 1.05
"""A codec's ratio is measured on a sample; where no file's size is known, the whole may compress this much worse."""


def hook_bytes(made: Provenance, n_rows: int) -> int:
    """Bytes of one hook's chunk files with uncompressed rows; the last one is as large as the others."""
    n_chunks = -(-n_rows // made.rows_per_chunk)
    return n_chunks * chunk_bytes(made.rows_per_chunk, made.d_model, made.dtype)


def stored_bytes(made: Provenance, n_rows: int) -> int:
    """Bytes of all hooks' chunk files to be expected, compressed as ``made`` says."""
    total = 0
    for hook in made.hooks:
        raw = hook_bytes(made, n_rows)
        ratio = made.codec_effect.get(hook, {}).get("ratio")
        total += raw if ratio is None else int(raw / ratio * CODEC_MARGIN)
    return total


def store_bytes(made: Provenance, layout: Layout) -> int:
    """Bytes of the whole store to be expected, compressed as ``made`` says; rather too many than too few."""
    tables = (layout.tokens, layout.document_offsets, layout.context_offsets)
    total = sum(table.nbytes + CHECKSUM_BYTES for table in tables)
    return total + int(layout.documents.nbytes) + TABLE_MARGIN + stored_bytes(made, layout.n_rows)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that ``path`` is on or would be on; creates nothing."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def folder_bytes(path: Path) -> tuple[int, int]:
    """Bytes and number of the files under ``path``; nothing for a folder that is not there."""
    sizes = [found.stat().st_size for found in path.rglob("*") if found.is_file()]
    return sum(sizes), len(sizes)
