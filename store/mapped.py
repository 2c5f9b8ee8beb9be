"""Which chunks of a hook are in this process's memory: mapped where they are raw, decoded where not.

The kernel can take a map's pages back at any time, but until it does they count as the process's memory: for a
Dask worker's limit, for a batch system, and for whoever looks. So a process that reads a large store gives
its maps up from time to time, and maps again what it needs, which takes a hundredth of verifying it again.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.store.cache import CachedStore, gigabytes, touch
from tcsae.store.chunks import CHECKSUM_BYTES, chunk_path, codec_of, map_chunk, map_raw, read_chunk
from tcsae.store.errors import StoreCorrupt
from tcsae.store.index import refuse_link
from tcsae.store.spec import CHECKSUMS, TORCH_DTYPES, Provenance

MAX_MAPPED_CHUNKS = 4096
"""Chunks of a hook that stay mapped at once; Linux allows a process about 65,000 maps in all."""

RESIDENT_BYTES = 10**9
"""Resident bytes of a hook's maps at which all of them are given up, unless they are smaller together."""

RESIDENT_VARIABLE = "TCSAE_RESIDENT_GB"
"""environment variable for another limit than `RESIDENT_BYTES`, in gigabytes (10^9 bytes)"""

LOOK_BYTES = 2**24
"""Bytes that are read between two looks at how much is resident, which cost some ten microseconds each."""

TOUCHED_BYTES = 2**18
"""What reading a piece of a map makes resident beyond it, roughly: Linux maps 64 kB around both of its ends, and since
version 6.18 the whole of a large page of its cache, up to 2 MB. So it is counted only where nothing says better."""

DECODED_BYTES = 2**29
"""Decoded chunks of a hook that are kept, in bytes; two at least."""


def resident_limit() -> int:
    """Resident bytes at which a hook's maps are given up: ``$TCSAE_RESIDENT_GB``, or `RESIDENT_BYTES`."""
    return gigabytes(RESIDENT_VARIABLE, RESIDENT_BYTES)


