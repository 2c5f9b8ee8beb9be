"""Reading a store: zero-copy views of memory-mapped chunk files.

``ActivationStore`` is safe to use from several processes at once and to send to another process (it
reopens there); one object belongs to one thread.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tcsae.store.cache import CachedStore
from tcsae.store.chunks import CHECKSUM_BYTES, MEND, chunk_path, codec_of, map_raw, read_chunk
from tcsae.store.errors import ConfigError, StoreCorrupt, StoreIncomplete, UnknownName
from tcsae.store.metadata import ROOT, Sizes, array_metadata, read_root
from tcsae.store.remote import is_url, local_path
from tcsae.store.spec import (
    CHECKSUMS,
    CONTEXT_OFFSETS,
    DOCUMENT_COLUMNS,
    DOCUMENT_OFFSETS,
    DOCUMENTS_FILE,
    TOKENS,
    TORCH_DTYPES,
    HookStatistics,
    Layout,
    Provenance,
    Split,
    offsets_problem,
)

MAX_MAPPED_CHUNKS = 4096
"""Chunks of a hook that stay mapped at once; Linux allows a process about 65,000 maps in all."""

DECODED_BYTES = 2**29
"""Decoded chunks of a hook that are kept, in bytes; two at least."""

Int64Array = npt.NDArray[np.int64]


class ActivationStore:
    """A finished activation store, opened for reading.

    Parameters
    ----------
    path
        folder of the store; use `open`, which checks it first

    Examples
    --------
    >>> store = ActivationStore.open("demo/store.zarr")  # doctest: +SKIP
    >>> store.rows(0, 16).shape  # doctest: +SKIP
    torch.Size([16, 576])
    """

    def __init__(self, path: Path, attributes: dict[str, Any], cached: CachedStore | None = None) -> None:
        self.path = path
        self.url = cached.remote.url if cached else str(path)
        """where the store is; ``path`` is then the folder of what is cached of it"""
        where = str(path / ROOT)
        self.provenance = Provenance.from_dict(attributes, where)
        self.id: str = attributes["id"]
        self._statistics = {
            hook: HookStatistics.from_dict(values, where) for hook, values in attributes["statistics"].items()
        }
        layout = read_layout(path)
        self.tokens = layout.tokens
        self.document_offsets = layout.document_offsets
        self.context_offsets = layout.context_offsets
        self.documents: pa.Table = layout.documents
        self.document_of_context: Int64Array = (
            np.searchsorted(self.document_offsets, self.context_offsets[:-1], side="right") - 1
        )
        self._chunks = {
            hook: _HookChunks(path, hook, self.provenance, self.n_rows, cached) for hook in self.hooks
        }

    @classmethod
    def open(cls, path: str | Path) -> ActivationStore:
        """Open the finished store at ``path``, a folder or a URL that fsspec knows.

        Reads the index arrays and the documents' table; activations are mapped when they are first asked for,
        and each chunk's CRC-32C is checked then. Of a store at a URL, whole chunks are fetched when they are
        first asked for and kept on this machine (`tcsae.store.cache`: ``$TCSAE_CACHE``, 50 GB or
        ``$TCSAE_CACHE_GB``).

        Raises
        ------
        StoreNotFound
            nothing there, or not a store
        StoreIncomplete
            its harvest has not finished
        StoreCorrupt
            a table is missing, altered or does not fit the others; a newer format; a link out of the store
        RemoteError
            a store at a URL cannot be reached
        """
        cached = CachedStore(str(path)) if is_url(path) else None
        path = cached.path if cached else local_path(path)
        attributes = read_root(path)
        if not attributes.get("complete"):
            raise StoreIncomplete(
                f"{path}: the harvest has not finished; run the same `tcsae harvest` with --resume"
            )
        lacking = [name for name in ("id", "statistics") if name not in attributes]
        if lacking:
            raise StoreCorrupt(f"{path / ROOT}: attributes lack {', '.join(lacking)}; copy the store again")
        try:
            return cls(path, attributes, cached)
        except StoreCorrupt:
            if cached is None:
                raise
            cached.fetch_tables(again=True)  # what was damaged may be the copy on this machine
            return cls(path, attributes, cached)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ActivationStore.open, (self.url,))

    @property
    def hooks(self) -> tuple[str, ...]:
        """names of the hooks whose activations are here"""
        return self.provenance.hooks

    @property
    def d_model(self) -> int:
        """length of an activation"""
        return self.provenance.d_model

    @property
    def n_rows(self) -> int:
        """tokens in the store"""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """documents in the store"""
        return len(self.document_offsets) - 1

    @property
    def n_contexts(self) -> int:
        """contexts (forward passes) in the store"""
        return len(self.context_offsets) - 1

    def statistics(self, hook: str | None = None) -> HookStatistics:
        """Mean, scale and norms of ``hook`` over the train split; ``hook`` may be left out if it is one."""
        return self._statistics[self._hook(hook)]

    def documents_in(self, split: Split | Literal["all"]) -> Int64Array:
        """Indices of the documents of ``split``, in order, int64."""
        if split == "all":
            return np.arange(self.n_documents)
        return np.flatnonzero(np.array(self.documents["split"].to_pylist()) == split)

    def contexts_in(self, split: Split | Literal["all"]) -> Int64Array:
        """Indices of the contexts whose document is in ``split``, in order, int64."""
        return np.flatnonzero(np.isin(self.document_of_context, self.documents_in(split)))

    def rows(self, start: int, stop: int, hook: str | None = None) -> Float[Tensor, "row d_model"]:
        """Activations of rows ``[start, stop)`` in the stored dtype.

        A view of the memory map when the rows lie in one chunk, a copy when they do not. Writing to a view
        changes neither the file nor what another call returns from another process. Compressed chunks are
        decoded whole, and the last ones are kept (`DECODED_BYTES`): read them chunk by chunk.

        Raises
        ------
        IndexError
            the range leaves the store
        StoreCorrupt
            a chunk is missing, truncated or altered
        """
        if not 0 <= start <= stop <= self.n_rows:
            raise IndexError(f"{self.path}: rows [{start}, {stop}) of {self.n_rows}")
        chunks, size = self._chunks[self._hook(hook)], self.provenance.rows_per_chunk
        first = start // size
        if stop <= (first + 1) * size:
            return chunks[first][start - first * size : stop - first * size]
        parts = range(first, -(-stop // size))
        return torch.cat([chunks[c][max(start - c * size, 0) : min(stop - c * size, size)] for c in parts])

    def document(self, index: int, hook: str | None = None) -> Float[Tensor, "row d_model"]:
        """Activations of document ``index``, all its contexts one after the other (see `rows`)."""
        return self.rows(int(self.document_offsets[index]), int(self.document_offsets[index + 1]), hook)

    def gather(
        self, rows: Int64Array | Int64[Tensor, " row"], hook: str | None = None
    ) -> Float[Tensor, "row d_model"]:
        """Copy of the activations of ``rows``, in the order given, in the stored dtype.

        Rows of one chunk are fetched together, so many rows from few chunks cost least.
        """
        wanted = torch.as_tensor(rows)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= self.n_rows):
            raise IndexError(f"{self.path}: rows {int(wanted.min())}..{int(wanted.max())} of {self.n_rows}")
        chunks, size = self._chunks[self._hook(hook)], self.provenance.rows_per_chunk
        out = torch.empty(len(wanted), self.d_model, dtype=TORCH_DTYPES[self.provenance.dtype])
        which = wanted // size
        for chunk in torch.unique(which).tolist():
            here = which == chunk
            out[here] = chunks[chunk][wanted[here] - chunk * size]
        return out

    def chunk_rows(self) -> Iterator[tuple[int, int]]:
        """Row ranges ``[start, stop)`` of the chunks, in order: the cheapest pieces to read."""
        for start in range(0, self.n_rows, self.provenance.rows_per_chunk):
            yield start, min(start + self.provenance.rows_per_chunk, self.n_rows)

    def chunks(
        self, generator: np.random.Generator, hook: str | None = None
    ) -> Iterator[tuple[int, Float[Tensor, "row d_model"]]]:
        """Every chunk once, in random order: its first row and its activations, the stored dtype.

        The cheapest way to see a store out of order, compressed ones above all: a chunk is read, checked and
        decoded once. Equal generators give equal orders.
        """
        for chunk in generator.permutation(-(-self.n_rows // self.provenance.rows_per_chunk)):
            start = int(chunk) * self.provenance.rows_per_chunk
            yield start, self.rows(start, min(start + self.provenance.rows_per_chunk, self.n_rows), hook)

    def windows(
        self,
        length: int,
        generator: np.random.Generator,
        hook: str | None = None,
        *,
        contexts: Int64Array | None = None,
    ) -> Iterator[tuple[int, Float[Tensor, "row d_model"]]]:
        """Random windows of ``length`` neighbouring rows, without end: first row and activations.

        Parameters
        ----------
        length
            rows, at least 1; a window lies in one context
        generator
            every window that there is comes with equal probability, again and again; equal generators
            give equal windows
        hook
            may be left out when the store has one
        contexts
            indices to draw from, such as ``store.contexts_in("train")``; None for all

        Yields
        ------
        int, Tensor [length, d_model]
            the window's first row in the store, and `rows` of it: a view unless a chunk ends in it

        Raises
        ------
        ConfigError
            at the first window, if no context is that long
        """
        which = np.arange(self.n_contexts) if contexts is None else contexts
        first = self.context_offsets[which]
        # a context of 5 rows has 3 windows of 3; the running total finds the context of the n-th window
        n_windows = np.maximum(self.context_offsets[which + 1] - first - length + 1, 0)
        total = np.cumsum(n_windows)
        if length < 1 or not total.size or total[-1] == 0:
            longest = int((self.context_offsets[which + 1] - first).max(initial=0))
            raise ConfigError(f"{self.path}: windows of {length} rows: contexts have 1 to {longest}")
        while True:
            number = int(generator.integers(total[-1]))
            context = int(np.searchsorted(total, number, side="right"))
            start = int(first[context] + number - (total[context] - n_windows[context]))
            yield start, self.rows(start, start + length, hook)

    def _hook(self, hook: str | None) -> str:
        if hook is None:
            if len(self.hooks) > 1:
                raise UnknownName(f"{self.path}: has several hooks, name one of {', '.join(self.hooks)}")
            return self.hooks[0]
        if hook not in self._chunks:
            raise UnknownName.among(f"hook of {self.path}", hook, self.hooks)
        return hook


class _HookChunks:
    """Chunk number to mapped rows, padding left off; a chunk is verified when it is first mapped."""

    def __init__(
        self, store: Path, hook: str, provenance: Provenance, n_rows: int, cached: CachedStore | None
    ) -> None:
        self._store = store
        self._cached = cached
        self._hook = hook
        self._made = provenance
        self._n_rows = n_rows
        self._mapped: OrderedDict[int, Tensor] = OrderedDict()
        n_chunks = -(-n_rows // provenance.rows_per_chunk)
        table, _ = map_raw(store / CHECKSUMS / hook / "c" / "0", 4 * n_chunks + CHECKSUM_BYTES)
        self._checksums = table.view("<u4")
        codec_of(provenance, hook)  # refuses an unknown one now
        decoded = provenance.rows_per_chunk * provenance.d_model * TORCH_DTYPES[provenance.dtype].itemsize
        self._most = MAX_MAPPED_CHUNKS if provenance.codec == "raw" else max(2, DECODED_BYTES // decoded)

    def __getitem__(self, chunk: int) -> Tensor:
        if chunk in self._mapped:
            self._mapped.move_to_end(chunk)
            return self._mapped[chunk]
        made = self._made
        path = chunk_path(self._store, self._hook, chunk)
        checksum = int(self._checksums[chunk])
        if self._cached is not None:
            self._cached.fetch(str(path.relative_to(self._store)))
        _refuse_link(self._store, path)
        try:
            rows = read_chunk(self._store, made, self._hook, chunk, checksum=checksum)
        except StoreCorrupt:
            if self._cached is None:
                raise
            # damaged on this machine, or just removed by another process that makes room
            self._cached.fetch(str(path.relative_to(self._store)), again=True)
            rows = read_chunk(self._store, made, self._hook, chunk, checksum=checksum)
        rows = rows[: self._n_rows - chunk * made.rows_per_chunk]
        self._mapped[chunk] = rows
        if len(self._mapped) > self._most:
            self._mapped.popitem(last=False)
        return rows


def read_layout(store: Path) -> Layout:
    """Tokens, offsets and documents of the store at ``store``, finished or not, checked against each other.

    Raises `StoreCorrupt` naming the array and what is wrong with it.
    """
    made = Provenance.from_dict(read_root(store), str(store / ROOT))
    tokens = _index(store, TOKENS, "<i4")
    document_offsets = _index(store, DOCUMENT_OFFSETS, "<i8")
    context_offsets = _index(store, CONTEXT_OFFSETS, "<i8")
    problem = offsets_problem(document_offsets, context_offsets, len(tokens))
    if problem:
        raise StoreCorrupt(f"{store}: {problem}; copy the store again")
    documents = _documents(store, len(document_offsets) - 1)
    for name, expected in array_metadata(
        made, Sizes(len(tokens), len(document_offsets) - 1, len(context_offsets) - 1)
    ).items():
        _check_metadata(store / name, expected)
    return Layout(tokens, document_offsets, context_offsets, documents)


def _index(store: Path, name: str, dtype: str) -> npt.NDArray[Any]:
    header = store / name / ROOT
    try:
        length = json.loads(header.read_bytes())["shape"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise StoreCorrupt(f"{header}: cannot be read ({error}); {MEND}") from error
    path = store / name / "c" / "0"
    _refuse_link(store, path)
    body, _ = map_raw(path, length * np.dtype(dtype).itemsize + CHECKSUM_BYTES)
    return body.view(dtype)


def _documents(store: Path, n_documents: int) -> pa.Table:
    path = store / DOCUMENTS_FILE
    _refuse_link(store, path)
    try:
        documents = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreCorrupt(f"{path}: cannot be read ({error}); copy the store again") from error
    lacking = [name for name in DOCUMENT_COLUMNS if name not in documents.column_names]
    if lacking or documents.num_rows != n_documents:
        raise StoreCorrupt(
            f"{path}: expected {n_documents} lines with {', '.join(DOCUMENT_COLUMNS)}, got "
            f"{documents.num_rows} with {', '.join(documents.column_names)}; copy the store again"
        )
    return documents


def _check_metadata(path: Path, expected: bytes) -> None:
    """Plain Zarr readers go by these files, so they must say what this reader assumes."""
    try:
        same = json.loads(path.read_bytes()) == json.loads(expected)
    except (OSError, ValueError) as error:
        raise StoreCorrupt(f"{path}: cannot be read ({error}); copy the store again") from error
    if not same:
        raise StoreCorrupt(f"{path}: does not fit the group's attributes; copy the store again")


def _refuse_link(store: Path, path: Path) -> None:
    """A shared store must not lead a reader to a file elsewhere."""
    inside = os.path.realpath(store)
    if os.path.realpath(path) != os.path.join(inside, path.relative_to(store)):  # noqa: PTH118
        raise StoreCorrupt(f"{path}: is a link out of its place; a store has plain files only")
