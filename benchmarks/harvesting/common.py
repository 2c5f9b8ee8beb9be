"""What the parts of benchmarks/harvest.py share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

SHAPE = "pythia-70m-shape"
Clock = Callable[[], float]


class Sizes(NamedTuple):
    """How much is measured, and by which clock."""

    tokens: int
    rounds: int
    context_length: int
    clock: Clock


def timed(work: Callable[[], object], clock: Clock) -> float:
    """Seconds of one call."""
    began = clock()
    work()
    return clock() - began


def by(clock: Clock) -> str:
    """What a table's heading says of the clock, if it is not that on the wall."""
    return " (processor time)" if clock is time.process_time else ""
