"""The comparison in a few lines for a terminal."""

from __future__ import annotations

import textwrap

from tcsae.evaluate.cells import WIDTH
from tcsae.evaluate.compare.contrast import Contrast
from tcsae.evaluate.compare.run import Compared
from tcsae.evaluate.compare.tables import p_text, seeds_text, text_of

MOST_LINES = 6
"""Secondary comparisons that are printed; the tables have them all."""


def terminal(found: Compared) -> str:
    """Primary endpoint, non-inferiority, the clearest other differences and where the report is."""
    lines = []
    if found.primary is None:
        lines.append(
            f"primary    {next(one for one in found.not_computed if one.startswith('primary endpoint'))}"
        )
    else:
        lines.append(f"primary    {_line(found.primary, found.primary.p)}")
    verdict = {True: "non-inferior", False: "non-inferiority not shown", None: "not tested"}
    registered = [] if found.primary is None else [(found.primary.treated, found.primary.control)]
    for one in [
        test for test in found.of_kind("non-inferiority") if (test.treated, test.control) in registered
    ]:
        lines.append(f"quality    {_line(one, one.p)}; margin {one.margin:+g}: {verdict[one.holds]}")
    others = [one for one in found.of_kind("secondary") if one.p_holm is not None]
    for one in sorted(others, key=lambda one: one.p_holm or 0.0)[:MOST_LINES]:
        lines.append(f"secondary  {_line(one, one.p_holm)} (Holm over {len(others)})")
    if len(others) > MOST_LINES:
        lines.append(f"secondary  and {len(others) - MOST_LINES} more, in comparisons.parquet")
    if found.not_computed:
        lines.append(
            f"missing    {len(found.not_computed)} things could not be computed; the report says why"
        )
    lines += [
        f"figures    {', '.join(path.name for path in found.images.values()) or 'none'}",
        f"report     {found.report}",
    ]
    wrapped = (
        textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False, break_long_words=False)
        for line in lines
    )
    return "\n".join(part for line in wrapped for part in line)


def _line(one: Contrast, p: float | None) -> str:
    head = f"{one.treated} - {one.control}: {one.metric} {text_of(one.difference)}"
    if one.difference.value is None:
        return head
    return f"{head}, p {p_text(p)}; {one.matching}; seeds {seeds_text(one.seeds)}"
