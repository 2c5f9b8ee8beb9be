"""Copying a store between a folder and any URL: as it is, a part of it, or compressed.

What changes nothing is copied file by file, so the copy has the same bytes and the same id. A part, or another
codec, is a new store: it is written to a folder like any other (on the way to a URL: to a staging folder in the
cache, which needs as much free space as the result), with its own statistics and id, and then copied.

Either way the root group, which says that the store is complete, is written last, after every other file was
read back from the far end and compared. What a call that was stopped has copied is kept and checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import google_crc32c
import numpy as np
import torch

from tcsae.store.atomic import PARTIAL, exclusive, remove_partials, write_atomically
from tcsae.store.cache import cache_folder, table_files
from tcsae.store.chunks import CHECKSUM_BYTES, chunk_path, codec_of
from tcsae.store.codecs import CodecName, fit, measured_ratio, relative_error
from tcsae.store.errors import (
    ConfigError,
    RemoteError,
    StoreBusy,
    StoreCorrupt,
    StoreExists,
    StoreIncomplete,
    StoreMismatch,
    StoreNotFound,
    UnknownName,
)
from tcsae.store.metadata import ROOT, read_root
from tcsae.store.progress import progress
from tcsae.store.reader import ActivationStore
from tcsae.store.remote import RemoteFolder, Transfer, is_url, local_path
from tcsae.store.spec import CHECKSUMS, Layout, Provenance
from tcsae.store.writer import LOCK, StoreWriter

SAMPLE_ROWS = 32_768
"""rows that a codec is fitted to and measured on, from pieces spread over the store"""

SAMPLE_PIECES = 16

THREADS = 4
"""files on their way at once; each is in memory whole, twice while it is compared"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """What a copy did."""

    source: str
    """where from"""
    destination: str
    """where to"""
    id: str
    """of the copy: the source's unless it is a part or has another codec"""
    rows: int
    """rows of the copy"""
    documents: int
    """documents of the copy"""
    hooks: tuple[str, ...]
    """hooks of the copy"""
    codec: str
    """codec of the copy"""
    files: int
    """files of the copy"""
    kept: int
    """of these, files that an earlier call had copied"""
    bytes: int
    """bytes of the copy"""
    ratio: dict[str, float]
    """bytes of the raw rows over bytes of the codec, by hook, on a sample; empty if nothing was recoded"""
    relative_error: dict[str, float]
    """squared error of decoded rows over their variance, by hook, on a sample; empty likewise"""


def copy_store(
    src: str | Path,
    dst: str | Path,
    *,
    hooks: tuple[str, ...] | None = None,
    documents: tuple[int, int] | None = None,
    rows: tuple[int, int] | None = None,
    codec: str | None = None,
    resume: bool = False,
    transfer: Transfer | None = None,
) -> Copied:
    """Copy the finished store at ``src`` to ``dst``, verified at the far end.

    Parameters
    ----------
    src, dst
        folders or URLs that fsspec knows; ``http(s)://`` can only be read
    hooks
        names of the hooks to copy; None for all
    documents
        [start, stop) of the documents to copy; None for all
    rows
        instead, rows [start, stop): widened to whole documents
    codec
        ``raw``, ``lossless``, ``int8`` or ``uniform``; None keeps the source's. Its measured size and error are
        logged before anything is written.
    resume
        go on with a copy that was stopped. What is there and whole is kept.
    transfer
        patience with the network

    Raises
    ------
    StoreNotFound, StoreIncomplete, StoreCorrupt
        at the source
    ConfigError, UnknownName
        a selection that is empty or not in the store, a codec that is unknown
    StoreExists
        there is something at ``dst``, and ``resume`` is not set
    StoreMismatch
        what was begun at ``dst`` is another copy
    StoreBusy
        another process is writing to ``dst``
    RemoteError
        the network, after its retries; the copy can be resumed
    """
    if codec is not None and codec not in get_args(CodecName):
        raise UnknownName.among("codec", codec, get_args(CodecName))
    if _same_place(src, dst):
        raise ConfigError(f"{dst}: is the source itself; choose another destination")
    source = _open_files(src, transfer)
    target = _open_files(dst, transfer)
    if isinstance(target, _Remote) and target.folder.is_read_only:
        raise ConfigError(f"{dst}: http cannot be written to; choose another destination")
    root, made = _finished(source, src)
    wanted = _selection(made, hooks, documents, rows)
    if wanted is None and codec in (None, made.codec):
        return _copy_files(source, target, root, made, src, dst, resume=resume)
    return _copy_changed(src, dst, target, wanted, codec or made.codec, transfer, resume=resume)


# Files at either end


