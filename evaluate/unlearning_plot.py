"""``unlearning.png``: what forgetting costs, one panel a forget domain, read from the suite's files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.evaluate.unlearning.score import RETAIN_LIMIT
from tcsae.store.errors import RunError
from tcsae.train.figure_style import colour, explain, marker, one_column, save_png

PANEL_MM = 42.0
"""height of a topic's panel"""

CONTROL_DASH = (0, (1, 1.5))
"""of lines of random features"""


class UnlearningRow(NamedTuple):
    """One setting of one SAE."""

    sae: str
    """unique name"""
    arm: str
    """kind of SAE; gives the colour"""
    topic: str
    """forget domain; gives the panel"""
    kind: str
    """``selected`` features or ``control``"""
    forget_rise: float
    """of the forget domain's cross-entropy, in nats"""
    retain_rise: float
    """of the retain domain's"""
    n_documents: int
    """documents of both domains"""


def read_unlearning_rows(paths: Iterable[Path]) -> list[UnlearningRow]:
    """Every setting that clamps anything, from files of the suite (``unlearning/<sae>.json``).

    Raises
    ------
    RunError
        a file is not one of the suite's
    """
    rows = []
    for path in paths:
        try:
            ours = json.loads(path.read_bytes())["eval_result_unstructured"]["tcsae"]
            rows += [
                UnlearningRow(
                    ours["sae"]["name"],
                    ours["sae"]["arm"],
                    topic["topic"],
                    setting["kind"],
                    setting["forget_rise"],
                    setting["retain_rise"],
                    sum(domain["n_documents"] for domain in topic["domains"].values()),
                )
                for topic in ours["topics"]
                for setting in topic["settings"]
                if setting["n_used"] and None not in (setting["forget_rise"], setting["retain_rise"])
            ]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: not a result of --suite unlearning ({error}); measure again") from error
    return rows


def frontier(rows: Sequence[UnlearningRow]) -> tuple[list[float], list[float]]:
    """Retain rises and, for each, the largest forget rise that costs no more: a rising staircase.

    Begins at the untouched model, (0, 0); settings that cost less than nothing stand there too.
    """
    x, y = [0.0], [0.0]
    for row in sorted(rows, key=lambda row: (max(row.retain_rise, 0.0), -row.forget_rise)):
        if row.forget_rise > y[-1]:
            x.append(max(row.retain_rise, 0.0))
            y.append(row.forget_rise)
    return x, y


def unlearning_figure(rows: Sequence[UnlearningRow], path: Path, caption: str = "") -> None:
    """Draw a panel a topic, one below the other, and write them to ``path`` as PNG, whole or not at all.

    Each SAE has the staircase of its best settings (solid) and that of its random controls (dotted), and a
    point for each setting. Both axes are linear near 0, that of the retain domain up to its limit, and
    logarithmic beyond.
    """
    from matplotlib.lines import Line2D

    topics = list(dict.fromkeys(row.topic for row in rows))
    arms = list(dict.fromkeys(row.arm for row in rows))
    with one_column(PANEL_MM * max(len(topics), 1) + 4.0) as figure:
        panels = figure.subplots(max(len(topics), 1), 1, sharex=True, squeeze=False)[:, 0]
        for axes, topic in zip(panels, topics, strict=False):
            _draw(axes, topic, [row for row in rows if row.topic == topic], arms)
        panels[-1].set_xlabel("rise on the retain domain (nats per token)")
        handles = [
            Line2D([], [], color=colour(at), marker=marker(at), markersize=2.5) for at in range(len(arms))
        ]
        handles += [
            Line2D([], [], color="#555555", linestyle=CONTROL_DASH),
            Line2D([], [], color="black", linewidth=0.6, linestyle="--"),
        ]
        labels = [*arms, "random features (control)", f"limit, {RETAIN_LIMIT} nats"]
        explain(figure, handles, labels, caption)
        save_png(figure, path)


def _draw(axes: Any, topic: str, rows: Sequence[UnlearningRow], arms: Sequence[str]) -> None:
    # a dollar would begin a formula
    name = topic.replace("$", r"\$")
    axes.set_title(f"forget: {name} ({rows[0].n_documents} documents)", loc="left")
    axes.set_ylabel("rise on the forget\ndomain (nats per token)")
    axes.set_axisbelow(True)
    axes.grid(True, color="#e4e4e4", linewidth=0.4)
    highest = max(1.0, *(row.forget_rise for row in rows))
    furthest = max(1.0, *(row.retain_rise for row in rows))
    axes.set_xscale("symlog", linthresh=RETAIN_LIMIT, linscale=0.8)
    axes.set_yscale("symlog", linthresh=5 * RETAIN_LIMIT, linscale=0.5)
    _ticks(axes.xaxis, (0.0, 0.01, RETAIN_LIMIT, 0.1, 1.0, 10.0), furthest)
    _ticks(axes.yaxis, (0.0, 0.1, 1.0, 10.0), highest)
    axes.axvline(RETAIN_LIMIT, color="black", linewidth=0.6, linestyle="--")
    for sae in dict.fromkeys(row.sae for row in rows):
        of_sae = [row for row in rows if row.sae == sae]
        at = arms.index(of_sae[0].arm)
        for kind, style, size in (("selected", "-", 4.0), ("control", CONTROL_DASH, 2.0)):
            ones = [row for row in of_sae if row.kind == kind]
            x, y = frontier(ones)
            axes.step(
                [*x, 2 * furthest],
                [*y, y[-1]],
                where="post",
                color=colour(at),
                linestyle=style,
                linewidth=0.9,
            )
            points = [(row.retain_rise, row.forget_rise) for row in ones]
            axes.scatter(
                [retain for retain, _ in points],
                [forget for _, forget in points],
                s=size,
                color=colour(at),
                marker=marker(at),
                alpha=0.6,
                linewidths=0,
            )
    axes.set_xlim(-0.0035, 1.6 * furthest)
    axes.set_ylim(-0.02, 1.6 * highest)


def _ticks(axis: Any, candidates: Sequence[float], largest: float) -> None:
    """Round figures up to ``largest`` as the only ticks, so that no labels run into each other."""
    shown = [tick for tick in candidates if tick <= 1.6 * largest]
    axis.set_ticks(shown, labels=[f"{tick:g}" for tick in shown])
    axis.set_ticks(np.array([]), minor=True)
