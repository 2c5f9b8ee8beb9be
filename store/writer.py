"""Writing a store: the plan first, then whole chunks in any order, then the statistics.

A chunk is the unit of work. Every row's place is in the plan, so a chunk that is missing or damaged can be
computed again by anyone, and no two writers ever touch one file.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.store.atomic import put_in_place, remove_partials
from tcsae.store.chunks import (
    CHECKSUM_BYTES,
    chunk_bytes,
    chunk_path,
    codec_of,
    encoded,
    is_finite,
    map_raw,
    write_raw_beside,
)
from tcsae.store.codecs import Codec
from tcsae.store.completion import complete_store
from tcsae.store.errors import ActivationError, StoreCorrupt, StoreMismatch
from tcsae.store.index import read_layout
from tcsae.store.layout import Layout
from tcsae.store.metadata import FIRST_BATCH, ROOT, read_root
from tcsae.store.parallel import HERE, Pool
from tcsae.store.planning import locked, refuse_existing, write_plan
from tcsae.store.spec import CHECKSUMS, PLAIN, TORCH_DTYPES, Provenance
from tcsae.store.truth import Truth

UNSETTLED = 3
"""Chunks that may be on their way to the disk at once: it syncs several in hardly more time than one, since the file
system commits them together. A kill loses at most these and the one that is being made."""


class StoreWriter:
    """A store that is being written; one at a time, by `create` or `resume`.

    Their writer syncs chunks and puts them in their places in threads of its own, up to `UNSETTLED` at once, while
    the caller makes the next one. A writer made directly, as a worker's is, has done so when `write` returns.
    """

    def __init__(self, path: Path, layout: Layout, provenance: Provenance) -> None:
        self.path = path
        self.layout = layout
        self.provenance = provenance
        self.n_chunks = -(-layout.n_rows // provenance.rows_per_chunk)
        self._threads: ThreadPoolExecutor | None = None
        self._unsettled: dict[Path, Future[None]] = {}

    @classmethod
    @contextmanager
    def create(
        cls,
        path: Path,
        layout: Layout,
        provenance: Provenance,
        *,
        first_batch_sha256: str | None = None,
        truth: Truth | None = None,
    ) -> Iterator[StoreWriter]:
        """Write the plan of a new store and hold its lock for the block.

        ``first_batch_sha256`` is kept with it, for whoever resumes a harvest (`metadata.FIRST_BATCH`); ``truth``
        is the dictionary behind a store whose provenance says that it has one.

        Raises
        ------
        StoreExists
            ``path`` holds a store, or anything else
        StoreBusy
            another process is writing there
        """
        refuse_existing(path)
        with locked(path):
            refuse_existing(path)  # another writer may have come and gone before the lock was taken
            writer = cls(path, layout, provenance)
            planned = {} if first_batch_sha256 is None else {FIRST_BATCH: first_batch_sha256}
            write_plan(path, layout, provenance, planned, truth)
            with writer._settling_behind():
                yield writer

    @classmethod
    @contextmanager
    def resume(cls, path: Path, provenance: Provenance) -> Iterator[StoreWriter]:
        """Go on with an unfinished store, or check a finished one, and hold its lock for the block.

        Raises
        ------
        StoreNotFound
            there is no planned store at ``path``
        StoreMismatch
            it was begun with other settings; every one that differs is named
        StoreBusy
            another process is writing there
        """
        begun = Provenance.from_dict(read_root(path), str(path / ROOT))
        refuse_other_settings(path, begun, provenance)
        with locked(path):
            remove_partials(path)
            writer = cls(path, read_layout(path), begun)
            with writer._settling_behind():
                yield writer

    @property
    def complete(self) -> bool:
        """whether `finish` has run"""
        return bool(read_root(self.path).get("complete"))

    @property
    def is_finished(self) -> bool:
        """whether `finish` has run and what it has written of checksums is whole still"""
        return self.complete and all(self._checksums(hook) is not None for hook in self.provenance.hooks)

    def rows_of(self, chunk: int) -> tuple[int, int]:
        """Rows ``[start, stop)`` that chunk number ``chunk`` holds; the last chunk is shorter."""
        start = chunk * self.provenance.rows_per_chunk
        return start, min(start + self.provenance.rows_per_chunk, self.layout.n_rows)

    def missing(self) -> list[int]:
        """Chunks that some hook lacks or whose file fails its checksum, in order; reads every chunk once.

        Once the store is complete, a file is also compared with the hook's table of checksums, which tells a
        chunk that lies in another's place. Raises `DiskFull` as `wait` does.
        """
        self.wait()
        tables = {hook: self._checksums(hook) for hook in self.provenance.hooks}
        return [
            chunk
            for chunk in range(self.n_chunks)
            if not all(
                self._is_good(hook, chunk, None if table is None else int(table[chunk]))
                for hook, table in tables.items()
            )
        ]

    def write(self, hook: str, chunk: int, rows: Float[Tensor, "row d_model"]) -> None:
        """Check ``rows``, cast them to the store's dtype and write them as one chunk file.

        ``rows`` may be changed afterwards. The chunk is there, whole, when `wait` or the next `UNSETTLED` calls of
        `write` have returned; if it cannot be, one of them raises. Nothing is held in memory meanwhile but what the
        kernel holds of the files.

        Raises
        ------
        ActivationError
            a value is NaN or Inf, or overflows the dtype; nothing is written
        DiskFull
            for this chunk or one before it, as the message says; nothing of it is left behind
        """
        start, stop = self.rows_of(chunk)
        if rows.shape != (stop - start, self.provenance.d_model):
            raise ValueError(
                f"{hook}, chunk {chunk}: expected {(stop - start, self.provenance.d_model)} rows"
            )
        stored = rows.detach().to("cpu", TORCH_DTYPES[self.provenance.dtype])
        if not is_finite(stored):
            self._refuse(hook, start, rows, stored)
        path = chunk_path(self.path, hook, chunk)
        if path in self._unsettled:
            self.wait()  # both would be written beside it under one name
        write_raw_beside(path, encoded(stored, self.provenance.rows_per_chunk, self._codec(hook)))
        if self._threads is None:
            _settle(path)
            return
        self._unsettled[path] = self._threads.submit(_settle, path)
        if len(self._unsettled) > UNSETTLED:
            self._unsettled.pop(next(iter(self._unsettled))).result()

    def wait(self) -> None:
        """Return when every chunk that was written is in its place; raises `DiskFull` if one cannot be."""
        before, self._unsettled = self._unsettled, {}
        futures.wait(before.values())
        for settled in before.values():
            settled.result()

    def finish(self, pool: Pool = HERE) -> None:
        """Compute checksums and statistics of every hook and mark the store as complete.

        Every chunk is read twice, by the workers of ``pool``, which must see the store under the same name; the
        bytes are the same whoever reads. Raises `StoreCorrupt` if a chunk is still missing, `DiskFull` as `wait` does.
        """
        self.wait()
        lost = self.complete and not self.is_finished
        complete_store(self.path, self.layout, self.provenance, pool, keeps_id=lost)

    @contextmanager
    def _settling_behind(self) -> Iterator[None]:
        with ThreadPoolExecutor(UNSETTLED, "tcsae-sync") as self._threads:  # left only when they have ended
            yield
            self.wait()

    def _checksums(self, hook: str) -> npt.NDArray[np.uint32] | None:
        """The table of a finished store; None if it has none that is whole, as an unfinished one."""
        if not self.complete:
            return None
        try:
            table, _ = map_raw(self.path / CHECKSUMS / hook / "c" / "0", 4 * self.n_chunks + CHECKSUM_BYTES)
        except StoreCorrupt:
            return None
        return table.view("<u4")

    def _is_good(self, hook: str, chunk: int, checksum: int | None) -> bool:
        try:
            self._verified(chunk_path(self.path, hook, chunk), checksum)
        except StoreCorrupt:
            return False
        return True

    def _verified(self, path: Path, checksum: int | None = None) -> int:
        made = self.provenance
        size = chunk_bytes(made.rows_per_chunk, made.d_model, made.dtype) if made.codec == "raw" else None
        return map_raw(path, size, checksum=checksum)[1]

    def _codec(self, hook: str) -> Codec | None:
        return None if self.provenance.codec == "raw" else codec_of(self.provenance, hook)

    def _refuse(
        self, hook: str, start: int, rows: Float[Tensor, "row d_model"], stored: Float[Tensor, "row d_model"]
    ) -> None:
        row = int((~torch.isfinite(stored)).any(dim=1).nonzero()[0])
        document = int(np.searchsorted(self.layout.document_offsets, start + row, side="right")) - 1
        name = self.layout.documents["id"][document].as_py()
        position = start + row - int(self.layout.document_offsets[document])
        value = rows[row][~torch.isfinite(stored[row])][0].item()
        overflow = np.isfinite(value)
        reason = f"{value:.6g} overflows {self.provenance.dtype}" if overflow else f"the model gave {value}"
        advice = (
            "harvest with --dtype bfloat16 or float32" if overflow else "check the model and its precision"
        )
        raise ActivationError(
            f"{self.path}: hook {hook}, document {name!r}, token {position} (row {start + row}): {reason}; "
            f"{advice}"
        )


def _settle(path: Path) -> None:
    # the folder is synced when the store is finished: a chunk whose rename was lost is one to compute again
    put_in_place(path, sync_folder=False)


def differences(begun: Provenance, asked: Provenance) -> list[str]:
    """Settings that differ between two provenances, each as "field: begun with ..., now ..."."""
    old, new = PLAIN | begun.to_dict(), PLAIN | asked.to_dict()
    return [
        f"{name}: begun with {old[name]!r}, now {new[name]!r}"
        for name in {**old, **new}
        if name != "created" and old[name] != new[name]
    ]


def refuse_other_settings(path: Path, begun: Provenance, asked: Provenance) -> None:
    """Raise `StoreMismatch`, which names all that differs, unless ``path`` was begun with what is ``asked`` for now."""
    if differing := differences(begun, asked):
        raise StoreMismatch(
            f"{path}: begun with other settings: {'; '.join(differing)}; resume with the first ones or "
            "choose another path"
        )