@dataclass(frozen=True, slots=True)
class _Local:
    path: Path

    def read(self, name: str, expected_bytes: int = 0) -> bytes:  # noqa: ARG002  # as of RemoteFolder
        path = self.path / name
        if path.resolve() != self.path.resolve() / name:
            raise StoreCorrupt(f"{path}: is a link out of its place; a store has plain files only")
        return path.read_bytes()

    def write(self, name: str, content: bytes) -> None:
        write_atomically(self.path / name, content)

    def is_free(self) -> bool:
        return all(p.name == LOCK or p.suffix == PARTIAL for p in self.path.iterdir())


@dataclass(frozen=True, slots=True)
class _Remote:
    folder: RemoteFolder

    def read(self, name: str, expected_bytes: int = 0) -> bytes:
        return self.folder.read(name, expected_bytes)

    def write(self, name: str, content: bytes) -> None:
        self.folder.write(name, content)

    def is_free(self) -> bool:
        return not self.folder.exists()


_Files = _Local | _Remote


def _open_files(place: str | Path, transfer: Transfer | None) -> _Files:
    return _Remote(RemoteFolder(str(place), transfer)) if is_url(place) else _Local(local_path(place))


def _same_place(one: str | Path, other: str | Path) -> bool:
    if is_url(one) or is_url(other):
        return str(one).rstrip("/") == str(other).rstrip("/")
    return local_path(one).resolve() == local_path(other).resolve()


def _finished(source: _Files, src: str | Path) -> tuple[bytes, Provenance]:
    if isinstance(source, _Local):
        read_root(source.path)  # says what is wrong better than the lines below
    try:
        root = source.read(ROOT)
        attributes = json.loads(root)["attributes"]
    except FileNotFoundError:
        raise StoreNotFound(f"{src}: not an activation store (nothing there); check the address") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"{src}/{ROOT}: not a Zarr v3 group ({error}); copy the store again") from error
    if not attributes.get("complete"):
        raise StoreIncomplete(f"{src}: not finished; run the `tcsae harvest` or `store copy` with --resume")
    return root, Provenance.from_dict(attributes, f"{src}/{ROOT}")


# As it is


def _copy_files(
    source: _Files,
    target: _Files,
    root: bytes,
    made: Provenance,
    src: str | Path,
    dst: str | Path,
    *,
    resume: bool,
) -> Copied:
    attributes = json.loads(root)["attributes"]
    tables = {hook: _checksums(source, hook, src) for hook in made.hooks}
    names = list(table_files(made))
    expected = {
        str(chunk_path(Path(), hook, chunk)): checksum
        for hook, table in tables.items()
        for chunk, checksum in enumerate(table)
    }
    guess = made.rows_per_chunk * made.d_model * 4

    def copy(name: str) -> tuple[int, bool]:
        checksum = expected.get(name)
        if resume and checksum is not None:
            found = _whole(target, name, checksum, guess)
            if found is not None:
                return found, True
        content = _fetched(source, name, guess if checksum is not None else 0, src)
        if checksum is not None and _checksum_problem(content, checksum):
            raise StoreCorrupt(f"{src}/{name}: {_checksum_problem(content, checksum)}; verify the source")
        target.write(name, content)
        if target.read(name, len(content)) != content:
            raise RemoteError(f"{dst}/{name}: differs from what was written there; run again with --resume")
        return len(content), False

    with _held(target, dst):
        _begin(target, root, dst, resume=resume)
        done = list(_in_threads(copy, [*names, *expected], f"copy to {dst}"))
        target.write(ROOT, root)
        if target.read(ROOT, len(root)) != root:
            raise RemoteError(f"{dst}/{ROOT}: differs from what was written there; run again with --resume")
    layout = np.frombuffer(target.read("document_offsets/c/0")[:-CHECKSUM_BYTES], "<i8")
    return Copied(
        source=str(src),
        destination=str(dst),
        id=attributes["id"],
        rows=int(layout[-1]),
        documents=len(layout) - 1,
        hooks=made.hooks,
        codec=made.codec,
        files=len(done) + 1,
        kept=sum(kept for _, kept in done),
        bytes=sum(size for size, _ in done) + len(root),
        ratio={},
        relative_error={},
    )


def _begin(target: _Files, root: bytes, dst: str | Path, *, resume: bool) -> None:
    """Write the root group of an unfinished copy, or see that the one there is of this copy."""
    unfinished = json.loads(root)
    unfinished["attributes"]["complete"] = False
    try:
        there = json.loads(target.read(ROOT))
        attributes = there["attributes"]
    except FileNotFoundError:
        if not target.is_free():
            raise StoreExists(f"{dst}: exists and is not a store; choose another place") from None
    except (ValueError, KeyError, TypeError):
        raise StoreExists(f"{dst}: exists and is not a store; choose another place") from None
    else:
        if not resume:
            state = "a finished store" if attributes.get("complete") else "an unfinished store: add --resume"
            raise StoreExists(f"{dst}: already holds {state}; choose another place or delete it")
        if attributes.get("id") != unfinished["attributes"]["id"]:
            raise StoreMismatch(
                f"{dst}: id: begun as a copy of {attributes.get('id')}, the source is "
                f"{unfinished['attributes']['id']}; choose another place or delete it"
            )
    if isinstance(target, _Local):
        remove_partials(target.path)
    target.write(ROOT, json.dumps(unfinished, indent=2).encode())


