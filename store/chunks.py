"""Chunk files: encoded rows, then a 4-byte CRC-32C. Uncompressed, a chunk file is its rows.

That is exactly what Zarr's ``bytes`` and ``crc32c`` codecs write, so any Zarr reader opens it, and exactly
what a memory map needs, so this package reads it without a copy. The last chunk of an array is padded with
zero rows to the full size, as Zarr asks.
"""

from __future__ import annotations

import math
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.store.atomic import put_in_place, write_all, written_beside
from tcsae.store.codecs import Codec, make_codec
from tcsae.store.errors import StoreCorrupt, UnknownName
from tcsae.store.spec import ACTIVATIONS, TORCH_DTYPES, Dtype, Provenance

CHECKSUM_BYTES = 4
"""bytes of the CRC-32C after the rows, little-endian"""

BLOCK_BYTES = 2**18
"""bytes that are checked or summed before they are written: they stay in the processor's cache meanwhile"""

Bytes = npt.NDArray[np.uint8]

_BITS = {2: torch.int16, 4: torch.int32}

MEND = "copy the file again from a good store, or recompute it with `tcsae harvest ... --resume`"

COPY_AGAIN = "copy it again from a good store with `tcsae store copy ... --resume`"
"""for a file of the plan, which a harvest goes by and does not make again"""


def chunk_path(store: Path, hook: str, chunk: int) -> Path:
    """File of chunk number ``chunk`` (Zarr's default key for a two-dimensional array)."""
    return store / ACTIVATIONS / hook / "c" / str(chunk) / "0"


def chunk_bytes(rows_per_chunk: int, d_model: int, dtype: Dtype) -> int:
    """Size of every chunk file in bytes, checksum included."""
    return rows_per_chunk * d_model * TORCH_DTYPES[dtype].itemsize + CHECKSUM_BYTES


def encoded(rows: Float[Tensor, "row d_model"], rows_per_chunk: int, codec: Codec | None = None) -> Bytes:
    """Body of the chunk file of ``rows`` (already in the stored dtype): without ``codec``, the rows' bytes.

    A view of ``rows`` where they are whole and uncompressed.
    """
    if len(rows) < rows_per_chunk:
        rows = torch.cat([rows, rows.new_zeros(rows_per_chunk - len(rows), rows.shape[1])])
    return rows.contiguous().view(torch.uint8).numpy().reshape(-1) if codec is None else codec.encode(rows)


def write_raw(path: Path, body: Bytes, *, sync_folder: bool = True) -> None:
    """Write ``body`` and its CRC-32C to ``path``, whole or not at all (see `atomic.partial_file`)."""
    write_raw_beside(path, body)
    put_in_place(path, sync_folder=sync_folder)


def write_raw_beside(path: Path, body: Bytes) -> None:
    """Write ``body`` and its CRC-32C beside ``path``, for `atomic.put_in_place`."""
    checksum = 0
    with written_beside(path) as beside, beside.open("wb", buffering=0) as file:
        for start in range(0, body.size, BLOCK_BYTES):
            block = body[start : start + BLOCK_BYTES]
            checksum = google_crc32c.extend(checksum, block)
            write_all(file, block.data)
        write_all(file, checksum.to_bytes(CHECKSUM_BYTES, "little"))


def is_finite(rows: Float[Tensor, "row d_model"]) -> bool:
    """Whether no value is NaN or infinite: about seventy times as fast as ``torch.isfinite`` on float16.

    The exponent of such a value is all ones, so its bits are at least those of infinity. Read as signed
    numbers, positive values are the large ones; read as unsigned, the negative ones are above them all. So
    two maxima over the same bits answer, without a copy.

    >>> is_finite(torch.tensor([[1.0, -65504.0]]).half()), is_finite(torch.tensor([[1.0, -70000.0]]).half())
    (True, False)
    """
    if not rows.numel():
        return True
    signed, unsigned = (np.int32, np.uint32) if rows.dtype.itemsize == 4 else (np.int16, np.uint16)
    infinity = int(torch.tensor([torch.inf], dtype=rows.dtype).view(_BITS[rows.dtype.itemsize]))
    bits = rows.contiguous().view(_BITS[rows.dtype.itemsize]).numpy().reshape(-1)
    sign = 1 << (8 * rows.dtype.itemsize - 1)
    size = BLOCK_BYTES // rows.dtype.itemsize
    blocks = (bits[start : start + size] for start in range(0, bits.size, size))
    return all(
        block.view(signed).max() < infinity and block.view(unsigned).max() < infinity + sign
        for block in blocks
    )


