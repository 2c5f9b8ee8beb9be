"""Copying a store between a folder and any URL: as it is, a part of it, or compressed.

What changes nothing is copied file by file, so the copy has the same bytes and the same id. A part, or another
codec, is a new store: it is written to a folder like any other (on the way to a URL: to a staging folder in the
cache, which needs as much free space as the result), with its own statistics and id, and then copied.

Either way the root group, which says that the store is complete, is written last, after every other file was
read back from the far end and compared. What a call that was stopped has copied is kept and checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from tcsae.store.chunks import CHECKSUM_BYTES
from tcsae.store.codecs import CodecName
from tcsae.store.errors import ConfigError, UnknownName
from tcsae.store.interrupt import interruptible
from tcsae.store.metadata import read_root
from tcsae.store.places import LocalEnd, Place, RemoteEnd, is_inside, open_end
from tcsae.store.reader import ActivationStore
from tcsae.store.recode import plan_recoding, staged, staging_folder, write_recoded
from tcsae.store.remote import Transfer
from tcsae.store.selection import select
from tcsae.store.space import folder_bytes
from tcsae.store.spec import DOCUMENT_OFFSETS
from tcsae.store.transfer import Moved, copy_files, open_source


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
    """of these, chunk files that an earlier call had copied; where one of a chunk's hooks lacks it, all are written"""
    bytes: int
    """bytes of the copy"""
    ratio: dict[str, float]
    """bytes of the raw rows over bytes of the codec, by hook, on a sample; empty if nothing was recoded"""
    relative_error: dict[str, float]
    """squared error of decoded rows over their variance, by hook, on a sample; empty likewise"""


def copy_store(
    src: Place,
    dst: Place,
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
        another process is writing to ``dst`` (at a URL: as far as `tcsae.store.claim` can tell)
    DiskFull
        the copy, or what is put together here on its way, does not fit on this machine's disk; before it is begun
    RemoteError
        the network, after its retries; the copy can be resumed
    Interrupted
        Ctrl-C or SIGTERM; what is copied stays
    """
    if codec is not None and codec not in get_args(CodecName):
        raise UnknownName.among("codec", codec, get_args(CodecName))
    if is_inside(dst, src):
        raise ConfigError(f"{dst}: is the source itself, or lies in it; choose another destination")
    target = open_end(dst, transfer)
    if isinstance(target, RemoteEnd) and target.folder.is_read_only:
        raise ConfigError(f"{dst}: http cannot be written to; choose another destination")
    with interruptible(f"{dst}: interrupted; what is copied is kept, run the same command with --resume"):
        source = open_source(src, open_end(src, transfer))
        part = select(source.made, hooks, documents, rows)
        if part is None and codec in (None, source.made.codec):
            moved = copy_files(source, target, dst, resume=resume)
            offsets = np.frombuffer(target.read(f"{DOCUMENT_OFFSETS}/c/0")[:-CHECKSUM_BYTES], "<i8")
            return Copied(
                source=str(src),
                destination=str(dst),
                id=source.attributes["id"],
                rows=int(offsets[-1]),
                documents=len(offsets) - 1,
                hooks=source.made.hooks,
                codec=source.made.codec,
                ratio={},
                relative_error={},
                **moved._asdict(),
            )
        opened, name = ActivationStore.open(src), codec or source.made.codec
        if isinstance(target, LocalEnd):
            here = target.path
            plan = plan_recoding(opened, part, name, here if resume else None)
        else:
            here = staging_folder(opened, part, name, dst)
            plan = plan_recoding(opened, part, name, here)
        if isinstance(target, LocalEnd):
            kept = write_recoded(plan, target.path, resume=resume)
            identity = read_root(target.path)["id"]
            size, n_files = folder_bytes(target.path)
            moved = Moved(files=n_files, kept=kept, bytes=size)
        else:
            with staged(plan, here) as staging:
                written = open_source(staging, LocalEnd(staging))
                moved = copy_files(written, target, dst, resume=resume)
                identity = written.attributes["id"]
        return Copied(
            source=str(src),
            destination=str(dst),
            id=identity,
            rows=plan.layout.n_rows,
            documents=plan.layout.n_documents,
            hooks=plan.made.hooks,
            codec=plan.made.codec,
            ratio=plan.made.measured("ratio"),
            relative_error=plan.made.measured("relative_error"),
            **moved._asdict(),
        )
