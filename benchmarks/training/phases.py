"""Where the time of some functions goes: each one's own, without what it calls of the others."""

from __future__ import annotations

import functools
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch


class Phases:
    """Seconds, calls and page faults of functions that are watched for a while, in whatever thread they run."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        """of a thread, under what is outermost in it, minor and major; Linux alone tells them apart by thread"""
        self._inside = threading.local()

    @contextmanager
    def watching(
        self, outermost: Mapping[str, tuple[Any, str]], inner: Mapping[str, tuple[Any, str]]
    ) -> Iterator[None]:
        """Watch functions, given by label as an owner and a name, until the context ends.

        ``inner`` ones count where one of the ``outermost`` is running in the same thread.
        """
        with ExitStack() as stack:
            for label, (owner, name) in {**outermost, **inner}.items():
                watched = self._watched(label, getattr(owner, name), begins=label in outermost)
                stack.enter_context(patch.object(owner, name, watched))
            yield

    def _watched(self, label: str, function: Callable[..., Any], *, begins: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            within: list[float] | None = getattr(self._inside, "called", None)
            if within is None and not begins:
                return function(*args, **options)
            called = self._inside.called = [0.0]
            faults = _faults() if within is None else 0
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                took = time.perf_counter() - began
                self._inside.called = within
                self.seconds[label] += took - called[0]
                self.calls[label] += 1
                if within is None:
                    self.faults[label] += _faults() - faults
                else:
                    within[0] += took

        return call


def _faults() -> int:
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_minflt + used.ru_majflt