def _checksums(source: _Files, hook: str, src: str | Path) -> list[int]:
    name = f"{CHECKSUMS}/{hook}/c/0"
    content = _fetched(source, name, 0, src)
    if problem := _checksum_problem(content):
        raise StoreCorrupt(f"{src}/{name}: {problem}; verify the source")
    return [int(checksum) for checksum in np.frombuffer(content[:-CHECKSUM_BYTES], "<u4")]


def _fetched(source: _Files, name: str, expected_bytes: int, src: str | Path) -> bytes:
    try:
        return source.read(name, expected_bytes)
    except FileNotFoundError:
        raise StoreCorrupt(f"{src}/{name}: missing; verify the source") from None


def _whole(target: _Files, name: str, checksum: int, expected_bytes: int) -> int | None:
    """Size of the file at the far end if it is the one that is to be there."""
    try:
        content = target.read(name, expected_bytes)
    except FileNotFoundError:
        return None
    return None if _checksum_problem(content, checksum) else len(content)


def _checksum_problem(content: bytes, expected: int | None = None) -> str | None:
    stored = int.from_bytes(content[-CHECKSUM_BYTES:], "little")
    computed = int(google_crc32c.value(np.frombuffer(content, np.uint8)[:-CHECKSUM_BYTES]))
    if computed != stored:
        return f"CRC-32C {stored:08x} stored, {computed:08x} computed"
    if expected is not None and computed != expected:
        return f"CRC-32C {expected:08x} expected, {computed:08x} found: another chunk's file"
    return None


def _in_threads(
    work: Callable[[str], tuple[int, bool]], names: Iterable[str], title: str
) -> Iterator[tuple[int, bool]]:
    """Results as they come; at the first error the files that have not begun are left."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool, progress(len(names), "file", title) as bar:
        futures = [pool.submit(work, name) for name in names]
        try:
            for future in futures:
                yield future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _held(target: _Files, dst: str | Path) -> AbstractContextManager[None]:
    """The writer's lock of a folder; object storage has none, but its files are whole or absent."""
    if isinstance(target, _Remote):
        return nullcontext()
    busy = StoreBusy(f"{dst}: another process is writing to this store; wait for it or stop it")
    if target.path.exists() and not target.path.is_dir():
        raise StoreExists(f"{dst}: exists and is not a store; choose another place")
    return exclusive(target.path / LOCK, busy)


# A part, or another codec


@dataclass(frozen=True, slots=True)
class _Part:
    hooks: tuple[str, ...]
    documents: tuple[int, int] | None
    rows: tuple[int, int] | None


def _selection(
    made: Provenance,
    hooks: tuple[str, ...] | None,
    documents: tuple[int, int] | None,
    rows: tuple[int, int] | None,
) -> _Part | None:
    if documents is not None and rows is not None:
        raise ConfigError("documents, rows: give one of them")
    for hook in hooks or ():
        if hook not in made.hooks:
            raise UnknownName.among("hook of the source", hook, made.hooks)
    if hooks == ():
        raise ConfigError("hooks: expected at least one")
    kept = made.hooks if hooks is None else tuple(hook for hook in made.hooks if hook in hooks)
    if kept == made.hooks and documents is None and rows is None:
        return None
    return _Part(kept, documents, rows)


def _document_range(store: ActivationStore, part: _Part | None) -> tuple[int, int]:
    start, stop = 0, store.n_documents
    if part is not None and part.documents is not None:
        start, stop = part.documents
        if not 0 <= start < stop <= store.n_documents:
            raise ConfigError(
                f"documents: expected a range inside 0:{store.n_documents}, not empty, got {start}:{stop}"
            )
    if part is not None and part.rows is not None:
        first, last = part.rows
        if not 0 <= first < last <= store.n_rows:
            raise ConfigError(
                f"rows: expected a range inside 0:{store.n_rows}, not empty, got {first}:{last}"
            )
        start = int(np.searchsorted(store.document_offsets, first, side="right")) - 1
        stop = int(np.searchsorted(store.document_offsets, last, side="left"))
    return start, stop


