"""The probing suite in the terminal: what few features of block H tell, and by which short cuts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tcsae.evaluate.cells import ABSENT, NAMES, WIDTH, aligned, value, with_interval, wrapped
from tcsae.evaluate.probe_figures import probe_name
from tcsae.evaluate.probe_samples import CONTEXT_TASKS, TOKEN_TASKS
from tcsae.evaluate.summary import Row

SHOWN = 20
"""features of the probes that are shown"""

_TASKS = (*CONTEXT_TASKS, *TOKEN_TASKS)


def probe_lines(rows: Sequence[Row]) -> list[str]:
    """A table of the probes with 95 % intervals over documents, and why one is missing; empty where none was asked
    for."""
    chances = [f"probe_{task}_chance" for task in _TASKS]
    probed = [row for row in rows if any(name in row.estimates for name in chances)]
    if not probed:
        return []
    cells = [
        [*(head for head, _ in NAMES), *(task.replace("_", " ") for task in _TASKS), "topic L", "source L"],
        ["chance", ABSENT, *(value(probed[0], name, ".2f") for name in chances), ABSENT, ABSENT],
        *(
            [
                *(cell(row) for _, cell in NAMES),
                *(with_interval(row, probe_name(task, "H", SHOWN), ".2f") for task in _TASKS),
                *(value(row, probe_name(task, "L", SHOWN), ".2f") for task in CONTEXT_TASKS),
            ]
            for row in probed
        ),
    ]
    note = (
        f"Probes of {SHOWN} features of block H (of the rest, L, in the last columns): balanced accuracy on documents "
        "that neither the probe nor the SAE has seen. Position, token and the token before are short cuts: H should "
        "read them no better than the control's H."
    )
    of_first = probed[0].estimates
    missing = [
        f"Probe of the {task.replace('_', ' ')}: {of_first[name].reason}"
        for task, name in zip(_TASKS, chances, strict=True)
        if name in of_first and of_first[name].value is None
    ]
    shown = [*aligned(cells), *textwrap.wrap(note, WIDTH)] if len(missing) < len(_TASKS) else []
    return ["", *shown, *(line for one in missing for line in wrapped(one))]
