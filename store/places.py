"""The two ends of a copy: a folder on this machine or one at a URL, read and written by whole files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tcsae.store.atomic import PARTIAL, exclusive, remove_partials, sync_folders, write_atomically
from tcsae.store.claim import Check, claimed
from tcsae.store.errors import ConfigError, StoreBusy, StoreCorrupt, StoreExists
from tcsae.store.metadata import ROOT
from tcsae.store.planning import LOCK
from tcsae.store.remote import RemoteFolder, Transfer, is_url, local_path

Place = str | Path
"""a path, or any URL that fsspec knows"""


@dataclass(frozen=True, slots=True)
class LocalEnd:
    """A folder on this machine."""

    path: Path

    def read(self, name: str, expected_bytes: int = 0) -> bytes:  # noqa: ARG002  # as of RemoteEnd
        """The whole file ``name``; raises FileNotFoundError, or `StoreCorrupt` if it is a link out of the store."""
        path = self.path / name
        if path.resolve() != self.path.resolve() / name:
            raise StoreCorrupt(f"{path}: is a link out of its place; a store has plain files only")
        return path.read_bytes()

    def sizes(self, names: Sequence[str]) -> list[int] | None:
        """Bytes of each file; None if one of them is missing."""
        try:
            return [(self.path / name).stat().st_size for name in names]
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Put ``content`` at ``name``, whole or not at all."""
        write_atomically(self.path / name, content)

    def is_free(self) -> bool:
        """Whether nothing is there but what a killed copy may leave."""
        return {p.name for p in self.path.iterdir()} <= {LOCK, ROOT + PARTIAL}

    @contextmanager
    def held(self) -> Iterator[Check]:
        """Be the only writer for the block; see `RemoteEnd.held`."""
        busy = StoreBusy(f"{self.path}: another process is writing to this store; wait for it or stop it")
        if self.path.exists() and not self.path.is_dir():
            raise StoreExists(f"{self.path}: exists and is not a store; choose another place")
        with exclusive(self.path / LOCK, busy):
            yield lambda _look: None  # the kernel gives the lock to no one else

    def tidy(self) -> None:
        """Delete what a killed copy has left half-written; for a writer that holds the folder."""
        remove_partials(self.path)

    def settle(self) -> None:
        """Make what was written outlive a loss of power: the folders' entries, as each file is synced already."""
        sync_folders(self.path)


@dataclass(frozen=True, slots=True)
class RemoteEnd:
    """A folder at a URL."""

    folder: RemoteFolder

    def read(self, name: str, expected_bytes: int = 0) -> bytes:
        """The whole file ``name``; raises FileNotFoundError or `RemoteError`."""
        return self.folder.read(name, expected_bytes)

    def sizes(self, names: Sequence[str]) -> list[int] | None:
        """Bytes of each file; None if they cannot be listed, or one of them is missing."""
        return self.folder.sizes(names)

    def write(self, name: str, content: bytes) -> None:
        """Put ``content`` at ``name``; raises `RemoteError`."""
        self.folder.write(name, content)

    def is_free(self) -> bool:
        """Whether no store is there; other objects under the same prefix do no harm and stay."""
        return not self.folder.exists()

    @contextmanager
    def held(self) -> Iterator[Check]:
        """Be the only writer for the block, as far as object storage can say (`tcsae.store.claim`).

        Yields a function to call before each write: it raises `StoreBusy` if another writer has taken over.
        """
        with claimed(self.folder) as check:
            yield check

    def tidy(self) -> None:
        """Nothing: objects are whole or absent."""

    def settle(self) -> None:
        """Nothing: an object that was put is there."""


End = LocalEnd | RemoteEnd


def open_end(place: Place, transfer: Transfer | None) -> End:
    """The end at ``place``; raises `ConfigError` if fsspec does not know its protocol."""
    return RemoteEnd(RemoteFolder(str(place), transfer)) if is_url(place) else LocalEnd(local_path(place))


def is_inside(one: Place, other: Place) -> bool:
    """Whether ``one`` is the same folder as ``other`` or lies in it."""
    if is_url(one) or is_url(other):
        return f"{str(one).rstrip('/')}/".startswith(f"{str(other).rstrip('/')}/")
    return local_path(one).resolve().is_relative_to(local_path(other).resolve())


def write_file(place: Place, content: bytes) -> None:
    """Put ``content`` at ``place``, a file's path or URL, whole or not at all; raises `RemoteError`, `ConfigError`."""
    folder, _, name = str(place).rpartition("/")
    if is_url(place):
        if not name:
            raise ConfigError(f"{place}: expected a file's name, got a folder's; add one such as README.md")
        RemoteFolder(folder).write(name, content)
    else:
        write_atomically(local_path(place), content)