def _copy_changed(
    src: str | Path,
    dst: str | Path,
    target: _Files,
    part: _Part | None,
    codec: str,
    transfer: Transfer | None,
    *,
    resume: bool,
) -> Copied:
    store = ActivationStore.open(src)
    first, last = _document_range(store, part)
    begin = int(store.document_offsets[first])
    layout = _layout_of(store, first, last)
    hooks = store.hooks if part is None else part.hooks
    made = _provenance_of(store, hooks, codec, (first, last))
    if isinstance(target, _Local):
        _write_part(store, begin, layout, made, target.path, resume=resume)
        size = sum(p.stat().st_size for p in target.path.rglob("*") if p.is_file())
        n_files = sum(p.is_file() for p in target.path.rglob("*"))
        identity, kept = read_root(target.path)["id"], 0
    else:
        name = hashlib.sha256(f"{store.url} {store.id} {made.to_dict()} {dst}".encode()).hexdigest()[:24]
        staging = cache_folder() / "staging" / name
        if not (staging / ROOT).exists() or not read_root(staging).get("complete"):
            _write_part(store, begin, layout, made, staging, resume=(staging / ROOT).exists())
        copied = copy_store(staging, dst, resume=resume, transfer=transfer)
        shutil.rmtree(staging)
        size, n_files, identity, kept = copied.bytes, copied.files, copied.id, copied.kept
    return Copied(
        source=str(src),
        destination=str(dst),
        id=identity,
        rows=layout.n_rows,
        documents=layout.n_documents,
        hooks=made.hooks,
        codec=made.codec,
        files=n_files,
        kept=kept,
        bytes=size,
        ratio={hook: found["ratio"] for hook, found in made.codec_effect.items()},
        relative_error={hook: found["relative_error"] for hook, found in made.codec_effect.items()},
    )


def _layout_of(store: ActivationStore, first: int, last: int) -> Layout:
    begin, end = (int(store.document_offsets[i]) for i in (first, last))
    contexts = store.context_offsets
    inside = contexts[(contexts >= begin) & (contexts <= end)]
    return Layout(
        np.ascontiguousarray(store.tokens[begin:end]),
        store.document_offsets[first : last + 1] - begin,
        inside - begin,
        store.documents.slice(first, last - first),
    )


def _provenance_of(
    store: ActivationStore, hooks: tuple[str, ...], codec: str, documents: tuple[int, int]
) -> Provenance:
    """Settings of the copy; a codec is fitted to a sample and its size and error on it are logged."""
    old = store.provenance
    fitted = {}
    effect = {}
    for hook in hooks:
        if codec == "raw":
            continue
        if codec == old.codec:  # rows that were decoded are encoded again as what they came from
            fitted[hook] = old.codec_configuration.get(hook, {})
            effect[hook] = old.codec_effect.get(hook, {})
            continue
        sample = _sample(store, hook)
        fitted[hook] = fit(codec, sample, old.dtype)
        trial = dataclasses.replace(old, codec=codec, codec_configuration=fitted)
        used = codec_of(trial, hook)
        effect[hook] = {
            "ratio": round(measured_ratio(used, sample), 4),
            "relative_error": relative_error(used, sample),
        }
        log.info(
            "%s as %s: %.2f x smaller than the raw rows, squared error %.2g of the variance (on %d rows)",
            hook,
            codec,
            effect[hook]["ratio"],
            effect[hook]["relative_error"],
            len(sample),
        )
    origin = {"id": store.id, "documents": list(documents)}
    return dataclasses.replace(
        old,
        hooks=hooks,
        codec=codec,
        codec_configuration={hook: found for hook, found in fitted.items() if found},
        codec_effect=effect,
        derived_from=origin,
    )


def _sample(store: ActivationStore, hook: str) -> torch.Tensor:
    """Rows from pieces spread evenly over the store: few chunks are touched, so a remote one is not fetched whole."""
    if store.n_rows <= SAMPLE_ROWS:
        return store.rows(0, store.n_rows, hook).clone()
    length = SAMPLE_ROWS // SAMPLE_PIECES
    starts = np.linspace(0, store.n_rows - length, SAMPLE_PIECES).astype(int)
    return torch.cat([store.rows(int(start), int(start) + length, hook) for start in starts])


def _write_part(
    store: ActivationStore, begin: int, layout: Layout, made: Provenance, path: Path, *, resume: bool
) -> None:
    if resume and (path / ROOT).exists():
        opened = StoreWriter.resume(path, made)
    else:
        opened = StoreWriter.create(path, layout, made)
    with opened as writer:
        if writer.complete:
            return
        # chunks whose root group is not complete have no table to be compared with: each must be whole by itself
        missing = writer.missing()
        with progress(writer.n_chunks, "chunk", f"write {path.name}", writer.n_chunks - len(missing)) as bar:
            for chunk in missing:
                start, stop = writer.rows_of(chunk)
                for hook in made.hooks:
                    writer.write(hook, chunk, store.rows(begin + start, begin + stop, hook))
                bar.update()
        writer.finish()
