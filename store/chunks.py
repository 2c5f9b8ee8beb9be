"""Chunk files: rows, little-endian, then a 4-byte CRC-32C. A chunk file is its rows.

That is exactly what Zarr's ``bytes`` and ``crc32c`` codecs write, so any Zarr reader opens it, and exactly
what a memory map needs, so this package reads it without a copy. The last chunk of an array is padded with
zero rows to the full size, as Zarr asks.
"""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.store.atomic import write_atomically
from tcsae.store.errors import StoreCorrupt
from tcsae.store.spec import ACTIVATIONS, TORCH_DTYPES, Dtype

CHECKSUM_BYTES = 4
"""bytes of the CRC-32C after the rows, little-endian"""

Bytes = npt.NDArray[np.uint8]

MEND = "copy the file again from a good store, or recompute it with `tcsae harvest ... --resume`"


def chunk_path(store: Path, hook: str, chunk: int) -> Path:
    """File of chunk number ``chunk`` (Zarr's default key for a two-dimensional array)."""
    return store / ACTIVATIONS / hook / "c" / str(chunk) / "0"


def chunk_bytes(rows_per_chunk: int, d_model: int, dtype: Dtype) -> int:
    """Size of every chunk file in bytes, checksum included."""
    return rows_per_chunk * d_model * TORCH_DTYPES[dtype].itemsize + CHECKSUM_BYTES


def write_chunk(path: Path, rows: Float[Tensor, "row d_model"], rows_per_chunk: int) -> None:
    """Write ``rows`` (already in the stored dtype) as one chunk file, whole or not at all.

    Raises
    ------
    DiskFull
        nothing is left behind
    """
    if len(rows) < rows_per_chunk:
        rows = torch.cat([rows, rows.new_zeros(rows_per_chunk - len(rows), rows.shape[1])])
    write_raw(path, rows.contiguous().view(torch.uint8).numpy().reshape(-1))


def write_raw(path: Path, body: Bytes) -> None:
    """Write ``body`` and its CRC-32C to ``path``, whole or not at all."""
    checksum = int(google_crc32c.value(body))
    write_atomically(path, body.data, checksum.to_bytes(CHECKSUM_BYTES, "little"))


def map_chunk(
    path: Path, rows_per_chunk: int, d_model: int, dtype: Dtype, *, checksum: int | None = None
) -> Float[Tensor, "row d_model"]:
    """Map a chunk file into memory without copying it, padding rows included (see `map_raw`)."""
    body, _ = map_raw(path, chunk_bytes(rows_per_chunk, d_model, dtype), checksum=checksum)
    return torch.from_numpy(body).view(TORCH_DTYPES[dtype]).view(rows_per_chunk, d_model)


def map_raw(path: Path, n_bytes: int, *, checksum: int | None = None) -> tuple[Bytes, int]:
    """Map a file that `write_raw` wrote and check it: its body and its CRC-32C.

    The whole file is read once for the check. The map is copy-on-write: writing to it never changes the file.

    Parameters
    ----------
    path
        the file
    n_bytes
        its expected size, checksum included
    checksum
        the CRC-32C that the store's table has for it, which tells a file swapped for another, whole one

    Raises
    ------
    StoreCorrupt
        the file is missing, has another size, or fails its checksum
    """
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="c")
    except FileNotFoundError:
        raise StoreCorrupt(f"{path}: chunk is missing; {MEND}") from None
    except ValueError:  # an empty file cannot be mapped
        raise StoreCorrupt(f"{path}: expected {n_bytes} bytes, got 0; {MEND}") from None
    if raw.size != n_bytes:
        raise StoreCorrupt(f"{path}: expected {n_bytes} bytes, got {raw.size}; {MEND}")
    body = raw[:-CHECKSUM_BYTES]
    stored = int.from_bytes(raw[-CHECKSUM_BYTES:].tobytes(), "little")
    computed = int(google_crc32c.value(body))
    if stored != computed:
        raise StoreCorrupt(f"{path}: CRC-32C {stored:08x} stored, {computed:08x} computed; {MEND}")
    if checksum is not None and checksum != stored:
        raise StoreCorrupt(
            f"{path}: CRC-32C {checksum:08x} expected, {stored:08x} found: another chunk's file; {MEND}"
        )
    return body, stored
