"""Ctrl-C and SIGTERM: as an error of the package that says what to do next, or as a request for later.

`interruptible` is for work that may stop anywhere, `stop_on_signal` for work that is whole only between its steps.
"""

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


class Stop:
    """Whether somebody has asked the process to stop."""

    def __init__(self) -> None:
        self.requested: str | None = None
        """name of the signal, or None"""


@contextmanager
def stop_on_signal(*, once: bool = True) -> Iterator[Stop]:
    """Within the block the first SIGINT or SIGTERM only sets ``stop.requested``; a second one acts as usual.

    Without ``once`` no number of them acts as usual: torchrun passes a Ctrl-C on to processes that have had it
    from the terminal, and ends those itself that do not stop.

    Outside the main thread Python cannot catch signals, and nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _: FrameType | None) -> None:
        stop.requested = signal.Signals(number).name
        if once:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