def map_chunk(path: str, made: Provenance) -> Float[Tensor, "row d_model"]:
    """Map a chunk file of raw rows, padding included, without looking at it: for one that was verified before.

    Raises
    ------
    StoreCorrupt
        it cannot be mapped
    """
    shape = made.rows_per_chunk, made.d_model
    try:  # see `map_file`; the checksum behind the rows is left out
        rows = torch.from_file(path, shared=False, size=math.prod(shape), dtype=TORCH_DTYPES[made.dtype])
    except RuntimeError as error:
        raise StoreCorrupt(f"{path}: cannot be mapped ({str(error).splitlines()[0]}); {MEND}") from error
    return rows.view(shape)


def read_chunk(
    store: Path, made: Provenance, hook: str, chunk: int, *, checksum: int | None = None
) -> Float[Tensor, "row d_model"]:
    """Rows of a chunk, padding included: a view of its map where they are stored raw, decoded where not.

    Raises
    ------
    StoreCorrupt
        as `map_raw`, or the bytes cannot be decoded
    """
    return read_checked(store, made, hook, chunk, checksum=checksum)[0]


def read_checked(
    store: Path, made: Provenance, hook: str, chunk: int, *, checksum: int | None = None
) -> tuple[Float[Tensor, "row d_model"], int]:
    """Rows of a chunk as `read_chunk` gives them, and the CRC-32C of its file's body."""
    path = chunk_path(store, hook, chunk)
    if made.codec == "raw":
        size = chunk_bytes(made.rows_per_chunk, made.d_model, made.dtype)
        body, found = map_raw(path, size, checksum=checksum)
        return _as_rows(body, made), found
    body, found = map_raw(path, None, checksum=checksum)
    try:
        rows = codec_of(made, hook).decode(body, made.rows_per_chunk, made.d_model)
        if not is_finite(rows):  # which no writer stores
            raise ValueError("NaN or infinite values")
    except ValueError as error:
        raise StoreCorrupt(f"{path}: cannot be decoded as {made.codec} ({error}); {MEND}") from error
    return rows, found


def _as_rows(body: Bytes, made: Provenance) -> Float[Tensor, "row d_model"]:
    return torch.from_numpy(body).view(TORCH_DTYPES[made.dtype]).view(made.rows_per_chunk, made.d_model)


def codec_of(made: Provenance, hook: str) -> Codec:
    """The codec of a hook's chunks; raises `StoreCorrupt` if it is unknown or its configuration unfit."""
    try:
        return make_codec(made.codec, made.dtype, made.codec_configuration.get(hook, {}))
    except (UnknownName, KeyError, OverflowError, TypeError, ValueError) as error:
        raise StoreCorrupt(
            f"codec of {hook}: {error}; upgrade tcsae, or copy the store again if that does not help"
        ) from error


def map_raw(
    path: Path, n_bytes: int | None, *, checksum: int | None = None, mend: str = MEND
) -> tuple[Bytes, int]:
    """Map a file that `write_raw` wrote and check it: its body and its CRC-32C.

    The whole file is read once for the check.

    Parameters
    ----------
    path
        the file
    n_bytes
        its expected size, checksum included; None if only its checksum tells
    checksum
        the CRC-32C that the store's table has for it, which tells a file swapped for another, whole one
    mend
        what an error says is to be done

    Raises
    ------
    StoreCorrupt
        as `map_file`, or the file fails its checksum
    """
    raw = map_file(path, n_bytes, mend=mend)
    body = raw[:-CHECKSUM_BYTES]
    stored = int.from_bytes(raw[-CHECKSUM_BYTES:].tobytes(), "little")
    computed = int(google_crc32c.value(body))
    if stored != computed:
        raise StoreCorrupt(f"{path}: CRC-32C {stored:08x} stored, {computed:08x} computed; {mend}")
    if checksum is not None and checksum != stored:
        raise StoreCorrupt(
            f"{path}: CRC-32C {checksum:08x} expected, {stored:08x} found: another chunk's file; {mend}"
        )
    return body, stored


def map_file(path: Path, n_bytes: int | None, *, mend: str = MEND) -> Bytes:
    """Map a file of ``n_bytes``, or of any size that holds a checksum, without looking at its bytes.

    The map is copy-on-write: writing to it never changes the file. It holds no file descriptor, of which a
    process often may have only 1,024: `numpy.memmap` keeps one for each map.

    Raises
    ------
    StoreCorrupt
        the file is missing, has another size or cannot be mapped
    """
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise StoreCorrupt(f"{path}: chunk is missing; {mend}") from None
    if found != (n_bytes or max(found, CHECKSUM_BYTES)):
        raise StoreCorrupt(f"{path}: expected {n_bytes or 'more'} bytes, got {found}; {mend}")
    try:
        mapped = torch.from_file(str(path), shared=False, size=found, dtype=torch.uint8)
    except RuntimeError as error:
        raise StoreCorrupt(f"{path}: cannot be mapped ({str(error).splitlines()[0]}); {mend}") from error
    return mapped.numpy()
