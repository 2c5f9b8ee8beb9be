"""One writer at a time for a folder in object storage, as far as object storage can promise it.

A writer puts an object ``.writer.lock`` that says who it is and when it last looked, renews it while it works
and deletes it at the end. Another writer that finds a fresh one is refused. One that is older than
`STALE_SECONDS` was left by a writer that was killed, and is taken over.

This is a convention between writers, not a lock of the store's: an object store has no operation that all of
them share by which a process could hold a name. What that leaves open: two writers that begin within the same
second may both see no object. Each reads its own back after a moment, and looks again at every renewal and
before it marks the copy as complete, so the one that was overwritten stops within `RENEW_SECONDS`; until then
both may have written. No file is ever mixed of two (objects are put whole), and a copy counts as complete
only after its files were read back. The age is computed from the other machine's clock: clocks that differ by more than
`STALE_SECONDS` make a writer that lives look dead, or the other way round.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tcsae.store.errors import RemoteError, StoreBusy
from tcsae.store.remote import RemoteFolder

CLAIM = ".writer.lock"
"""name of the object"""

RENEW_SECONDS = 20.0
"""how often a writer that works says so"""

STALE_SECONDS = 120.0
"""age at which a claim is taken for one of a writer that was killed"""

SETTLE_SECONDS = 0.2
"""how long a writer waits before it reads its claim back: two that begin together then see the later one's"""


Check = Callable[[bool], None]
"""raises `StoreBusy` once another writer has taken over; looks at the folder itself if given True, else goes by
what the last renewal has seen"""


@contextmanager
def claimed(folder: RemoteFolder) -> Iterator[Check]:
    """Claim ``folder`` for the block.

    Yields
    ------
    Check
        to be called between writes, and with True before the last one

    Raises
    ------
    StoreBusy
        another writer is at work there; says which, since when it was last seen, and how to go on
    RemoteError
        the claim cannot be read or written
    """
    found = _read(folder)
    if found is not None and time.time() - found["seen"] < STALE_SECONDS:
        raise _busy(folder, found)
    owner = uuid.uuid4().hex  # a process may hold several claims
    lost: list[StoreBusy] = []
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            # a renewal that fails is tried again at the next; the claim is stale only after several
            with suppress(RemoteError):
                try:
                    _check(folder, owner)
                except StoreBusy as error:
                    lost.append(error)
                    return
                _write(folder, owner)

    def check(look: bool) -> None:
        if lost:
            raise lost[0]
        if look:
            _check(folder, owner)

    renewing = threading.Thread(target=renew, daemon=True, name=f"claim of {folder.url}")
    _write(folder, owner)
    try:
        time.sleep(SETTLE_SECONDS)
        _check(folder, owner)
        renewing.start()
        yield check
    finally:
        done.set()
        if renewing.ident is not None:
            renewing.join()
        # one that is left behind is stale soon, so failing to delete it does not matter
        with suppress(RemoteError, StoreBusy):
            _check(folder, owner)
            folder.remove(CLAIM)


def _check(folder: RemoteFolder, owner: str) -> None:
    """Raise `StoreBusy` unless the claim is still ``owner``'s, who has written it."""
    found = _read(folder)
    if found is None:
        # whoever took over may be through already and have deleted its own claim
        raise StoreBusy(
            f"{folder.url}: this writer's {CLAIM} is gone: another one took over and has ended, or it was deleted; "
            "see that no other writer is at work and run the same command with --resume"
        )
    if found["owner"] != owner:
        raise _busy(folder, found)


def _read(folder: RemoteFolder) -> dict[str, Any] | None:
    """What the claim says, or None if there is none that can be read."""
    try:
        found = json.loads(folder.read(CLAIM))
        claim: dict[str, Any] = {
            "owner": str(found["owner"]),
            "host": str(found["host"]),
            "pid": int(found["pid"]),
            "seen": float(found["seen"]),
        }
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return claim if math.isfinite(claim["seen"]) else None


def _write(folder: RemoteFolder, owner: str) -> None:
    claim = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "seen": time.time()}
    folder.write(CLAIM, json.dumps(claim).encode())


def _busy(folder: RemoteFolder, found: dict[str, Any]) -> StoreBusy:
    age = time.time() - found["seen"]
    writer = f"{folder.url}: process {found['pid']} on {found['host']} is writing there"
    if age < -STALE_SECONDS:
        return StoreBusy(
            f"{writer}, last seen {-age:.0f} s from now: the two machines' clocks differ; wait for it or stop it, or, "
            f"if no writer lives, delete {CLAIM} there"
        )
    return StoreBusy(
        f"{writer} (last seen {max(age, 0):.0f} s ago); wait for it or stop it; if it was killed, try again in "
        f"{max(STALE_SECONDS - age, 0):.0f} s"
    )
