"""Files that are written whole or not at all, and locks that end with their process.

A file is written beside its final name, synced, then renamed: after a kill or a power loss there is the
old file or the new one. The directory is synced too, since the rename itself is an entry of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

from tcsae.store.errors import ConfigError, DiskFull, TcsaeError

PARTIAL = ".partial"
"""Suffix of a file that is still being written; safe to delete when no process holds the lock."""


@contextmanager
def partial_file(path: Path, *, sync_folder: bool = True) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; on success it is synced and renamed to ``path``.

    If the block raises, what was written is removed and ``path`` stays as it was.

    Without ``sync_folder`` the rename itself may be lost with the power, so that ``path`` is then as it was
    before, never half-written. It suits files that are made again if they are missing; the caller syncs
    their folders (`sync_folders`) before it says that they are there.

    Raises
    ------
    DiskFull
        the disk or the quota is full; the partial file is removed
    """
    with written_beside(path) as beside:
        yield beside
    put_in_place(path, sync_folder=sync_folder)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield the name beside ``path``, to be written to now and put in place later (`put_in_place`).

    If the block raises, what was written is removed; raises `DiskFull` as `partial_file` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    with _removed_on_failure(path, beside):
        yield beside


def put_in_place(path: Path, *, sync_folder: bool = True) -> None:
    """Sync what `written_beside` has left and rename it to ``path``; raises as `partial_file` does."""
    beside = _beside(path)
    with _removed_on_failure(path, beside):
        _sync(beside)
        beside.replace(path)
        if sync_folder:
            _sync(path.parent)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


@contextmanager
def _removed_on_failure(path: Path, beside: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"{path}: the disk is full; nothing half-written was left; free some space and run the same "
                "command again, with --resume where it has that"
            ) from error
        raise


def write_atomically(path: Path, *parts: bytes | memoryview, sync_folder: bool = True) -> None:
    """Write ``parts`` one after the other to ``path``, whole or not at all (see `partial_file`)."""
    with partial_file(path, sync_folder=sync_folder) as beside, beside.open("wb", buffering=0) as file:
        for part in parts:
            write_all(file, part)


def write_all(file: RawIOBase, part: bytes | memoryview) -> None:
    """Write all of ``part``, however little of it each call to an unbuffered file takes."""
    view = memoryview(part).cast("B")
    while view.nbytes:
        view = view[file.write(view) or 0 :]


def sync_folders(root: Path) -> None:
    """Sync ``root`` and every folder below it, so that renames in them outlive a loss of power."""
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(lock: Path, busy: TcsaeError) -> Iterator[None]:
    """Hold ``lock`` for the block; raise ``busy`` at once if another process holds it.

    The kernel drops the lock when the process ends, however it ends, so a killed writer never has to be
    cleaned up after. The file is removed on the way out. Another process may have opened it just before, so
    whoever gets the lock checks that the name still leads to the file that it has locked.
    """
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{lock.parent}: cannot be written to ({error.strerror}); choose another path"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise busy from None
        if _leads_to(lock, descriptor):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_partials(folder: Path) -> Sequence[Path]:
    """Delete what killed writers left under ``folder`` and return it. Call it while holding the lock."""
    left = sorted(folder.rglob(f"*{PARTIAL}"))
    for path in left:
        path.unlink()
    return left
