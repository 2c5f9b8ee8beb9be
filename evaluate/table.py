"""The results as a table for a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from tcsae.evaluate.estimates import Estimate
from tcsae.evaluate.probe_figures import probe_name
from tcsae.evaluate.probe_samples import CONTEXT_TASKS, TOKEN_TASKS
from tcsae.evaluate.summary import Comparison, Evaluation, Row, replayed_documents
from tcsae.evaluate.temporal import PRIMARY_METRIC, metric_name
from tcsae.evaluate.truth_ranking import ranking_lines

WIDTH = 120
"""Columns that the table keeps to; long names are cut with an ellipsis, figures never."""

TABLE_LAG = 8
"""Lag, in tokens, of the autocorrelation and the excess information that the table shows."""

ABSENT = "-"


def table(evaluation: Evaluation) -> str:
    """One line an SAE with 95 % intervals over documents, then one a comparison with a control."""
    lines = _fitting(evaluation.rows)
    conditions = evaluation.conditions
    replayed = replayed_documents(evaluation.rows)
    n_outliers = sum(conditions.get("n_outliers_left_out", {}).values())
    left_out = f" ({n_outliers} outlier rows left out)" if n_outliers else ""
    if conditions.get("tokens_sha256"):
        unit, text = "rows", f"{conditions['n_documents']} rows"
        sources = "All figures: the model replayed on them."
    else:
        unit, text = "documents", f"{conditions['n_documents']} {conditions['split']} documents"
        replay = f"Loss recovered and KL: model replayed with the SAE spliced in, on {replayed} of them; the rest: "
        sources = (
            f"{replay if replayed is not None else ''}stored activations{left_out}. "
            f"Means over live features at lag {TABLE_LAG}, H: over those of block H: ac{TABLE_LAG}, autocorrelation; "
            f"xi{TABLE_LAG}, excess of the normalised mutual information over both its nulls."
        )
    note = f"{text}; in brackets 95 % bootstrap intervals over {unit}. {sources}"
    lines += textwrap.wrap(note, WIDTH)
    lines += _truth(evaluation)
    lines += _probes(evaluation)
    for comparison in evaluation.comparisons:
        # a minus sign is no hyphen to break at
        lines += textwrap.wrap(_compared(comparison), WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(line.rstrip() for line in lines)


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("arm", lambda row: _cut(row.arm, 20)),
    ("seed", lambda row: ABSENT if row.seed is None else str(row.seed)),
    ("L0", lambda row: _value(row, "l0", ".1f")),
    ("L0 H", lambda row: _value(row, "l0_H", ".1f")),
    ("dead", lambda row: _value(row, "dead_fraction", ".1%")),
    ("EV", lambda row: _with_interval(row, "explained_variance", ".3f")),
    ("MSE/d", lambda row: _value(row, "mse_per_dimension", ".3g")),
    ("loss rec.", lambda row: _with_interval(row, "loss_recovered", ".3f")),
    ("KL score", lambda row: _value(row, "kl_score", ".3f")),
    (f"ac{TABLE_LAG}", lambda row: _value(row, metric_name("whole", TABLE_LAG), ".4f")),
    (f"ac{TABLE_LAG} H", lambda row: _with_interval(row, metric_name("H", TABLE_LAG), ".4f")),
    (
        f"xi{TABLE_LAG}",
        lambda row: _with_interval(row, metric_name("whole", TABLE_LAG, PRIMARY_METRIC), ".4f"),
    ),
    (f"xi{TABLE_LAG} H", lambda row: _value(row, metric_name("H", TABLE_LAG, PRIMARY_METRIC), ".4f")),
)


def _truth(evaluation: Evaluation) -> list[str]:
    """The truth suite's figures in a table of their own, and what they say of the temporal metrics."""
    rows = [row for row in evaluation.rows if "recovered" in row.estimates]
    if not rows:
        return []
    cells = [
        [head for head, _ in _TRUTH_COLUMNS],
        *([cell(row) for _, cell in _TRUTH_COLUMNS] for row in rows),
    ]
    note = (
        "Against the known dictionary: true features recovered (cosine > 0.9), the share of recovered slow and of "
        "recovered fast ones whose best match is in block H (chance: H's share of the live features), purity: share "
        "of H's matched features that are slow, F1 of firing over matched pairs. In brackets 95 % bootstrap intervals: "
        "over true features, the SAE's features, and (F1) documents."
    )
    lines = ["", *_aligned(cells), *textwrap.wrap(note, WIDTH)]
    for line in ranking_lines(() if evaluation.ranking is None else evaluation.ranking.over_saes, TABLE_LAG):
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _probes(evaluation: Evaluation) -> list[str]:
    """The probing suite's figures in a table of their own."""
    chance = {
        task: row.estimates[f"probe_{task}_chance"].value
        for row in evaluation.rows
        for task in _PROBED_TASKS
        if f"probe_{task}_chance" in row.estimates
    }
    if not chance:
        return []
    chance = {task: chance.get(task) for task in _PROBED_TASKS}
    cells = [
        ["arm", "seed", *(task.replace("_", " ") for task in _PROBED_TASKS), "topic L", "source L"],
        [
            "chance",
            ABSENT,
            *(ABSENT if (c := chance[task]) is None else f"{c:.2f}" for task in _PROBED_TASKS),
            *"--",
        ],
        *(
            [
                _cut(row.arm, 20),
                ABSENT if row.seed is None else str(row.seed),
                *(_with_interval(row, probe_name(task, "H", 20), ".2f") for task in _PROBED_TASKS),
                *(_value(row, probe_name(task, "L", 20), ".2f") for task in _PROBED_TASKS[:2]),
            ]
            for row in evaluation.rows
        ),
    ]
    note = (
        "Probes of 20 features of block H (of the rest, L, in the last columns): balanced accuracy on documents that "
        "neither the probe nor the SAE has seen. Position, token and the token before are short cuts: H should read "
        "them no better than the control's H."
    )
    return ["", *_aligned(cells), *textwrap.wrap(note, WIDTH)]


