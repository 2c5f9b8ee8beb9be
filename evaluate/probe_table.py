"""The probing suite in the terminal: what few features of a block tell of a text's topic."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tcsae.evaluate.cells import NAMES, WIDTH, Columns, fitting, value, with_interval
from tcsae.evaluate.probe_figures import probe_name
from tcsae.evaluate.summary import Row

SHOWN = 20
"""features of the probes that are shown"""

_COLUMNS: Columns = (
    *NAMES,
    ("topic H", lambda row: with_interval(row, probe_name("topic", "H", SHOWN), ".2f")),
    ("topic L", lambda row: with_interval(row, probe_name("topic", "L", SHOWN), ".2f")),
    ("topic whole", lambda row: with_interval(row, probe_name("topic", "whole", SHOWN), ".2f")),
    ("chance", lambda row: value(row, "probe_topic_chance", ".2f")),
)


def probe_lines(rows: Sequence[Row]) -> list[str]:
    """A table of the topic probes with 95 % intervals over documents; empty where none was asked for."""
    probed = [row for row in rows if "probe_topic_chance" in row.estimates]
    if not probed:
        return []
    note = (
        f"Balanced accuracy of a topic probe on {SHOWN} features of each part, on documents that neither it nor the "
        "SAE has seen."
    )
    return ["", *fitting(probed, _COLUMNS), *textwrap.wrap(note, WIDTH)]
