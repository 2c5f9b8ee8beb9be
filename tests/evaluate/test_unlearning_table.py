"""Figures of unlearning in words."""

from __future__ import annotations

import pytest

from tcsae.evaluate.estimates import Estimate
from tcsae.evaluate.unlearning_table import figure_in_words


@pytest.mark.parametrize(
    ("value", "low", "high", "reason", "words"),
    [
        (0.25, 0.1, 0.5, None, "0.250 [0.100, 0.500]"),
        (
            0.25,
            None,
            None,
            "no interval, because 2 of 9 resamples are undefined",
            "0.250 (no interval, because 2 of 9",
        ),
        (None, None, None, "undefined, because nothing was scored", "undefined, because nothing was scored"),
    ],
)
def test_a_figure_has_its_interval_or_says_why_it_has_none(
    value: float | None, low: float | None, high: float | None, reason: str | None, words: str
) -> None:
    method = None if low is None else "bca"
    one = Estimate("score", "nats", value, low, high, 9, method, reason)
    assert figure_in_words(one).startswith(words)