_PROBED_TASKS = (*CONTEXT_TASKS, *TOKEN_TASKS)

_TRUTH_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("arm", lambda row: _cut(row.arm, 20)),
    ("seed", lambda row: ABSENT if row.seed is None else str(row.seed)),
    ("recovered", lambda row: _with_interval(row, "recovered", ".2f")),
    ("slow in H", lambda row: _with_interval(row, "slow_in_H", ".2f")),
    ("fast in H", lambda row: _with_interval(row, "fast_in_H", ".2f")),
    ("chance", lambda row: _value(row, "share_of_H", ".2f")),
    ("purity H", lambda row: _with_interval(row, "purity_H", ".2f")),
    ("F1", lambda row: _with_interval(row, "f1", ".2f")),
)

_SPARED = ("MSE/d", f"ac{TABLE_LAG}", "L0 H", "KL score", "dead", f"xi{TABLE_LAG} H", "L0")
"""Columns left out, in this order, where the table would be too wide."""


def _fitting(rows: Sequence[Row]) -> list[str]:
    """The aligned table without as many of `_SPARED` as it takes to fit."""
    for n_spared in range(len(_SPARED) + 1):
        columns = [column for column in _COLUMNS if column[0] not in _SPARED[:n_spared]]
        lines = _aligned(
            [[head for head, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]
        )
        if max(map(len, lines)) <= WIDTH:
            break
    return lines


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _value(row: Row, metric: str, form: str) -> str:
    estimate = row.estimates.get(metric)
    return ABSENT if estimate is None or estimate.value is None else format(estimate.value, form)


def _with_interval(row: Row, metric: str, form: str) -> str:
    estimate = row.estimates.get(metric)
    return ABSENT if estimate is None else _figure(estimate, form)


def _figure(estimate: Estimate, form: str) -> str:
    """``0.785 [.779, .791]``; the leading zero of the ends is left out to save room.

    >>> _figure(Estimate("ev", "1", 0.5, -0.25, 0.75, 9, "bca", None), ".2f")
    '0.50 [-.25,.75]'
    """
    if estimate.value is None:
        return ABSENT
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, form)
    ends = [format(end, form) for end in (estimate.low, estimate.high)]
    short = [end.replace("0.", ".", 1) if end.lstrip("-").startswith("0.") else end for end in ends]
    return f"{format(estimate.value, form)} [{','.join(short)}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
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


def _compared(comparison: Comparison) -> str:
    metric = metric_name("H", TABLE_LAG)
    head = f"{_cut(comparison.sae, 24)} against {_cut(comparison.control, 24)}: ac{TABLE_LAG} of H "
    ratio = comparison.estimates.get(f"{metric}_ratio")
    difference = comparison.estimates.get(f"{metric}_difference")
    parts = []
    if ratio is not None and ratio.value is not None:
        parts.append(f"ratio {_figure(ratio, '.1f')}")
    if difference is not None and difference.value is not None:
        parts.append(f"difference {_figure(difference, '.4f')}")
    of_h = metric_name("H", TABLE_LAG, PRIMARY_METRIC)
    information = [
        f"{name} {_figure(found, '.4f')}"
        for name, key in (
            ("whole", f"{metric_name('whole', TABLE_LAG, PRIMARY_METRIC)}_difference"),
            ("H", f"{of_h}_difference"),
            ("H against the control's best block", f"{of_h}_against_best_difference"),
        )
        if (found := comparison.estimates.get(key)) is not None and found.value is not None
    ]
    shown = f"; xi{TABLE_LAG} difference: {', '.join(information)}" if information else ""
    return head + (", ".join(parts) or ABSENT) + shown
