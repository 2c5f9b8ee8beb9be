"""Copying the files of a store as they are, checked on the way and read back at the far end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from tcsae.store.cache import table_files
from tcsae.store.chunks import CHECKSUM_BYTES, chunk_path
from tcsae.store.errors import (
    DiskFull,
    RemoteError,
    StoreCorrupt,
    StoreExists,
    StoreIncomplete,
    StoreMismatch,
    StoreNotFound,
)
from tcsae.store.metadata import ROOT, checked_root, read_root, recorded_digests
from tcsae.store.places import End, LocalEnd, Place
from tcsae.store.progress import progress
from tcsae.store.space import free_bytes, stored_bytes
from tcsae.store.spec import CHECKSUMS, Provenance

THREADS = 4
"""files on their way at once; each is in memory whole, twice while it is compared"""


class Source(NamedTuple):
    """A finished store to copy from."""

    place: Place
    """as given, for messages"""
    end: End
    """its files"""
    root: bytes
    """content of its root group"""
    attributes: dict[str, Any]
    """of the root group"""
    made: Provenance
    """the same, checked"""


class Moved(NamedTuple):
    """What a transfer did."""

    files: int
    """files of the store"""
    kept: int
    """of these, chunks that an earlier call had copied"""
    bytes: int
    """of all files"""


def open_source(place: Place, end: End) -> Source:
    """The finished store at ``place``; raises `StoreNotFound`, `StoreIncomplete` or `StoreCorrupt`."""
    if isinstance(end, LocalEnd):
        read_root(end.path)  # says what is wrong better than the lines below
    try:
        root = end.read(ROOT)
    except FileNotFoundError:
        raise StoreNotFound(f"{place}: not an activation store (nothing there); check the address") from None
    attributes = checked_root(root, place)
    if not attributes.get("complete"):
        raise StoreIncomplete(f"{place}: not finished; run the `tcsae harvest` or `store copy` with --resume")
    if not isinstance(attributes.get("id"), str):
        raise StoreCorrupt(f"{place}/{ROOT}: attributes lack id; copy the store again")
    return Source(place, end, root, attributes, Provenance.from_dict(attributes, f"{place}/{ROOT}"))


def copy_files(source: Source, target: End, dst: Place, *, resume: bool) -> Moved:
    """Copy every file, the root group last; raises as `tcsae.store.copy.copy_store` does."""
    made = source.made
    expected = {
        str(chunk_path(Path(), hook, chunk)): checksum
        for hook in made.hooks
        for chunk, checksum in enumerate(_checksums(source, hook))
    }
    digests = recorded_digests(source.attributes, f"{source.place}/{ROOT}")
    guess = made.rows_per_chunk * made.d_model * 4

    def copy(name: str) -> tuple[int, bool]:
        check(False)
        checksum = expected.get(name)
        n_bytes = 0 if checksum is None else guess
        if resume and checksum is not None and (found := _whole(target, name, checksum, n_bytes)) is not None:
            return found, True
        content = _fetched(source, name, n_bytes)
        if problem := _problem(name, content, checksum, digests.get(name)):
            raise StoreCorrupt(f"{source.place}/{name}: {problem}; verify the source")
        _written(target, dst, name, content)
        return len(content), False

    # What is in the way is said below; what does not fit leaves nothing behind.
    if isinstance(target, LocalEnd) and (resume or not target.path.exists()):
        _check_space(target.path, source, list(expected))
    with target.held() as check:
        _begin(target, source, dst, resume=resume)
        done = list(_in_threads(copy, [*table_files(made), *expected], f"copy to {dst}"))
        check(True)
        target.settle()
        _written(target, dst, ROOT, source.root)
    return Moved(
        files=len(done) + 1,
        kept=sum(kept for _, kept in done),
        bytes=sum(size for size, _ in done) + len(source.root),
    )


def _check_space(path: Path, source: Source, names: list[str]) -> None:
    """Raise `DiskFull`, with the numbers, unless the chunk files that are not there yet fit on the disk.

    The sizes of compressed ones are the source's where it tells them, and otherwise what their ratio lets expect.
    """
    made = source.made
    sizes = source.end.sizes(names) if made.codec != "raw" else None
    n_rows = len(names) // len(made.hooks) * made.rows_per_chunk
    in_all = stored_bytes(made, n_rows) if sizes is None else sum(sizes)
    there = 0
    for name in names:
        with suppress(FileNotFoundError):
            there += (path / name).stat().st_size
    needed = in_all - there
    if needed > free_bytes(path):
        raise DiskFull(
            f"{path}: expected {needed:,} bytes free for {len(names):,} chunks, got {free_bytes(path):,}; free some "
            "space, or copy fewer documents or hooks"
        )


def _begin(target: End, source: Source, dst: Place, *, resume: bool) -> None:
    """Write the root group of an unfinished copy, or see that the one there is of this copy."""
    unfinished = json.loads(source.root)
    unfinished["attributes"]["complete"] = False
    try:
        attributes = json.loads(target.read(ROOT))["attributes"]
        begun, complete = attributes.get("id"), attributes.get("complete")
    except FileNotFoundError:
        if not target.is_free():
            raise StoreExists(f"{dst}: exists and is not a store; choose another place") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StoreExists(f"{dst}: exists and is not a store; choose another place") from None
    else:
        if not resume:
            state = "a finished store" if complete else "an unfinished store: add --resume"
            raise StoreExists(f"{dst}: already holds {state}; choose another place or delete it")
        if begun != source.attributes["id"]:
            raise StoreMismatch(
                f"{dst}: id: begun as a copy of {begun}, the source is {source.attributes['id']}; choose "
                "another place or delete it"
            )
    target.tidy()
    target.write(ROOT, json.dumps(unfinished, indent=2).encode())


def _checksums(source: Source, hook: str) -> list[int]:
    name = f"{CHECKSUMS}/{hook}/c/0"
    content = _fetched(source, name, 0)
    if problem := _problem(name, content):
        raise StoreCorrupt(f"{source.place}/{name}: {problem}; verify the source")
    return [int(checksum) for checksum in np.frombuffer(content[:-CHECKSUM_BYTES], "<u4")]


def _fetched(source: Source, name: str, expected_bytes: int) -> bytes:
    try:
        return source.end.read(name, expected_bytes)
    except FileNotFoundError:
        raise StoreCorrupt(f"{source.place}/{name}: missing; verify the source") from None


def _written(target: End, dst: Place, name: str, content: bytes) -> None:
    target.write(name, content)
    if target.read(name, len(content)) != content:
        raise RemoteError(f"{dst}/{name}: differs from what was written there; run again with --resume")


def _whole(target: End, name: str, checksum: int, expected_bytes: int) -> int | None:
    """Size of the file at the far end if it is the one that is to be there."""
    try:
        content = target.read(name, expected_bytes)
    except FileNotFoundError:
        return None
    return None if _problem(name, content, checksum) else len(content)


def _problem(name: str, content: bytes, checksum: int | None = None, digest: str | None = None) -> str | None:
    """What is wrong with a file: its own CRC-32C, the one that a chunk is to have, its SHA-256 where one is known."""
    if digest is not None and (found := hashlib.sha256(content).hexdigest()) != digest:
        return f"SHA-256 {digest[:12]}… expected, {found[:12]}… found"
    if "/c/" not in name:
        return None
    stored = int.from_bytes(content[-CHECKSUM_BYTES:], "little")
    computed = int(google_crc32c.value(np.frombuffer(content, np.uint8)[:-CHECKSUM_BYTES]))
    if computed != stored:
        return f"CRC-32C {stored:08x} stored, {computed:08x} computed"
    if checksum is not None and computed != checksum:
        return f"CRC-32C {checksum:08x} expected, {computed:08x} found: another chunk's file"
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
