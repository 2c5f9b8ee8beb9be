"""``final_metrics.png``: the figure of the source document, three bar plots of the arms."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.evaluate.estimates import Draws
from tcsae.evaluate.intervals import interval
from tcsae.evaluate.summary import Row
from tcsae.train.figure_style import SMALL, colour, explain, hatch, one_column, save_png, title_place

ROOMY = 4
"""Arms up to which there may be room for each bar's figure above it."""

FORMS = (".3g", ".2g")
"""Of the figures above the bars: the first that there is room for, else none."""

MOST_LABEL = 20
"""Characters of all arms' names together that may fit below the bars; others stand in a legend, by number."""


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
    Panel("kl_sae", "KL Divergence", "KL to clean model (nats)", "lower is better"),
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
    """Draw the three subplots of ``rows`` and write them to ``path`` as PNG, whole or not at all."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    draw_final({panel.metric: bars_of(rows, panel.metric) for panel in PANELS}, arms, path, caption)


def draw_final(bars: Mapping[str, Sequence[Bar]], arms: Sequence[str], path: Path, caption: str) -> None:
    """Draw the three subplots from finished bars, those of each panel's metric, in the order of ``arms``."""
    if sum(map(len, arms)) > MOST_LABEL or not _draw_final(bars, arms, path, caption, numbered=False):
        _draw_final(bars, arms, path, caption, numbered=True)


def _draw_final(
    bars: Mapping[str, Sequence[Bar]], arms: Sequence[str], path: Path, caption: str, *, numbered: bool
) -> bool:
    """As `draw_final`; False, and nothing written, if the arms' names do not fit below their bars."""
    from matplotlib.patches import Patch

    with one_column(46.0) as figure:
        panels = figure.subplots(1, len(PANELS))
        figures = [
            _draw(axes, panel, bars[panel.metric], arms, numbered=numbered)
            for axes, panel in zip(panels, PANELS, strict=True)
        ]
        labels = [f"{at + 1}  {arm}" for at, arm in enumerate(arms)] if numbered else []
        handles = [
            Patch(facecolor=colour(at), hatch=hatch(at), edgecolor="black", linewidth=0.4)
            for at in range(len(labels))
        ]
        explain(figure, handles, labels, caption)
        figure.draw_without_rendering()
        if not numbered and any(_meet(axes.get_xticklabels()) for axes in panels):
            return False
        for axes, texts in zip(panels, figures, strict=True):
            _make_fit(figure, axes, texts)
        save_png(figure, path)
        return True


def _meet(texts: Sequence[Any]) -> bool:
    """Whether any of ``texts``, from left to right, reaches into the next one."""
    boxes = [text.get_window_extent() for text in texts]
    return any(a.padded(1).overlaps(b) for a, b in itertools.pairwise(boxes))


def _make_fit(figure: Any, axes: Any, texts: Mapping[Any, float]) -> None:
    """Write the figures above the bars in the first form that there is room for, or take them away."""
    for form in FORMS:
        for text, value in texts.items():
            text.set_text(format(value, form))
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in texts]
        if not _meet(list(texts)) and all(axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1 for box in boxes):
            return
    for text in texts:
        text.remove()


def _draw(
    axes: Any, panel: Panel, bars: Sequence[Bar], arms: Sequence[str], *, numbered: bool
) -> dict[Any, float]:
    """Draw a panel; gives the texts above the bars, from left to right, with what they say."""
    axes.set_title(panel.title, loc=title_place(panel.title))
    axes.set_ylabel(f"{panel.axis}\n({panel.better})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.yaxis.grid(True, color="#dddddd")
    for bar in bars:
        at = arms.index(bar.arm)
        axes.bar(
            at,
            bar.value,
            width=0.68,
            color=colour(at),
            hatch=hatch(at),
            edgecolor="black",
            linewidth=0.4,
            yerr=[[max(bar.value - bar.low, 0.0)], [max(bar.high - bar.value, 0.0)]],
            capsize=min(2.0, 12 / len(arms)),
            error_kw={"linewidth": 0.6, "capthick": 0.6},
        )
        if len(bar.seeds) > 1:
            spread = at + np.linspace(-0.2, 0.2, len(bar.seeds))
            axes.plot(
                spread,
                bar.seeds,
                "o",
                markersize=1.3,
                color="white",
                markeredgecolor="black",
                markeredgewidth=0.3,
            )
    _limits(axes, panel, bars)
    figures = {}
    for bar in bars if len(arms) <= ROOMY else ():
        upward = bar.value >= 0
        top = max((bar.high, *bar.seeds)) if upward else min((bar.low, *bar.seeds))
        text = axes.annotate(
            format(bar.value, FORMS[0]),
            (arms.index(bar.arm), top),
            xytext=(0, 1.5 if upward else -1.5),
            textcoords="offset points",
            ha="center",
            va="bottom" if upward else "top",
            fontsize=SMALL,
        )
        figures[text] = bar.value
    every = 1 if len(arms) <= 2 * ROOMY else -(-len(arms) // (2 * ROOMY))
    shown = range(0, len(arms), every)
    axes.set_xticks(shown, [str(at + 1) if numbered else arms[at] for at in shown])
    axes.set_xlabel("model variant")
    axes.set_xlim(-0.6, len(arms) - 0.4)
    return figures


def _limits(axes: Any, panel: Panel, bars: Sequence[Bar]) -> None:
    """The y range, with room for the figures above and below the bars."""
    lowest = min((min(bar.low, bar.value, *bar.seeds) for bar in bars), default=0.0)
    highest = max((max(bar.high, bar.value, *bar.seeds) for bar in bars), default=1.0)
    if panel.metric == "explained_variance":
        # the source document's range; the margin keeps the figures clear of the frame
        axes.set_ylim(min(-1.0, 1.15 * lowest), max(1.0, highest) + 0.15)
        if lowest >= -1.0:
            axes.set_yticks(np.arange(-1.0, 1.01, 0.5))
        axes.axhline(0.0, color="black", linewidth=0.5)
    else:
        axes.set_ylim(min(0.0, 1.15 * lowest), 1.15 * highest if highest > 0 else 1.0)
