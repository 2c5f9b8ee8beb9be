"""The zarr.json files of a store, written by zarr-python itself.

They are made in memory and then written like every other file of a store (synced and renamed, the root
group last), because a store whose root group exists is one whose layout is complete on disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tcsae.store.errors import StoreCorrupt, StoreNotFound
from tcsae.store.spec import (
    ACTIVATIONS,
    CHECKSUMS,
    CONTEXT_OFFSETS,
    DOCUMENT_OFFSETS,
    DOCUMENTS_FILE,
    FORMAT,
    FORMAT_VERSION,
    KINDS,
    TOKENS,
    TORCH_DTYPES,
    TRUTH,
    TRUTH_ARRAYS,
    ZARR_DTYPES,
    Provenance,
)

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

ROOT = "zarr.json"

TABLE_DIGESTS = "table_sha256"
"""Attribute: SHA-256 of the documents' table and of each index array's file, by name; older stores have none"""

DIGESTED = (*(f"{array}/c/0" for array in (TOKENS, DOCUMENT_OFFSETS, CONTEXT_OFFSETS)), DOCUMENTS_FILE)
"""files that have one"""

FIRST_BATCH = "first_batch_sha256"
"""Attribute: SHA-256 over the activations of the first chunk's largest batch as the harvest's processor computed them,
before the cast; named after what it was over at first"""

PLANNED_ATTRIBUTES = (TABLE_DIGESTS, FIRST_BATCH)
"""Attributes that are written with the plan and kept by `StoreWriter.finish`; not part of the id."""

MAX_HEADER_BYTES = 64 * 2**20
"""A root group larger than this is refused: 64 hooks of 16,384 dimensions stay well below."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths of a store's axes."""

    rows: int
    documents: int
    contexts: int

    def chunks(self, rows_per_chunk: int) -> int:
        """Chunk files of each hook; the last may be padded."""
        return -(-self.rows // rows_per_chunk)


def array_metadata(provenance: Provenance, sizes: Sizes) -> dict[str, bytes]:
    """Every zarr.json below the root group, by its path in the store.

    Index arrays are one chunk each, so that they too can be memory-mapped; activations are chunked by rows.
    """
    # imported here, as below: zarr takes a third of a second, which nothing but opening a store needs
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    memory: dict[str, Buffer] = {}
    root = zarr.create_group(MemoryStore(memory))

    def create(
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: str,
        serializer: Any = BytesCodec(endian="little"),  # noqa: B008  # a value
        compressors: Iterable[Any] = (),
        **attributes: Any,
    ) -> None:
        root.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            serializer=serializer,
            compressors=[*compressors, Crc32cCodec()],
            fill_value=0,
            attributes=attributes,
        )

    def create_index(name: str, length: int, dtype: str) -> None:
        create(name, (length,), (length,), dtype)

    create_index(TOKENS, sizes.rows, "int32")
    create_index(DOCUMENT_OFFSETS, sizes.documents + 1, "int64")
    create_index(CONTEXT_OFFSETS, sizes.contexts + 1, "int64")
    dtype = ZARR_DTYPES[provenance.dtype]
    marks = {"stored_as": provenance.dtype} if dtype != provenance.dtype else {}
    for hook in provenance.hooks:
        create_index(f"{CHECKSUMS}/{hook}", sizes.chunks(provenance.rows_per_chunk), "uint32")
        shape = (sizes.rows, provenance.d_model)
        chunks = (provenance.rows_per_chunk, provenance.d_model)
        create(f"{ACTIVATIONS}/{hook}", shape, chunks, dtype, **_zarr_codecs(provenance, hook), **marks)
    if provenance.truth is not None:
        lengths = {"feature": provenance.truth["features"], "d_model": provenance.d_model}
        for name, (kind, axes) in TRUTH_ARRAYS.items():
            shape = tuple(lengths[axis] for axis in axes)
            names = {"names": list(KINDS)} if name == "kind" else {}
            create(f"{TRUTH}/{name}", shape, shape, np.dtype(kind).name, **names)
    return {name: value.to_bytes() for name, value in sorted(memory.items()) if name != ROOT}