class HookChunks:
    """Chunk number to its rows, padding left off; a chunk is verified when it is first asked for.

    Safe to use from several threads; what has been verified before is copied from its file by all of them at once.

    Parameters
    ----------
    store
        folder of the store, or of what is cached of it
    hook, provenance, n_rows
        of the store
    cached
        where chunks that are not in the folder are fetched from; None for a store on this machine

    Raises
    ------
    StoreCorrupt
        the table of checksums is missing or altered, or the codec unknown
    ConfigError
        ``$TCSAE_RESIDENT_GB`` is no number of gigabytes
    """

    def __init__(
        self, store: Path, hook: str, provenance: Provenance, n_rows: int, cached: CachedStore | None
    ) -> None:
        self._lock = threading.RLock()  # held by whoever maps, decodes, verifies or gives up
        self._store = store
        self._cached = cached
        self._hook = hook
        self._chunk_folders = str(chunk_path(store, hook, 0).parents[1])
        self._made = provenance
        self._n_rows = n_rows
        self._mapped: OrderedDict[int, Tensor] = OrderedDict()
        n_chunks = -(-n_rows // provenance.rows_per_chunk)
        checksums = store / CHECKSUMS / hook / "c" / "0"
        refuse_link(store, checksums)
        table, _ = map_raw(checksums, 4 * n_chunks + CHECKSUM_BYTES)
        self._checksums = table.view("<u4")
        codec_of(provenance, hook)  # refuses an unknown one now
        self._is_raw = provenance.codec == "raw"
        self._row_bytes = provenance.d_model * TORCH_DTYPES[provenance.dtype].itemsize
        self._chunk_bytes = provenance.rows_per_chunk * self._row_bytes
        self._most = MAX_MAPPED_CHUNKS if self._is_raw else max(2, DECODED_BYTES // self._chunk_bytes)
        self._verified = np.zeros((n_chunks, 2), dtype=np.int64)  # `_identity` of the file that was verified
        self._resident_limit = resident_limit()
        self._all_fit = n_chunks <= self._most
        self._is_bounded = self._is_raw and n_chunks * self._chunk_bytes > self._resident_limit
        self._read_bytes = 0  # since the maps were last given up
        self._looked_at = 0  # what `_read_bytes` was at the last look
        self._others = file_pages() or 0  # what the process has of files when nothing of ours is mapped

    def will_read(self, n_rows: int, n_pieces: int) -> None:
        """Hear that ``n_rows`` rows in ``n_pieces`` pieces are about to be read, and perhaps give maps up.

        A map that somebody has a view of lives on as long as the view.
        """
        if not self._is_bounded:
            return
        with self._lock:
            self._read_bytes += n_rows * self._row_bytes + n_pieces * TOUCHED_BYTES
            mapped = len(self._mapped) * self._chunk_bytes
            limit = self._resident_limit
            if mapped > limit and self._read_bytes - self._looked_at > LOOK_BYTES:
                self._looked_at = self._read_bytes
                if self._resident() > limit:
                    self._mapped.clear()
                    self._read_bytes = self._looked_at = 0
                    self._others = file_pages() or 0

    def _resident(self) -> int:
        """Bytes of our maps that are resident; what has been read of them where the system does not say."""
        now = file_pages()
        if now is None:
            return self._read_bytes
        self._others = min(self._others, now)
        return now - self._others

    def __getitem__(self, chunk: int) -> Float[Tensor, "row d_model"]:
        """Rows of chunk number ``chunk``; raises `StoreCorrupt`, or `RemoteError` if it cannot be fetched."""
        rows = self._mapped.get(chunk)
        if rows is not None and self._all_fit:  # none is ever given up for being the oldest
            return rows
        with self._lock:
            if chunk in self._mapped:
                self._mapped.move_to_end(chunk)
                return self._mapped[chunk]
            rows = self._map_again(chunk) if self._is_raw else None
            if rows is None:
                rows = self._read(chunk, chunk_path(self._store, self._hook, chunk))
            rows = rows[: self._n_rows - chunk * self._made.rows_per_chunk]
            self._mapped[chunk] = rows
            if len(self._mapped) > self._most:
                self._mapped.popitem(last=False)
            return rows

    def copy(self, chunk: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each piece from a byte of the chunk's rows on; raises what `__getitem__` does.

        Nothing of a raw chunk is mapped for it, but when the chunk is verified: a map costs a fault for every piece,
        its pages count as the process's memory, and the small objects of thousands of maps that come and go keep
        large memory that is freed between them from being used again.
        """
        if self._is_raw and self._copy_from_file(chunk, pieces):
            return
        path = chunk_path(self._store, self._hook, chunk)
        with self._lock:
            rows = self._read(chunk, path) if self._is_raw else self[chunk]
        content = rows.view(torch.uint8).numpy().reshape(-1).data
        for first, into in pieces:
            into[:] = content[first : first + len(into)]

    def _copy_from_file(self, chunk: int, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """Whether the file is the one that was verified and had every piece."""
        path = self._quick_path(chunk)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:  # which `_read` comes upon as well, and names
            return False
        try:
            if _identity(os.fstat(file)) != tuple(self._verified[chunk].tolist()):
                return False
            if self._cached is not None:
                touch(Path(path))
            return all(os.preadv(file, [into], first) == len(into) for first, into in pieces)
        finally:
            os.close(file)

    def _quick_path(self, chunk: int) -> str:
        """As text: random windows come upon hundreds of chunks, and a `Path` costs as much as the reading."""
        return f"{self._chunk_folders}/{chunk}/0"

    def _map_again(self, chunk: int) -> Tensor | None:
        """Rows of a raw chunk whose file is the one that was verified, padding included; None if it is not."""
        path = self._quick_path(chunk)
        if _identity_at(path) != tuple(self._verified[chunk].tolist()):
            return None
        try:
            rows = map_chunk(path, self._made)
        except StoreCorrupt:  # removed since, to make room: `_read` fetches it again, or says what is wrong
            return None
        if self._cached is not None:
            touch(Path(path))
        return rows

    def _read(self, chunk: int, path: Path) -> Tensor:
        made = self._made
        checksum = int(self._checksums[chunk])
        self.will_read(made.rows_per_chunk, 1)
        if self._cached is not None:
            self._cached.fetch(str(path.relative_to(self._store)))
        refuse_link(self._store, path)
        # looked up before the file is opened: one that is replaced in between is verified again next time
        identity = _identity_at(path)
        try:
            rows = read_chunk(self._store, made, self._hook, chunk, checksum=checksum)
        except StoreCorrupt:
            if self._cached is None:
                raise
            # damaged on this machine, or just removed by another process that makes room
            with self._cached.naming_the_url():
                self._cached.fetch(str(path.relative_to(self._store)), again=True)
                identity = _identity_at(path)
                rows = read_chunk(self._store, made, self._hook, chunk, checksum=checksum)
        self._verified[chunk] = identity
        return rows


def file_pages() -> int | None:
    """Bytes of mapped files that are resident in this process, libraries included; None where Linux does not say."""
    try:
        pages = Path("/proc/self/statm").read_bytes().split()[2]
    except OSError:
        return None
    return int(pages) * mmap.PAGESIZE


def _identity(found: os.stat_result) -> tuple[int, int]:
    """Inode and time of the last change, which tell a file from another under its name."""
    return found.st_ino, found.st_mtime_ns


def _identity_at(path: Path | str) -> tuple[int, int]:
    """`_identity` of the file at ``path``; (-1, -1) if there is none."""
    try:
        return _identity(os.stat(path))  # noqa: PTH116 -- making a `Path` takes longer
    except FileNotFoundError:
        return -1, -1
