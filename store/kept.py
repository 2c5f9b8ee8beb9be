"""What a worker process keeps of a run from one task to the next, and lets go of once the run is over."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from tcsae.store.errors import Interrupted

Thing = TypeVar("Thing")


class Kept(Generic[Thing]):
    """What the tasks of a run share in this process, such as a model: that of the last run which had a task here.

    A run's name must be its own: whoever resumes what was interrupted takes a new one.

    >>> kept = Kept[list[int]]()
    >>> with kept.of("a", lambda: [1]) as thing:
    ...     kept.end("a")  # meanwhile, from another thread; it does not wait
    ...     thing
    [1]
    >>> kept.is_empty
    True
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._state = threading.Condition()
        self._run = ""
        self._thing: Thing | None = None
        self._in_use = False
        self._writing: Counter[str] = Counter()
        self._over: set[str] = set()

    @property
    def is_empty(self) -> bool:
        """whether nothing is kept"""
        return self._thing is None

    @contextmanager
    def of(self, run: str, make: Callable[[], Thing]) -> Iterator[Thing]:
        """What ``make`` has made for ``run``; for the block, no other thread has it.

        Raises `Interrupted` if the run is over, also for who has waited for others meanwhile.
        """
        with self._turn:
            with self._state:
                self.check(run)
                if self._run != run:
                    self._run, self._thing = run, None
                self._in_use = True
            try:
                if self._thing is None:
                    self._thing = make()
                yield self._thing
            finally:
                with self._state:
                    self._in_use = False
                    self._drop_if_over()

    @contextmanager
    def before_the_end(self, run: str) -> Iterator[None]:
        """Hold `end` back for the block, which may write where the next run will; raises `Interrupted` after it."""
        with self._state:
            self.check(run)
            self._writing[run] += 1
        try:
            yield
        finally:
            with self._state:
                self._writing[run] -= 1
                self._state.notify_all()

    def check(self, run: str) -> None:
        """Raise `Interrupted` if the run is over."""
        if run in self._over:
            raise Interrupted("the run that this task was for is over; nobody waits for it")

    def end(self, run: str) -> None:
        """Let go of what is kept for ``run``, now or as soon as the task that uses it ends, and begin no more of it.

        Waits for blocks of `before_the_end` alone.
        """
        with self._state:
            self._over.add(run)
            self._state.wait_for(lambda: not self._writing[run])
            self._drop_if_over()

    def _drop_if_over(self) -> None:
        if self._run in self._over and not self._in_use:
            self._thing = None
