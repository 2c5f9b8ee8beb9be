"""The comparison as tables of text, for reports and the terminal; `tcsae.evaluate.compare.lines` has all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tcsae.evaluate.compare.arms import Arm
from tcsae.evaluate.compare.bootstrap import ENOUGH_SEEDS
from tcsae.evaluate.compare.contrast import Contrast, Figure
from tcsae.evaluate.compare.features import MatchedFeatures
from tcsae.evaluate.compare.front import Point

ABSENT = "-"

HEADLINE = {
    "l0": "L0",
    "l0_H": "L0 of H",
    "fvu": "FVU",
    "loss_recovered": "loss recovered",
    "kl_sae": "KL (nats)",
    "excess_information_whole_lag8": "excess MI, lag 8",
    "excess_information_H_lag8": "of H",
    "autocorrelation_whole_lag8": "autocorrelation, lag 8",
    "autocorrelation_H_lag8": "of H",
}
"""Metrics of the first table, with their heads; all others are in arms.parquet and at the report's end."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, ready for any form."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a Markdown table; a name cannot break out of its cell."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def number(value: float | None) -> str:
    """Four figures, enough for any interval here.

    >>> number(0.0023456), number(31.07), number(None)
    ('0.002346', '31.07', '-')
    """
    return ABSENT if value is None else f"{value:.4g}"


def text_of(figure: Figure) -> str:
    """Value, interval and what the interval leaves out; or why there is none.

    >>> text_of(Figure(0.5, 0.25, 0.75, "bca", 3, "3 seeds, fewer than 5", None))
    '0.5 [0.25, 0.75] (3 seeds)'
    """
    if figure.value is None:
        return figure.reason or ABSENT
    few = ""
    if figure.n_seeds < ENOUGH_SEEDS:
        few = " (1 seed: documents only)" if figure.n_seeds == 1 else f" ({figure.n_seeds} seeds)"
    if figure.low is None:
        return f"{number(figure.value)} (no interval){few}"
    return f"{number(figure.value)} [{number(figure.low)}, {number(figure.high)}]{few}"


def seeds_text(seeds: Sequence[int | None]) -> str:
    """Seeds by their numbers.

    >>> seeds_text([0, 1, None])
    '0, 1, unknown'
    """
    return ", ".join("unknown" if seed is None else str(seed) for seed in seeds) or ABSENT


def arms_table(arms: Sequence[Arm], figures: Mapping[str, Mapping[str, Figure]]) -> Table:
    """One line an arm, the headline metrics with their intervals."""
    metrics = [name for name in HEADLINE if any(name in figures[arm.name] for arm in arms)]
    head = ("arm", "alpha", "k", "seeds", "training tokens", *(HEADLINE[name] for name in metrics))
    rows = []
    for arm in arms:
        tokens = ABSENT if arm.training_tokens is None else f"{arm.training_tokens:,}"
        cells = [
            text_of(figures[arm.name][name]) if name in figures[arm.name] else ABSENT for name in metrics
        ]
        alpha, k = ABSENT if arm.alpha is None else f"{arm.alpha:g}", ABSENT if arm.k is None else str(arm.k)
        rows.append((arm.name, alpha, k, seeds_text(tuple(arm.saes)), tokens, *cells))
    return Table(head, tuple(rows))


def contrasts_table(contrasts: Sequence[Contrast]) -> Table:
    """One line a comparison with all that it rests on."""
    head = (
        *("treated", "control", "metric", "difference", "treated at that L0", "control at that L0"),
        *("p", "p (Holm)", "equal L0", "L0", "L0 of H", "seeds", "documents", "tokens"),
    )
    return Table(
        head,
        tuple(
            (
                one.treated,
                f"{one.control} ({one.why})",
                _metric_text(one),
                text_of(one.difference),
                text_of(one.treated_figure),
                text_of(one.control_figure),
                p_text(one.p),
                p_text(one.p_holm),
                one.matching,
                _two(one.l0),
                _two(one.l0_block),
                seeds_text(one.seeds) + (f"; without {one.missing_seeds}" if one.missing_seeds else ""),
                str(one.n_documents),
                ABSENT if one.n_tokens is None else f"{one.n_tokens:,}",
            )
            for one in contrasts
        ),
    )


def _metric_text(one: Contrast) -> str:
    """The metric with its unit, and the control's where it is another."""
    against = "" if one.control_metric == one.metric else f" against {one.control_metric} of the control"
    return f"{one.metric}{against}" + ("" if one.unit in ("", "1") else f" ({one.unit})")


def tost_table(contrasts: Sequence[Contrast]) -> Table:
    """One line a test of non-inferiority."""
    head = (
        "treated",
        "control",
        "metric",
        "difference",
        "margin",
        "95 % bound",
        "p (inferior)",
        "non-inferior",
        "equal L0",
    )
    verdict = {True: "yes", False: "not shown", None: "not tested"}
    return Table(
        (*head, "seeds", "documents"),
        tuple(
            (
                one.treated,
                one.control,
                one.metric,
                text_of(one.difference),
                f"{one.margin:+g}",
                number(one.bound),
                p_text(one.p),
                verdict[one.holds],
                one.matching,
                seeds_text(one.seeds),
                str(one.n_documents),
            )
            for one in contrasts
        ),
    )


def p_text(p: float | None) -> str:
    """A p-value.

    >>> p_text(0.03456), p_text(1e-9), p_text(None)
    ('0.035', '< 0.0001', '-')
    """
    if p is None:
        return ABSENT
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _two(pair: tuple[float | None, float | None]) -> str:
    a, b = map(number, pair)
    return a if a == b else f"{a} / {b}"


def front_table(points: Sequence[Point], metric: str) -> Table:
    """One line an arm of the trade-off."""
    costs = [cost for cost in ("l0", "fvu") if any(cost in one.costs for one in points)]
    head = ("arm", "alpha", "k", metric, *costs, *(f"on the front against {cost}" for cost in costs))
    return Table(
        head,
        tuple(
            (
                one.arm,
                ABSENT if one.alpha is None else f"{one.alpha:g}",
                ABSENT if one.k is None else str(one.k),
                text_of(one.consistency),
                *(text_of(one.costs[cost]) if cost in one.costs else ABSENT for cost in costs),
                *({True: "yes", False: "no", None: ABSENT}[one.on_front.get(cost)] for cost in costs),
            )
            for one in points
        ),
    )


def features_table(found: Sequence[MatchedFeatures]) -> Table:
    """One line a pair of arms and column, or why there is none."""
    head = (
        "treated",
        "control",
        "match rate by seed",
        "moved between blocks",
        "column",
        "part of control",
        "change",
        "features",
    )
    rows = []
    for one in found:
        rates = (
            ", ".join(
                f"{rate:.1%} (seed {'?' if seed is None else seed})" for seed, rate in one.rates.items()
            )
            or ABSENT
        )
        moved = ", ".join(f"{way}: {n}" for way, n in one.moved.items()) or ABSENT
        rows += [
            (
                one.treated,
                one.control,
                rates,
                moved,
                change.column,
                change.part,
                text_of(change.change),
                str(change.n_features),
            )
            for change in one.changes
        ] or [(one.treated, one.control, rates, moved, one.reason or ABSENT, ABSENT, ABSENT, ABSENT)]
    return Table(head, tuple(rows))
