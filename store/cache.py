"""Stores elsewhere, read through a local folder of whole files.

``<cache>/stores/<hash of URL and id>/`` looks like the store, with the chunks that were asked for so far. Any
number of processes share it: a file is written beside its name and renamed under a lock of its own, so one
process fetches it and the others wait. Every chunk is checked against the store's table of checksums when a
process first touches it, fetched just now or years ago. When the folder outgrows its limit, the chunks that
were opened longest ago are removed; a process that still maps one keeps its map.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tcsae.store.atomic import PARTIAL, write_atomically
from tcsae.store.errors import ConfigError, StoreCorrupt, StoreError, StoreNotFound
from tcsae.store.metadata import ROOT, checked_root
from tcsae.store.remote import RemoteFolder, Transfer
from tcsae.store.spec import (
    ACTIVATIONS,
    CHECKSUMS,
    CONTEXT_OFFSETS,
    DOCUMENT_OFFSETS,
    DOCUMENTS_FILE,
    TOKENS,
    Provenance,
)
from tcsae.store.truth import truth_files

CACHE_VARIABLE = "TCSAE_CACHE"
"""environment variable that names the folder"""

LIMIT_VARIABLE = "TCSAE_CACHE_GB"
"""environment variable for the limit, in gigabytes (10^9 bytes)"""

DEFAULT_LIMIT = 50 * 10**9


def cache_folder() -> Path:
    """Where stores and converted models are cached: ``$TCSAE_CACHE``, or the user's cache folder of the system."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("tcsae"))


def cache_limit() -> int:
    """Bytes that all caches together may hold: ``$TCSAE_CACHE_GB``, or 50 GB."""
    return gigabytes(LIMIT_VARIABLE, DEFAULT_LIMIT)


def gigabytes(variable: str, default: int) -> int:
    """Bytes that the environment's ``variable`` says in gigabytes; raises `ConfigError` for what is none."""
    given = os.environ.get(variable)
    try:
        limit = int(float(given) * 10**9) if given else default
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise ConfigError(f"{variable}: expected gigabytes, more than 0, got {given!r}")
    return limit


class CachedStore:
    """The local copy, as far as it is there, of the store at a URL.

    Parameters
    ----------
    url
        the store
    folder
        of all caches; None for `cache_folder`
    limit
        bytes that it may hold; None for `cache_limit`
    transfer
        patience with the network

    Raises
    ------
    StoreNotFound
        nothing there
    StoreCorrupt
        its header is not one
    RemoteError
        it cannot be reached
    """

    def __init__(
        self,
        url: str,
        *,
        folder: Path | None = None,
        limit: int | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.remote = RemoteFolder(url, transfer)
        self._caches = folder or cache_folder()
        self._limit = limit or cache_limit()
        try:
            root = self.remote.read(ROOT)
        except FileNotFoundError:
            raise StoreNotFound(
                f"{url}: not an activation store (nothing there); check the address and your rights"
            ) from None
        attributes = checked_root(root, url)
        name = f"{self.remote.url} {attributes.get('id')}"
        # the id is in the name: a store that was replaced at the same URL does not meet its predecessor's chunks
        self.path = self._caches / "stores" / hashlib.sha256(name.encode()).hexdigest()[:24]
        with self._alone(ROOT):
            write_atomically(self.path / ROOT, root)
        # the size of the folder is looked up at the first chunk, then again whenever a tenth of the limit has come
        self._fetched = self._limit
        if attributes.get("complete"):
            self._made = Provenance.from_dict(attributes, f"{url}/{ROOT}")
            self.fetch_tables()

    def fetch_tables(self, *, again: bool = False) -> None:
        """Fetch every file but the chunks (see `fetch`)."""
        for name in table_files(self._made):
            self.fetch(name, again=again)

    def fetch(self, name: str, *, again: bool = False) -> Path:
        """Path of the local copy of file ``name``, fetched if it is not there (or, ``again``, in any case).

        Raises
        ------
        StoreCorrupt
            the store has no such file
        RemoteError
            it cannot be fetched
        """
        path = self.path / name
        if path.exists() and not again:
            touch(path)
            return path
        with self._alone(name):
            # another process may have fetched it meanwhile; a file to be replaced is fetched in any case
            if again or not path.exists():
                self._make_room()
                try:
                    content = self.remote.read(name)
                except FileNotFoundError:
                    raise StoreCorrupt(
                        f"{self.remote.url}/{name}: missing; copy the store there again"
                    ) from None
                write_atomically(path, content)
                self._fetched += len(content)
        return path

    def _alone(self, name: str) -> AbstractContextManager[None]:
        """Be the only process that writes file ``name``: they would write to one name beside it."""
        return waiting(self.path / ".locks" / hashlib.sha256(name.encode()).hexdigest()[:16])

    @contextmanager
    def naming_the_url(self) -> Iterator[None]:
        """Let errors of the block name the file at the URL, not its copy on this machine."""
        try:
            yield
        except StoreError as error:
            raise type(error)(str(error).replace(str(self.path), self.remote.url)) from error

    def _make_room(self) -> None:
        """Remove the chunks used longest ago until the caches are below their limit."""
        if self._fetched < self._limit // 10:
            return
        self._fetched = 0
        with waiting(self._caches / "stores" / ".sweep"):
            chunks = []
            total = 0
            for path in (self._caches / "stores").rglob("*"):
                try:
                    found = path.lstat()
                except FileNotFoundError:  # another process removed it
                    continue
                if path.is_file() and path.suffix != PARTIAL:
                    total += found.st_size
                    if ACTIVATIONS in path.parts and path.name != ROOT:
                        chunks.append((found.st_atime_ns, found.st_size, path))
            for _, size, path in sorted(chunks):
                # a tenth is kept free, since this is looked at once in so many bytes
                if total <= self._limit - self._limit // 10:
                    break
                path.unlink(missing_ok=True)
                total -= size


def table_files(made: Provenance) -> Iterator[str]:
    """Names of every file of a store but its root group and its chunks."""
    for name in (TOKENS, DOCUMENT_OFFSETS, CONTEXT_OFFSETS, *(f"{CHECKSUMS}/{hook}" for hook in made.hooks)):
        yield f"{name}/{ROOT}"
        yield f"{name}/c/0"
    for hook in made.hooks:
        yield f"{ACTIVATIONS}/{hook}/{ROOT}"
    yield from (f"{ACTIVATIONS}/{ROOT}", f"{CHECKSUMS}/{ROOT}", DOCUMENTS_FILE)
    yield from truth_files(made)


@contextmanager
def waiting(lock: Path) -> Iterator[None]:
    """Hold ``lock`` for the block, waiting for another process that has it. The file stays: it is empty."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def touch(path: Path) -> None:
    """Note that the file was used now; not every file system notes reads by itself.

    The time of its last change stays: by that a reader knows a chunk that it has verified.
    """
    # another process has just removed it, and whoever opens it fetches it again; or another user owns it
    with suppress(FileNotFoundError, PermissionError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
