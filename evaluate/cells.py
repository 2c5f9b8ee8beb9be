"""Figures as text, and rows of them as the lines of a table for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from tcsae.evaluate.estimates import Estimate
from tcsae.evaluate.summary import Row

WIDTH = 120
"""Columns of the terminal; long names are cut with an ellipsis, figures never."""

ABSENT = "-"

Columns = Sequence[tuple[str, Callable[[Row], str]]]
"""Heads, and what stands below each in the line of an SAE."""

NAMES: Columns = (
    ("arm", lambda row: cut(row.arm, 20)),
    ("seed", lambda row: ABSENT if row.seed is None else str(row.seed)),
)
"""First columns of every table: which SAE."""


def fitting(rows: Sequence[Row], columns: Columns, spared: Sequence[str] = ()) -> list[str]:
    """The aligned table of ``rows``, without as many of the columns ``spared`` as it takes to fit."""
    for n_spared in range(len(spared) + 1):
        shown = [column for column in columns if column[0] not in spared[:n_spared]]
        lines = aligned([[head for head, _ in shown], *([cell(row) for _, cell in shown] for row in rows)])
        if max(map(len, lines)) <= WIDTH:
            break
    return lines


def wrapped(text: str) -> list[str]:
    """One entry of a list as lines, those after the first indented."""
    # a minus sign is no hyphen to break at
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def cut(text: str, most: int) -> str:
    """``text``, its end replaced by an ellipsis where it is longer than ``most``."""
    return text if len(text) <= most else text[: most - 1] + "…"


def value(row: Row, metric: str, form: str) -> str:
    """A figure of ``row`` without its interval."""
    estimate = row.estimates.get(metric)
    return ABSENT if estimate is None or estimate.value is None else format(estimate.value, form)


def with_interval(row: Row, metric: str, form: str) -> str:
    """A figure of ``row`` with its interval."""
    estimate = row.estimates.get(metric)
    return ABSENT if estimate is None else figure(estimate, form)


def figure(estimate: Estimate, form: str) -> str:
    """``0.785 [.779, .791]``; the leading zero of the ends is left out to save room.

    >>> figure(Estimate("ev", "1", 0.5, -0.25, 0.75, 9, "bca", None), ".2f")
    '0.50 [-.25,.75]'
    """
    if estimate.value is None:
        return ABSENT
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, form)
    ends = [format(end, form) for end in (estimate.low, estimate.high)]
    short = [end.replace("0.", ".", 1) if end.lstrip("-").startswith("0.") else end for end in ends]
    return f"{format(estimate.value, form)} [{','.join(short)}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: first column to the left, others to the right, empty columns left out."""
    used = [
        at
        for at in range(len(rows[0]))
        if at == 0 or len(rows) == 1 or any(row[at] != ABSENT for row in rows[1:])
    ]
    widths = {at: max(len(row[at]) for row in rows) for at in used}
    lines = [
        "  ".join(row[at].ljust(widths[at]) if at == 0 else row[at].rjust(widths[at]) for at in used)
        for row in rows
    ]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]
