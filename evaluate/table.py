"""The results as tables for a terminal of 120 columns."""

from __future__ import annotations

import textwrap

from tcsae.evaluate.cells import (
    ABSENT,
    NAMES,
    WIDTH,
    Columns,
    cut,
    figure,
    fitting,
    value,
    with_interval,
    wrapped,
)
from tcsae.evaluate.config import documents_text
from tcsae.evaluate.probe_table import probe_lines
from tcsae.evaluate.summary import Comparison, Evaluation, replayed_documents
from tcsae.evaluate.temporal import PRIMARY_METRIC, metric_name
from tcsae.evaluate.truth_table import truth_lines
from tcsae.evaluate.unlearning_table import unlearning_lines

TABLE_LAG = 8
"""Lag, in tokens, of the autocorrelation and the excess information that the table shows."""

_OF_H = metric_name("H", TABLE_LAG)

_ALWAYS = {"explained_variance", metric_name("whole", TABLE_LAG)}
"""What the core and the temporal suite give of every SAE, were it undefined: without them no column has a figure."""


def table(evaluation: Evaluation) -> str:
    """One line an SAE with 95 % intervals over documents, then one a comparison with a control."""
    measured = {name for row in evaluation.rows for name in row.estimates}
    lines = fitting(evaluation.rows, _COLUMNS, _SPARED) if measured & _ALWAYS else []
    lines += textwrap.wrap(_note(evaluation), WIDTH)
    lines += probe_lines(evaluation.rows)
    lines += truth_lines(evaluation, TABLE_LAG)
    for comparison in evaluation.comparisons if _OF_H in measured else ():
        lines += wrapped(_compared(comparison))
    for line in unlearning_lines(evaluation.rows):
        lines += wrapped(line)
    return "\n".join(line.rstrip() for line in lines)


def _note(evaluation: Evaluation) -> str:
    """What the figures rest on and, of the columns that are there, what they mean."""
    conditions, rows = evaluation.conditions, evaluation.rows
    if conditions.get("tokens_sha256"):
        n = conditions["n_documents"]
        return (
            f"{n} row{'' if n == 1 else 's'}; in brackets 95 % bootstrap intervals over rows. All figures: the model "
            "replayed on them."
        )
    measured = {name for row in rows for name in row.estimates}
    replayed = replayed_documents(rows)
    n_outliers = sum(conditions.get("n_outliers_left_out", {}).values())
    left_out = f" ({n_outliers} outlier rows left out)" if n_outliers else ""
    text = documents_text(conditions["n_documents"], conditions["split"])
    note = f"{text}; in brackets 95 % bootstrap intervals over documents."
    if replayed is not None:
        note += (
            f" Loss recovered and KL: model replayed with the SAE spliced in, on {replayed} of them; the rest: stored "
            f"activations{left_out}."
        )
    elif measured & _ALWAYS:
        note += f" All figures: stored activations{left_out}."
    if metric_name("whole", TABLE_LAG) in measured:
        note += (
            f" Means over live features at lag {TABLE_LAG}, H: over those of block H: ac{TABLE_LAG}, autocorrelation; "
            f"xi{TABLE_LAG}, excess of the normalised mutual information over both its nulls."
        )
    if any(one.value is None for row in rows for name, one in row.estimates.items() if name in _SHOWN):
        note += " What is undefined is a dash or has no column; summary.json says why."
    return note


_SHOWN = {
    *("l0", "l0_H", "dead_fraction", "explained_variance", "mse_per_dimension", "loss_recovered", "kl_score"),
    *(metric_name("whole", TABLE_LAG), metric_name("whole", TABLE_LAG, PRIMARY_METRIC)),
    *(_OF_H, metric_name("H", TABLE_LAG, PRIMARY_METRIC)),
}
"""Metrics of the columns."""

_COLUMNS: Columns = (
    *NAMES,
    ("L0", lambda row: value(row, "l0", ".1f")),
    ("L0 H", lambda row: value(row, "l0_H", ".1f")),
    ("dead", lambda row: value(row, "dead_fraction", ".1%")),
    ("EV", lambda row: with_interval(row, "explained_variance", ".3f")),
    ("MSE/d", lambda row: value(row, "mse_per_dimension", ".3g")),
    ("loss rec.", lambda row: with_interval(row, "loss_recovered", ".3f")),
    ("KL score", lambda row: value(row, "kl_score", ".3f")),
    (f"ac{TABLE_LAG}", lambda row: value(row, metric_name("whole", TABLE_LAG), ".4f")),
    (f"ac{TABLE_LAG} H", lambda row: with_interval(row, metric_name("H", TABLE_LAG), ".4f")),
    (
        f"xi{TABLE_LAG}",
        lambda row: with_interval(row, metric_name("whole", TABLE_LAG, PRIMARY_METRIC), ".4f"),
    ),
    (f"xi{TABLE_LAG} H", lambda row: value(row, metric_name("H", TABLE_LAG, PRIMARY_METRIC), ".4f")),
)

_SPARED = ("MSE/d", f"ac{TABLE_LAG}", "L0 H", "KL score", "dead", f"xi{TABLE_LAG} H", "L0")
"""Columns left out, in this order, where the table would be too wide."""


def _compared(comparison: Comparison) -> str:
    metric = _OF_H
    head = f"{cut(comparison.sae, 24)} against {cut(comparison.control, 24)}: ac{TABLE_LAG} of H "
    ratio = comparison.estimates.get(f"{metric}_ratio")
    difference = comparison.estimates.get(f"{metric}_difference")
    parts = []
    if ratio is not None and ratio.value is not None:
        parts.append(f"ratio {figure(ratio, '.1f')}")
    if difference is not None and difference.value is not None:
        parts.append(f"difference {figure(difference, '.4f')}")
    of_h = metric_name("H", TABLE_LAG, PRIMARY_METRIC)
    information = [
        f"{name} {figure(found, '.4f')}"
        for name, key in (
            ("whole", f"{metric_name('whole', TABLE_LAG, PRIMARY_METRIC)}_difference"),
            ("H", f"{of_h}_difference"),
            ("H against the control's best block", f"{of_h}_against_best_difference"),
        )
        if (found := comparison.estimates.get(key)) is not None and found.value is not None
    ]
    shown = f"; xi{TABLE_LAG} difference: {', '.join(information)}" if information else ""
    return head + (", ".join(parts) or ABSENT) + shown
