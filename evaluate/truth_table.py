"""The truth suite in the terminal: what was found of the known dictionary, and whether the metrics know it."""

from __future__ import annotations

import textwrap

from tcsae.evaluate.cells import NAMES, WIDTH, Columns, fitting, value, with_interval, wrapped
from tcsae.evaluate.summary import Evaluation
from tcsae.evaluate.truth_ranking import ranking_lines

_COLUMNS: Columns = (
    *NAMES,
    ("recovered", lambda row: with_interval(row, "recovered", ".2f")),
    ("slow in H", lambda row: with_interval(row, "slow_in_H", ".2f")),
    ("fast in H", lambda row: with_interval(row, "fast_in_H", ".2f")),
    ("chance", lambda row: value(row, "share_of_H", ".2f")),
    ("purity H", lambda row: with_interval(row, "purity_H", ".2f")),
    ("F1", lambda row: with_interval(row, "f1", ".2f")),
)


def truth_lines(evaluation: Evaluation, lag: int) -> list[str]:
    """A table of its own, and what the truth says of the temporal metrics at ``lag``; empty without a truth."""
    rows = [row for row in evaluation.rows if "recovered" in row.estimates]
    if not rows:
        return []
    note = (
        "Against the known dictionary: true features recovered (cosine > 0.9), the share of recovered slow and of "
        "recovered fast ones whose best match is in block H (chance: H's share of the live features), purity: share "
        "of H's matched features that are slow, F1 of firing over matched pairs. In brackets 95 % bootstrap intervals: "
        "over true features, the SAE's features, and (F1) documents."
    )
    lines = ["", *fitting(rows, _COLUMNS), *textwrap.wrap(note, WIDTH)]
    for line in ranking_lines(() if evaluation.ranking is None else evaluation.ranking.over_saes, lag):
        lines += wrapped(line)
    return lines
