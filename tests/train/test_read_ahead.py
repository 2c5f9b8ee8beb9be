"""Reading ahead: the same results and errors as without, at the same place."""

from __future__ import annotations

import threading

import pytest

from tcsae.train.read_ahead import ReadAhead


def test_what_was_begun_is_read_once_in_order_and_in_another_thread() -> None:
    reads: list[tuple[int, str]] = []

    def read(number: int) -> int:
        reads.append((number, threading.current_thread().name))
        return 10 * number

    ahead = ReadAhead()
    ahead.begin(read, 1)
    ahead.begin(read, 2)
    ahead.begin(read, 1)
    assert [ahead.take(read, 2), ahead.take(read, 1), ahead.take(read, 3)] == [20, 10, 30]
    assert [number for number, _ in reads] == [1, 2, 3]
    assert all("read ahead" in thread for _, thread in reads)
    assert ahead.take(read, 1) == 10
    assert len(reads) == 4  # taken once, it is read again


def test_an_error_is_raised_where_the_result_is_taken_and_the_next_try_reads_again() -> None:
    failures = [OSError("the disk is away")]

    def read(number: int) -> int:
        if failures:
            raise failures.pop()
        return number

    ahead = ReadAhead()
    ahead.begin(read, 7)
    with pytest.raises(OSError, match="the disk is away"):
        ahead.take(read, 7)
    assert ahead.take(read, 7) == 7


def test_what_is_forgotten_is_read_again() -> None:
    values = iter(range(10))
    ahead = ReadAhead()
    ahead.begin(next, values)
    ahead.take(int)  # after this the thread has read what was begun
    ahead.forget()
    assert ahead.take(next, values) == 1


def test_closing_waits_for_what_is_being_read() -> None:
    go, done = threading.Event(), threading.Event()

    def read() -> None:
        go.wait(10)
        done.set()

    ahead = ReadAhead()
    ahead.begin(read)
    threading.Timer(0.05, go.set).start()
    ahead.close()
    assert done.is_set()
    with pytest.raises(RuntimeError):
        ahead.begin(read)
