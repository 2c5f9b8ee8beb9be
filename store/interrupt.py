"""Ctrl-C and SIGTERM as an error of the package, with what the user can do next."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tcsae.store.errors import Interrupted


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM within the block into `Interrupted` with ``message``."""
    # Only the main thread may set a handler; elsewhere SIGTERM keeps its meaning, and a kill is safe too.
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _stop) if in_main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(message) from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
