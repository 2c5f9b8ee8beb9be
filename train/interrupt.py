"""Stopping at a step's end on Ctrl-C or SIGTERM instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
