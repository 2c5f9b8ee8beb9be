"""The index of a store: tokens, offsets and the documents' table, read whole and checked against each other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tcsae.store.chunks import CHECKSUM_BYTES, COPY_AGAIN, codec_of, map_file, map_raw
from tcsae.store.errors import StoreCorrupt
from tcsae.store.layout import Layout, offsets_problem
from tcsae.store.metadata import (
    MAX_HEADER_BYTES,
    ROOT,
    Sizes,
    array_metadata,
    file_sha256,
    read_root,
    recorded_digests,
    too_large,
)
from tcsae.store.spec import (
    CONTEXT_OFFSETS,
    DOCUMENT_COLUMNS,
    DOCUMENT_OFFSETS,
    DOCUMENTS_FILE,
    TOKENS,
    Provenance,
)

INDEX_DTYPES: dict[str, np.dtype[Any]] = {
    TOKENS: np.dtype("<i4"),
    DOCUMENT_OFFSETS: np.dtype("<i8"),
    CONTEXT_OFFSETS: np.dtype("<i8"),
}

DOCUMENTS_AT_ONCE = 2**14
"""lines of the documents' table that are decoded together"""


def read_layout(store: Path, *, check_digests: bool = True) -> Layout:
    """Tokens, offsets and documents of the store at ``store``, finished or not, checked against each other.

    The arrays have a CRC-32C of their own; documents.parquet has none and is compared with its SHA-256 in the
    attributes, if a store is not from before it was kept, unless ``check_digests`` is false.

    Raises `StoreCorrupt` naming the array and what is wrong with it.
    """
    attributes = read_root(store)
    refuse_link(store, store / ROOT)
    made = Provenance.from_dict(attributes, str(store / ROOT))
    digests = recorded_digests(attributes, str(store / ROOT)) if check_digests else {}
    for altered in digest_problems(store, digests, (DOCUMENTS_FILE,)):
        raise StoreCorrupt(f"{altered}; copy the store again")
    tokens = _index(store, TOKENS)
    document_offsets = _index(store, DOCUMENT_OFFSETS)
    context_offsets = _index(store, CONTEXT_OFFSETS)
    problem = offsets_problem(document_offsets, context_offsets, len(tokens))
    if problem:
        raise StoreCorrupt(f"{store}: {problem}; copy the store again")
    documents = _documents(store, len(document_offsets) - 1)
    for hook in made.hooks:
        try:
            codec_of(made, hook)
        except StoreCorrupt as error:
            raise StoreCorrupt(f"{store / ROOT}: {error}") from error
    for name, expected in array_metadata(
        made, Sizes(len(tokens), len(document_offsets) - 1, len(context_offsets) - 1)
    ).items():
        _check_metadata(store, name, expected)
    return Layout(tokens, document_offsets, context_offsets, documents)


def digest_problems(store: Path, digests: dict[str, str], names: Iterable[str]) -> Iterator[str]:
    """A line for each of the files ``names`` that is there and has another SHA-256 than ``digests`` says."""
    for name in names:
        path = store / name
        if name in digests and path.is_file() and (found := file_sha256(path)) != digests[name]:
            yield (
                f"{path}: SHA-256 {digests[name][:12]}… expected, {found[:12]}… found: altered, or another "
                "store's file"
            )


def _index(store: Path, name: str) -> npt.NDArray[Any]:
    header = store / name / ROOT
    refuse_link(store, header)
    found = _read_header(header)
    try:
        length = found["shape"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise StoreCorrupt(f"{header}: cannot be read ({error}); {COPY_AGAIN}") from error
    if type(length) is not int or length < 0:
        raise StoreCorrupt(f"{header}: shape: expected a length, got {length!r}; {COPY_AGAIN}")
    path = store / name / "c" / "0"
    refuse_link(store, path)
    map_raw(path, length * INDEX_DTYPES[name].itemsize + CHECKSUM_BYTES, mend=COPY_AGAIN)
    # Mapped anew: what the check has read of the first map would count as this process's memory.
    return map_index(store, name, length)


def map_index(store: Path, name: str, length: int) -> npt.NDArray[Any]:
    """Map an index array of ``length`` without looking at its bytes; raises `StoreCorrupt` as `map_file` does."""
    dtype = INDEX_DTYPES[name]
    mapped = map_file(store / name / "c" / "0", length * dtype.itemsize + CHECKSUM_BYTES, mend=COPY_AGAIN)
    return mapped[:-CHECKSUM_BYTES].view(dtype)


def _documents(store: Path, n_documents: int) -> pa.Table:
    path = store / DOCUMENTS_FILE
    refuse_link(store, path)
    try:
        # `pq.read_table` imports some 60 MB for folders of files; read in one piece, what decoding takes would stay
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(DOCUMENTS_AT_ONCE, use_threads=False)
            documents = pa.Table.from_batches(batches, file.schema_arrow)
        documents.validate(full=True)
        pa.default_memory_pool().release_unused()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise StoreCorrupt(f"{path}: cannot be read ({said}); copy the store again") from error
    lacking = [name for name in DOCUMENT_COLUMNS if documents.column_names.count(name) != 1]
    if lacking or documents.num_rows != n_documents:
        raise StoreCorrupt(
            f"{path}: expected {n_documents} lines with {', '.join(DOCUMENT_COLUMNS)}, got "
            f"{documents.num_rows} with {', '.join(documents.column_names)}; copy the store again"
        )
    for name in DOCUMENT_COLUMNS:
        kind = documents.schema.field(name).type
        if kind not in ((pa.int64(),) if name == "n_tokens" else (pa.string(), pa.large_string())):
            wanted = "int64" if name == "n_tokens" else "string"
            raise StoreCorrupt(f"{path}: {name}: expected {wanted}, got {kind}; copy the store again")
        if name != "topic" and documents[name].null_count:
            raise StoreCorrupt(f"{path}: {name}: expected a value in every line; copy the store again")
    return documents


def _read_header(path: Path) -> Any:
    """What an array's zarr.json holds; raises `StoreCorrupt` if it is missing, too large or no JSON."""
    try:
        n_bytes = path.stat().st_size
        content = path.read_bytes() if n_bytes <= MAX_HEADER_BYTES else b"null"
        found = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreCorrupt(f"{path}: cannot be read ({error}); {COPY_AGAIN}") from error
    if n_bytes > MAX_HEADER_BYTES:
        raise too_large(str(path), n_bytes)
    return found


def _check_metadata(store: Path, name: str, expected: bytes) -> None:
    """Plain Zarr readers go by these files, so they must say what this reader assumes."""
    path = store / name
    refuse_link(store, path)
    if _read_header(path) != json.loads(expected):
        raise StoreCorrupt(f"{path}: does not fit the group's attributes; copy the store again")


def refuse_link(store: Path, path: Path) -> None:
    """A shared store must not lead a reader to a file elsewhere."""
    inside = os.path.realpath(store)
    if os.path.realpath(path) != os.path.join(inside, path.relative_to(store)):  # noqa: PTH118
        raise StoreCorrupt(f"{path}: is a link out of its place; a store has plain files only")
