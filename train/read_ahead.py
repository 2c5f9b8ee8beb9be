"""Reads that are begun before their result is asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Found = TypeVar("Found")


class ReadAhead:
    """One thread that reads what will be asked for, one read after the other.

    What a read returns or raises must follow from its arguments, since nobody can tell whether it was begun early:
    an error is raised by `take`, at the place where it would have been raised without a thread.

    >>> ahead = ReadAhead()
    >>> ahead.begin(pow, 2, 10)
    >>> ahead.take(pow, 2, 10), ahead.take(pow, 3, 2)
    (1024, 9)
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
        self._begun: dict[tuple[Any, ...], Future[Any]] = {}

    def begin(self, read: Callable[..., Any], *arguments: Any) -> None:
        """Let ``read(*arguments)`` be next, unless it has been begun."""
        key = (read, *arguments)
        if key not in self._begun:
            self._begun[key] = self._thread.submit(read, *arguments)

    def take(self, read: Callable[..., Found], *arguments: Any) -> Found:
        """What ``read(*arguments)`` returned; it is waited for, and begun now if it was not."""
        self.begin(read, *arguments)
        found: Found = self._begun.pop((read, *arguments)).result()
        return found

    def forget(self) -> None:
        """Nothing that was begun will be taken."""
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    def close(self) -> None:
        """Wait until nothing is read any more; nothing can be begun after."""
        self.forget()
        self._thread.shutdown()
