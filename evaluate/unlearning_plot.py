"""``unlearning.png``: what forgetting costs, one panel a forget domain, read from the suite's files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.evaluate.unlearning.score import RETAIN_LIMIT
from tcsae.store.atomic import write_atomically
from tcsae.store.errors import RunError
from tcsae.train.figure_style import colour

WIDTH = 3.5
"""Inches: one column of a paper."""


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
    dot for each setting. Both axes are linear up to the limit of the retain domain's rise or five times it,
    logarithmic beyond.
    """
    # The figure's own canvas, not pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    topics = list(dict.fromkeys(row.topic for row in rows))
    arms = list(dict.fromkeys(row.arm for row in rows))
    colour_of = {arm: colour(at) for at, arm in enumerate(arms)}
    n_legend = 2 + len(arms)
    lines = _wrapped(caption)
    height = 2.1 * max(len(topics), 1) + 0.18 * (-(-n_legend // 2)) + 0.12 * len(lines) + 0.35
    figure = Figure(figsize=(WIDTH, height), dpi=220, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(topics), 1), 1, sharex=True, squeeze=False)[:, 0]
    for axes, topic in zip(panels, topics, strict=False):
        _draw(axes, topic, [row for row in rows if row.topic == topic], colour_of)
    panels[-1].set_xlabel("rise on the retain domain (nats per token)", fontsize=7)
    handles = [Line2D([], [], color=colour, label=arm) for arm, colour in colour_of.items()]
    handles += [
        Line2D([], [], color="#555555", linestyle=(0, (1, 1.5)), label="random features (control)"),
        Line2D([], [], color="black", linewidth=0.8, linestyle="--", label=f"limit, {RETAIN_LIMIT} nats"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=6.5, frameon=False)
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=5.5, color="#444444")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def _wrapped(caption: str) -> list[str]:
    import textwrap

    return textwrap.wrap(caption, 84)


def _draw(axes: Any, topic: str, rows: Sequence[UnlearningRow], colour_of: dict[str, str]) -> None:
    axes.set_title(f"forget: {topic}  ({rows[0].n_documents} documents)", fontsize=7.5, loc="left")
    axes.set_ylabel("rise on the forget\ndomain (nats per token)", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=6.5)
    axes.set_axisbelow(True)
    axes.grid(True, color="#e4e4e4", linewidth=0.5)
    highest = max(1.0, *(row.forget_rise for row in rows))
    furthest = max(1.0, *(row.retain_rise for row in rows))
    axes.set_xscale("symlog", linthresh=RETAIN_LIMIT, linscale=0.8)
    axes.set_yscale("symlog", linthresh=5 * RETAIN_LIMIT, linscale=0.5)
    _ticks(axes.xaxis, (0.0, 0.01, RETAIN_LIMIT, 0.1, 1.0, 10.0), furthest)
    _ticks(axes.yaxis, (0.0, 0.1, 1.0, 10.0), highest)
    axes.axvline(RETAIN_LIMIT, color="black", linewidth=0.8, linestyle="--")
    for sae in dict.fromkeys(row.sae for row in rows):
        of_sae = [row for row in rows if row.sae == sae]
        colour = colour_of[of_sae[0].arm]
        for kind, style, size in (("selected", "-", 5.0), ("control", (0, (1, 1.5)), 2.5)):
            ones = [row for row in of_sae if row.kind == kind]
            x, y = frontier(ones)
            axes.step(
                [*x, 2 * furthest], [*y, y[-1]], where="post", color=colour, linestyle=style, linewidth=1.1
            )
            axes.scatter(
                [row.retain_rise for row in ones],
                [row.forget_rise for row in ones],
                s=size,
                color=colour,
                alpha=0.55,
                linewidths=0,
                marker="o" if kind == "selected" else "s",
            )
    axes.set_xlim(-0.0035, 1.6 * furthest)
    axes.set_ylim(-0.02, 1.6 * highest)


def _ticks(axis: Any, candidates: Sequence[float], largest: float) -> None:
    """Round figures up to ``largest`` as the only ticks, so that no labels run into each other."""
    shown = [tick for tick in candidates if tick <= 1.6 * largest]
    axis.set_ticks(shown, labels=[f"{tick:g}" for tick in shown])
    axis.set_ticks(np.array([]), minor=True)
