"""Reading a store: zero-copy views of memory-mapped chunk files.

``ActivationStore`` is safe to use from several processes and threads at once and to send to another process (it
reopens there).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tcsae.store.cache import CachedStore
from tcsae.store.errors import ConfigError, StoreCorrupt, StoreIncomplete, UnknownName
from tcsae.store.index import map_index, read_layout
from tcsae.store.mapped import HookChunks
from tcsae.store.metadata import ROOT, read_root
from tcsae.store.remote import is_url, local_path
from tcsae.store.spec import (
    TOKENS,
    TORCH_DTYPES,
    HookStatistics,
    Provenance,
    Split,
)
from tcsae.store.truth import Truth, read_truth

Int64Array = npt.NDArray[np.int64]

FEW_BYTES = 2**24
"""Size up to which an index array may stay resident, as reading it from a map that stays makes it."""


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
        layout = read_layout(path)
        self._statistics = {
            hook: HookStatistics.from_attributes(attributes, hook, self.d_model, where) for hook in self.hooks
        }
        self.tokens = layout.tokens
        self.document_offsets = layout.document_offsets
        self.context_offsets = layout.context_offsets
        self.documents: pa.Table = layout.documents
        self.document_of_context: Int64Array = (
            np.searchsorted(self.document_offsets, self.context_offsets[:-1], side="right") - 1
        )
        self._chunks = {
            hook: HookChunks(path, hook, self.provenance, self.n_rows, cached) for hook in self.hooks
        }

    @classmethod
    def open(cls, path: str | Path) -> ActivationStore:
        """Open the finished store at ``path``, a folder or a URL that fsspec knows.

        Reads the index arrays and the documents' table; activations are mapped when they are first asked for,
        and each chunk's CRC-32C is checked then. Of a store at a URL, whole chunks are fetched when they are
        first asked for and kept on this machine (`tcsae.store.cache`: ``$TCSAE_CACHE``, 50 GB or
        ``$TCSAE_CACHE_GB``).

        Of a hook that is larger than 1 GB, maps are given up when so much of them is resident, and faulted in anew:
        reading takes no more memory from a store of 10 GB than from one of 1 GB, but more time.
        ``$TCSAE_RESIDENT_GB`` sets another bound.

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
        ConfigError
            one of these variables is no number of gigabytes
        """
        if not is_url(path):
            return cls._open(local_path(path), None)
        cached = CachedStore(str(path))
        with cached.naming_the_url():
            try:
                return cls._open(cached.path, cached)
            except StoreCorrupt:
                cached.fetch_tables(again=True)  # what was damaged may be the copy on this machine
                return cls._open(cached.path, cached)

    @classmethod
    def _open(cls, path: Path, cached: CachedStore | None) -> ActivationStore:
        attributes = read_root(path)
        if not attributes.get("complete"):
            raise StoreIncomplete(
                f"{path}: the harvest has not finished; run the same `tcsae harvest` with --resume, or the same "
                "`tcsae store copy` if it is a copy"
            )
        lacking = [name for name in ("id", "statistics") if name not in attributes]
        if lacking:
            raise StoreCorrupt(f"{path / ROOT}: attributes lack {', '.join(lacking)}; copy the store again")
        if not isinstance(attributes["id"], str):
            raise StoreCorrupt(f"{path / ROOT}: id: expected 16 hex digits; copy the store again")
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

    def truth(self) -> Truth | None:
        """The dictionary that the activations were made from, where no model made them; None for a model's.

        Raises `StoreCorrupt` if its files are missing or altered.
        """
        return read_truth(self.path, self.provenance)

    def documents_in(self, split: Split | Literal["all"]) -> Int64Array:
        """Indices of the documents of ``split``, in order, int64; raises `ConfigError` for another word."""
        if split == "all":
            return np.arange(self.n_documents)
        if split not in get_args(Split):
            raise ConfigError(f"split: expected one of {', '.join(get_args(Split))} or all, got {split!r}")
        return np.flatnonzero(np.array(self.documents["split"].to_pylist()) == split)

    def contexts_in(self, split: Split | Literal["all"]) -> Int64Array:
        """Indices of the contexts whose document is in ``split``, in order, int64."""
        return np.flatnonzero(np.isin(self.document_of_context, self.documents_in(split)))

    def rows(self, start: int, stop: int, hook: str | None = None) -> Float[Tensor, "row d_model"]:
        """Activations of rows ``[start, stop)`` in the stored dtype.

        A view of the memory map when the rows lie in one chunk, a copy when they do not. Writing to a view
        changes neither the file nor what another call returns from another process. Compressed chunks are
        decoded whole, and the last ones are kept (`mapped.DECODED_BYTES`): read them chunk by chunk.

        Raises
        ------
        IndexError
            the range leaves the store
        StoreCorrupt
            a chunk is missing, truncated or altered
        """
        if not 0 <= start <= stop <= self.n_rows:
            raise IndexError(f"{self.url}: rows [{start}, {stop}) of {self.n_rows}")
        chunks, size = self._chunks[self._hook(hook)], self.provenance.rows_per_chunk
        chunks.will_read(stop - start, 1)
        first = start // size
        if stop <= (first + 1) * size:
            return chunks[first][start - first * size : stop - first * size]
        parts = range(first, -(-stop // size))
        return torch.cat([chunks[c][max(start - c * size, 0) : min(stop - c * size, size)] for c in parts])

    def document(self, index: int, hook: str | None = None) -> Float[Tensor, "row d_model"]:
        """Activations of document ``index``, all its contexts one after the other (see `rows`).

        Raises IndexError unless 0 ≤ ``index`` < `n_documents`.
        """
        if not 0 <= index < self.n_documents:
            raise IndexError(f"{self.url}: document {index} of {self.n_documents}")
        return self.rows(int(self.document_offsets[index]), int(self.document_offsets[index + 1]), hook)

    def gather(
        self, rows: Int64Array | Int64[Tensor, " row"], hook: str | None = None, out: Tensor | None = None
    ) -> Float[Tensor, "row d_model"]:
        """Copy of the activations of ``rows``, in the order given, in the stored dtype; into ``out`` where given.

        Every run of neighbouring rows is a piece, read from its file and not mapped, so that training on a store of
        any size maps none of it; long runs from few chunks cost least. Fresh memory for every call costs more than
        the copy does, so who reads again and again hands in his own.

        Raises
        ------
        IndexError
            a row is not in the store
        TypeError
            ``rows`` are no whole numbers, such as a mask
        ValueError
            ``out`` has another shape or dtype, or its rows do not lie one after the other
        """
        wanted = np.asarray(rows)
        if len(wanted) and wanted.dtype.kind not in "iu":
            raise TypeError(
                f"rows: expected their numbers, got {wanted.dtype}; of a mask take np.flatnonzero"
            )
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.n_rows):
            raise IndexError(f"{self.url}: rows {wanted.min()}..{wanted.max()} of {self.n_rows}")
        chunks, size = self._chunks[self._hook(hook)], self.provenance.rows_per_chunk
        shape, dtype = (len(wanted), self.d_model), TORCH_DTYPES[self.provenance.dtype]
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        if out.shape != shape or out.dtype != dtype or not out.is_contiguous():
            raise ValueError(
                f"out: expected {shape} of {dtype}, contiguous; got {tuple(out.shape)} of {out.dtype}, "
                f"strides {out.stride()}"
            )
        # With 10 rows a chunk, rows 7 8 9 10 3 are the runs 7 8 9, 10 and 3.
        begin = np.flatnonzero((np.diff(wanted, prepend=-2) != 1) | (wanted % size == 0))
        end = np.append(begin, len(wanted))[1:]
        chunk_of, first = np.divmod(wanted[begin], size)
        order = np.argsort(chunk_of, kind="stable")
        row_bytes = self.d_model * out.itemsize
        into = out.view(torch.uint8).numpy().reshape(-1).data  # a memoryview, whose slices cost least
        runs = zip(
            chunk_of[order].tolist(),
            (first[order] * row_bytes).tolist(),
            (begin[order] * row_bytes).tolist(),
            (end[order] * row_bytes).tolist(),
            strict=True,
        )
        for chunk, of_chunk in itertools.groupby(runs, key=operator.itemgetter(0)):
            chunks.copy(chunk, [(at, into[a:b]) for _, at, a, b in of_chunk])
        return out

    def tokens_at(self, rows: Int64Array) -> npt.NDArray[np.int32]:
        """Copy of the token ids of ``rows``, as ``tokens[rows]`` is.

        Where `tokens` is large, through a map that is given up again: what is read of `tokens` counts as the process's
        memory ever after, in the end 4 bytes for each row of the store.
        """
        if self.tokens.nbytes <= FEW_BYTES:
            return self.tokens[rows]
        ids: npt.NDArray[np.int32] = map_index(self.path, TOKENS, self.n_rows)[rows]
        return ids

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
            raise ConfigError(f"{self.url}: windows of {length} rows: contexts have 1 to {longest}")
        while True:
            number = int(generator.integers(total[-1]))
            context = int(np.searchsorted(total, number, side="right"))
            start = int(first[context] + number - (total[context] - n_windows[context]))
            yield start, self.rows(start, start + length, hook)

    def _hook(self, hook: str | None) -> str:
        if hook is None:
            if len(self.hooks) > 1:
                raise UnknownName(f"{self.url}: has several hooks, name one of {', '.join(self.hooks)}")
            return self.hooks[0]
        if hook not in self._chunks:
            raise UnknownName.among(f"hook of {self.url}", hook, self.hooks)
        return hook