def _zarr_codecs(provenance: Provenance, hook: str) -> dict[str, Any]:
    """How Zarr is to decode a hook's chunks, before their CRC-32C; nothing for rows as they are."""
    from zarr.codecs import BloscCodec

    from tcsae.store.codecs import BLOSC_LEVEL
    from tcsae.store.zarr_codecs import Int8Codec, UniformCodec

    match provenance.codec:
        case "raw":
            return {}
        case "lossless":
            size = TORCH_DTYPES[provenance.dtype].itemsize
            return {
                "compressors": (
                    BloscCodec(typesize=size, cname="zstd", clevel=BLOSC_LEVEL, shuffle="shuffle"),
                )
            }
    fitted = {"int8": Int8Codec, "uniform": UniformCodec}[provenance.codec]
    return {"serializer": fitted(provenance.dtype, provenance.codec_configuration.get(hook, {}))}


def root_metadata(provenance: Provenance, **more: Any) -> bytes:
    """The root group's zarr.json: ``provenance``, the format and what a finished harvest adds."""
    attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, **provenance.to_dict(), **more}
    import zarr
    from zarr.storage import MemoryStore

    memory: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(memory), attributes=attributes)
    return bytes(memory[ROOT].to_bytes())


def store_id(
    provenance: Provenance, tokens: npt.NDArray[np.int32], checksums: Iterable[npt.NDArray[Any]]
) -> str:
    """16 hex digits that are equal for equal content: settings, tokens and each hook's chunk checksums."""
    identity = hashlib.sha256(json.dumps(provenance.to_dict(), sort_keys=True).encode())
    for values in (tokens.astype("<i4"), *checksums):
        identity.update(np.ascontiguousarray(values).tobytes())
    return identity.hexdigest()[:16]


def table_digests(store: Path, names: Iterable[str] = DIGESTED) -> dict[str, str]:
    """SHA-256 by name of the files ``names``: the documents' table, the index arrays, and what a truth adds."""
    return {name: file_sha256(store / name) for name in names}


def recorded_digests(attributes: dict[str, Any], where: str) -> dict[str, str]:
    """The SHA-256 by file name that ``attributes`` record, none for an older store; raises `StoreCorrupt`."""
    found = attributes.get(TABLE_DIGESTS, {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise StoreCorrupt(f"{where}: {TABLE_DIGESTS}: expected SHA-256 by file name; copy the store again")
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_root(store: Path) -> dict[str, Any]:
    """The root group's attributes.

    Raises
    ------
    StoreNotFound
        nothing there, or something that is not a tcsae store
    StoreCorrupt
        the file cannot be read, is larger than `MAX_HEADER_BYTES`, or is of a newer format
    """
    path = store / ROOT
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise too_large(str(path), path.stat().st_size)
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        hint = "no finished plan there" if store.exists() else "no such folder"
        raise StoreNotFound(
            f"{store}: not an activation store ({hint}); make one with `tcsae harvest`"
        ) from None
    return checked_root(content, store)


def checked_root(content: bytes, store: str | Path) -> dict[str, Any]:
    """The attributes in ``content``, the root group's file of the store at ``store``, a folder or a URL.

    Raises `StoreNotFound` and `StoreCorrupt` as `read_root` does.
    """
    where = f"{store}/{ROOT}"
    if len(content) > MAX_HEADER_BYTES:
        raise too_large(where, len(content))
    try:
        attributes = json.loads(content)["attributes"]
        name, version = attributes.get("format"), attributes.get("format_version")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise StoreCorrupt(f"{where}: not a Zarr v3 group ({error}); copy the store again") from error
    if name != FORMAT:
        raise StoreNotFound(
            f"{store}: format: expected {FORMAT!r}, got {name!r}; not written by tcsae harvest"
        )
    if version != FORMAT_VERSION:
        raise StoreCorrupt(f"{store}: format {version}, this tcsae reads {FORMAT_VERSION}; upgrade tcsae")
    return dict(attributes)


def too_large(where: str, n_bytes: int) -> StoreCorrupt:
    """The error for a zarr.json that no store has."""
    return StoreCorrupt(f"{where}: {n_bytes} bytes; a store's header is below {MAX_HEADER_BYTES}")
