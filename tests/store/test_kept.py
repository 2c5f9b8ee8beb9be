"""What a worker keeps goes with its run, whoever uses it at that moment."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event

import pytest

from tcsae.store.errors import Interrupted
from tcsae.store.kept import Kept


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def use(kept: Kept[str], run: str, inside: Event | None = None, go: Event | None = None) -> str:
    with kept.of(run, lambda: f"of {run}") as thing:
        if inside is not None and go is not None:
            inside.set()
            assert go.wait(60)
        return thing


def held(kept: Kept[str], run: str, threads: ThreadPoolExecutor) -> tuple[Future[str], Event]:
    """A thread that has what is kept, until the event is set."""
    inside, go = Event(), Event()
    found = threads.submit(use, kept, run, inside, go)
    assert inside.wait(60)
    return found, go


def test_a_run_has_one_thing_until_another_run_comes() -> None:
    kept = Kept[object]()
    things = []
    for run in ("a", "a", "b", "a"):
        with kept.of(run, object) as thing:
            things.append(thing)
    assert things[0] is things[1]
    assert len(set(map(id, things))) == 3


def test_the_end_of_a_run_waits_for_no_task_and_what_the_task_uses_goes_with_it(
    threads: ThreadPoolExecutor,
) -> None:
    kept = Kept[str]()
    found, go = held(kept, "a", threads)
    kept.end("a")
    assert not found.done()
    assert not kept.is_empty
    go.set()
    assert found.result() == "of a"
    assert kept.is_empty


def test_a_task_that_waits_for_its_turn_when_the_run_ends_makes_nothing_anew(
    threads: ThreadPoolExecutor,
) -> None:
    kept = Kept[str]()
    found, go = held(kept, "a", threads)
    waiting = threads.submit(use, kept, "a")
    kept.end("a")
    go.set()
    found.result()
    with pytest.raises(Interrupted, match="is over"):
        waiting.result()
    assert kept.is_empty


def test_the_end_of_one_run_is_nothing_to_another(threads: ThreadPoolExecutor) -> None:
    kept = Kept[str]()
    found, go = held(kept, "b", threads)
    kept.end("a")
    kept.check("b")
    go.set()
    found.result()
    assert not kept.is_empty
    assert use(kept, "b") == "of b"
    kept.end("b")
    assert kept.is_empty


def test_what_is_being_written_is_waited_for_and_nothing_is_written_after_it(
    threads: ThreadPoolExecutor,
) -> None:
    kept = Kept[str]()
    with kept.before_the_end("a"):
        kept.end("b")  # whose blocks are none
        ending = threads.submit(kept.end, "a")
        with suppress(Interrupted):
            while True:  # until it has begun
                kept.check("a")
        assert not ending.done()
    ending.result(60)
    with pytest.raises(Interrupted), kept.before_the_end("a"):
        pass
