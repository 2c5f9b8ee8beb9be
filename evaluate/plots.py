"""``final_metrics.png``: the figure of the source document, three bar plots of the arms."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.evaluate.estimates import Draws
from tcsae.evaluate.intervals import interval
from tcsae.evaluate.summary import Row
from tcsae.store.atomic import write_atomically

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Colours that stay apart for colour-blind readers; arms beyond the eighth begin again, hatched."""

HATCHES = ("", "///", "...", "xxx")


class Panel(NamedTuple):
    """One subplot."""

    metric: str
    """whose bars"""
    title: str
    """above"""
    axis: str
    """label of the y axis"""
    better: str
    """which way is better"""


PANELS = (
    Panel("explained_variance", "Explained Variance", "explained variance ratio", "higher is better"),
    Panel("mse_per_dimension", "Mean Squared Error", "squared error per dimension", "lower is better"),
    Panel("kl_sae", "KL Divergence", "KL to the clean model (nats per token)", "lower is better"),
)


class Bar(NamedTuple):
    """One arm in one subplot."""

    arm: str
    """label"""
    value: float
    """mean over the arm's seeds"""
    low: float
    """lower end of the interval over documents; ``value`` where there is none"""
    high: float
    """upper end"""
    seeds: tuple[float, ...]
    """value of each seed"""


def bars_of(rows: Sequence[Row], metric: str) -> list[Bar]:
    """One bar an arm, in the order of ``rows``; arms without the metric are left out.

    The seeds of an arm saw the same resamples of documents, so the mean of their draws is a draw of their
    mean; the interval is over documents, the spread over seeds is shown by the seeds themselves.
    """
    of_arm: dict[str, list[Draws]] = {}
    lone: dict[str, list[float]] = {}
    for row in rows:
        estimate = row.estimates.get(metric)
        if estimate is None or estimate.value is None:
            continue
        lone.setdefault(row.arm, []).append(estimate.value)
        if metric in row.draws:
            of_arm.setdefault(row.arm, []).append(row.draws[metric])
    bars = []
    for arm, values in lone.items():
        mean, draws = float(np.mean(values)), of_arm.get(arm, [])
        low, high = mean, mean
        if len(draws) == len(values):
            found = interval(
                mean,
                np.mean([one.draws for one in draws], axis=0),
                np.mean([one.leave_one_out for one in draws], axis=0),
            )
            if found.low is not None and found.high is not None:
                low, high = found.low, found.high
        bars.append(Bar(arm, mean, low, high, tuple(values)))
    return bars


def final_metrics(rows: Sequence[Row], path: Path, caption: str) -> None:
    """Draw the three subplots and write them to ``path`` as PNG, whole or not at all."""
    # The figure's own canvas, not pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(row.arm for row in rows))
    figure = Figure(figsize=(max(10.5, 3 + 1.7 * len(arms)), 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw(axes, panel, bars_of(rows, panel.metric), arms)
    figure.supxlabel(caption, fontsize=8, color="#444444")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def _draw(axes: Any, panel: Panel, bars: Sequence[Bar], arms: Sequence[str]) -> None:
    axes.set_title(panel.title, fontsize=12)
    axes.set_ylabel(f"{panel.axis}\n({panel.better})", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.set_axisbelow(True)
    axes.yaxis.grid(True, color="#dddddd", linewidth=0.6)
    for bar in bars:
        at = arms.index(bar.arm)
        axes.bar(
            at,
            bar.value,
            width=0.62,
            color=OKABE_ITO[at % len(OKABE_ITO)],
            hatch=HATCHES[at // len(OKABE_ITO) % len(HATCHES)],
            edgecolor="black",
            linewidth=0.6,
            yerr=[[max(bar.value - bar.low, 0.0)], [max(bar.high - bar.value, 0.0)]],
            capsize=4,
            error_kw={"linewidth": 1.2},
        )
        if len(bar.seeds) > 1:
            spread = at + np.linspace(-0.15, 0.15, len(bar.seeds))
            axes.plot(spread, bar.seeds, "o", markersize=3.5, color="white", markeredgecolor="black")
    _limits(axes, panel, bars)
    for bar in bars:
        upward = bar.value >= 0
        top = max((bar.high, *bar.seeds)) if upward else min((bar.low, *bar.seeds))
        axes.annotate(
            f"{bar.value:.3g}",
            (arms.index(bar.arm), top),
            xytext=(0, 3 if upward else -3),
            textcoords="offset points",
            ha="center",
            va="bottom" if upward else "top",
            fontsize=8.5,
        )
    longest = max((len(arm) for arm in arms), default=0)
    tilted = longest * len(arms) > 30
    axes.set_xticks(
        range(len(arms)),
        arms,
        rotation=30 if tilted else 0,
        ha="right" if tilted else "center",
        rotation_mode="anchor" if tilted else "default",
    )
    axes.set_xlim(-0.6, len(arms) - 0.4)


def _limits(axes: Any, panel: Panel, bars: Sequence[Bar]) -> None:
    """The y range, with room for the figures above and below the bars."""
    lowest = min((min(bar.low, bar.value, *bar.seeds) for bar in bars), default=0.0)
    highest = max((max(bar.high, bar.value, *bar.seeds) for bar in bars), default=1.0)
    if panel.metric == "explained_variance":
        # the source document's range; the margin keeps the figures clear of the frame
        axes.set_ylim(min(-1.0, 1.15 * lowest), max(1.0, highest) + 0.12)
        if lowest >= -1.0:
            axes.set_yticks(np.arange(-1.0, 1.01, 0.5))
        axes.axhline(0.0, color="black", linewidth=0.8)
    else:
        axes.set_ylim(min(0.0, 1.15 * lowest), 1.15 * highest if highest > 0 else 1.0)
