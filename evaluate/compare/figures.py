"""``tradeoff.png``, ``autocorrelation.png``, and the two figures of the source document over all arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullFormatter, NullLocator

from tcsae.evaluate.compare.arms import Arm
from tcsae.evaluate.compare.contrast import Figure, few_seeds
from tcsae.evaluate.compare.folders import Evaluated
from tcsae.evaluate.compare.front import COSTS, Point
from tcsae.evaluate.plots import PANELS, Bar, draw_final
from tcsae.evaluate.saved_tables import read_table
from tcsae.evaluate.subjects import digest_of
from tcsae.evaluate.temporal_codes import LAGS
from tcsae.evaluate.unlearning_plot import read_unlearning_rows, unlearning_figure
from tcsae.store.errors import TcsaeError
from tcsae.train.config import ArmConfig
from tcsae.train.figure_style import colour, dash, explain, marker, one_column, save_png
from tcsae.train.plots import draw_training
from tcsae.train.run import Run, own_config
from tcsae.train.saelens import load_sae

PARTS = ("whole", "H", "L")

CURVES = {"autocorrelation": "autocorrelation", "excess_information": "excess norm. MI"}
"""Figures over lags that are drawn, one row of panels each, where measured."""

AXES = {"l0": "L0 (features per token)", "fvu": "FVU (1 - explained variance)"}

Figures = Mapping[str, Mapping[str, Figure]]
"""Of each arm, by arm and metric."""


def errors_of(arms: Sequence[Arm]) -> str:
    """What the error bars are, for captions."""
    counts = sorted({len(arm.saes) for arm in arms})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts[-1] == 1:
        return "error bars: 95 % bootstrap intervals over documents only, 1 seed"
    few = "" if counts[0] >= 5 else f"; {few_seeds(counts[0])}"
    return f"error bars: 95 % two-level bootstrap intervals over {seeds} seeds and documents{few}"


def draw_bars(arms: Sequence[Arm], figures: Figures, path: Path, caption: str) -> None:
    """``final_metrics.png``: bars are means over seeds, dots the seeds."""
    bars: dict[str, list[Bar]] = {panel.metric: [] for panel in PANELS}
    for arm in arms:
        for panel in PANELS:
            figure = figures[arm.name].get(panel.metric)
            if figure is None or figure.value is None:
                continue
            low = figure.value if figure.low is None else figure.low
            high = figure.value if figure.high is None else figure.high
            values = [one.estimates[panel.metric].value for one in arm.saes.values()]
            seeds = tuple(value for value in values if value is not None)
            bars[panel.metric].append(Bar(arm.name, figure.value, low, high, seeds))
    dots = "; dots: seeds" if any(len(arm.saes) > 1 for arm in arms) else ""
    draw_final(bars, [arm.name for arm in arms], path, f"{caption}; {errors_of(arms)}{dots}")


def draw_training_of(arms: Sequence[Arm], path: Path) -> str | None:
    """``training_metrics.png`` from the runs that the SAEs are still in; what is missing, else None."""
    tables, configs, left_out = [], {}, []
    for arm in arms:
        found = []
        for one in arm.saes.values():
            logged = _logged(one)
            if logged is None:
                left_out.append(one.sae)
                continue
            lines, configs[arm.name] = logged
            found.append(
                lines.set_column(lines.column_names.index("arm"), "arm", pa.array([arm.name] * len(lines)))
            )
        if len({tuple(lines["step"].to_pylist()) for lines in found}) > 1:
            left_out.append(f"{arm.name} (its seeds were logged at different steps)")
            del configs[arm.name]
        else:
            tables += found
    if not tables:
        return "the run folders are not where, or not what, they were when the SAEs were evaluated"
    draw_training(pa.concat_tables(tables), configs, path, order=[arm.name for arm in arms])
    return f"without {', '.join(left_out)}: no run found, or not comparable" if left_out else None


def _logged(one: Evaluated) -> tuple[pa.Table, ArmConfig] | None:
    """What an SAE's run logged of it, and its arm's configuration; None where the run is not there any more."""
    if one.folder is None or one.seed is None:
        return None
    try:
        run = Run.open(one.folder.parent.parent)
        arms = {arm.name: arm for arm in own_config(run.path).arms}
        name = one.settings.get("name")
        if name not in arms or not run.metrics.is_file():
            return None
        if digest_of(load_sae(one.folder)) != one.origin["digest"]:
            return None  # trained anew since: these lines are of another SAE
        table = read_table(run.metrics)
    except TcsaeError:
        return None
    lines = table.filter(pc.and_(pc.equal(table["arm"], name), pc.equal(table["seed"], one.seed)))
    return (lines, arms[name]) if len(lines) else None


def draw_unlearning(arms: Sequence[Arm], path: Path, caption: str) -> None:
    """``unlearning.png``: the suite's own figure over all folders' SAEs."""
    rows = [
        row._replace(arm=arm.name, sae=f"{arm.name}-s{seed}")
        for arm in arms
        for seed, one in arm.saes.items()
        for row in read_unlearning_rows([one.out / "unlearning" / f"{one.sae}.json"])
    ]
    unlearning_figure(rows, path, caption)


def draw_tradeoff(points: Sequence[Point], metric: str, path: Path, caption: str) -> None:
    """``tradeoff.png``: consistency against L0 and against FVU, one point an arm, lines along alpha."""
    with one_column(46.0) as figure:
        panels = figure.subplots(1, len(COSTS), sharey=True)
        handles: dict[str, Any] = {}
        for axes, cost in zip(panels, COSTS, strict=True):
            shown = [(i, one) for i, one in enumerate(points) if cost in one.costs]
            for line in _along_alpha([one for _, one in shown]):
                x, y = zip(*((one.costs[cost].value, one.consistency.value) for one in line), strict=True)
                axes.plot(x, y, color="#999999", linewidth=0.6, zorder=1)
            for i, one in shown:
                handle = axes.errorbar(
                    one.costs[cost].value,
                    one.consistency.value,
                    xerr=_arms_of(one.costs[cost]),
                    yerr=_arms_of(one.consistency),
                    fmt=marker(i),
                    color=colour(i),
                    markersize=3.2,
                    markerfacecolor=colour(i) if one.on_front[cost] else "white",
                    markeredgewidth=0.7,
                    elinewidth=0.6,
                    zorder=2,
                )
                handles.setdefault(_label(one), handle)
            axes.set_xlabel(AXES[cost])
            _plain(axes)
        if any("l0" in one.costs for one in points):
            _log_l0(panels[0])
        panels[0].set_ylabel(fill(metric.replace("_", " "), 26))
        panels[1].xaxis.set_major_locator(MaxNLocator(4))
        panels[0].set_title("against sparsity")
        panels[1].set_title("against reconstruction")
        text = (
            f"{caption}; lines join arms that differ in alpha alone; filled: no other arm is better in both"
        )
        explain(figure, list(handles.values()), list(handles), text)
        save_png(figure, path)


def _label(one: Point) -> str:
    return one.arm if one.alpha is None else f"{one.arm}, alpha = {one.alpha:g}"


def _along_alpha(points: Sequence[Point]) -> list[list[Point]]:
    """Points of one trace and one k by rising alpha, two or more."""
    lines: dict[Any, list[Point]] = {}
    for one in points:
        if one.alpha is not None:
            lines.setdefault((one.trace, one.k), []).append(one)
    return [sorted(line, key=lambda one: one.alpha or 0.0) for line in lines.values() if len(line) > 1]


def _arms_of(figure: Figure) -> list[list[float]] | None:
    """Error bars of a figure, as matplotlib has them."""
    if figure.value is None or figure.low is None or figure.high is None:
        return None
    return [[max(figure.value - figure.low, 0.0)], [max(figure.high - figure.value, 0.0)]]


def _log_l0(axes: Axes) -> None:
    """A log axis whose ticks are read as what they are."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks: list[float] = []
    for nice in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [tick for e in range(-1, 4) for m in nice if low <= (tick := m * 10.0**e) <= high]
        if len(ticks) > 1:
            break
    else:
        ticks = [float(f"{tick:.3g}") for tick in np.geomspace(low * 1.02, high / 1.02, 2)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_lags(arms: Sequence[Arm], figures: Figures, path: Path, caption: str) -> None:
    """``autocorrelation.png``: each arm over all lags, in the whole dictionary, block H and the rest L."""
    rows = [name for name in CURVES if any(f"{name}_whole_lag{LAGS[0]}" in figures[arm.name] for arm in arms)]
    with one_column(8.0 + 32 * len(rows)) as figure:
        grid = figure.subplots(len(rows), len(PARTS), sharex=True, squeeze=False)
        handles: dict[str, Any] = {}
        for row, name in enumerate(rows):
            for column, part in enumerate(PARTS):
                axes = grid[row][column]
                for i, arm in enumerate(arms):
                    found = [figures[arm.name].get(f"{name}_{part}_lag{lag}") for lag in LAGS]
                    known = [
                        (lag, one)
                        for lag, one in zip(LAGS, found, strict=True)
                        if one is not None and one.value is not None
                    ]
                    if not known:
                        continue
                    # arms stand beside each other at a lag, so that their intervals can be told apart
                    shift = 2 ** (0.3 * ((i + 0.5) / len(arms) - 0.5))
                    errors = [_arms_of(one) or [[0.0], [0.0]] for _, one in known]
                    handle = axes.errorbar(
                        [lag * shift for lag, _ in known],
                        [one.value for _, one in known],
                        yerr=np.concatenate(errors, axis=1),
                        color=colour(i),
                        linestyle=dash(i),
                        marker=marker(i),
                        markersize=1.6,
                        elinewidth=0.5,
                    )
                    handles.setdefault(arm.name, handle)
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_locator(FixedLocator(LAGS))
                axes.xaxis.set_major_formatter(FixedFormatter([str(lag) for lag in LAGS]))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.axhline(0, color="black", linewidth=0.4)
                axes.yaxis.set_major_locator(MaxNLocator(4))
                _plain(axes)
                if row == 0:
                    axes.set_title("whole dictionary" if part == "whole" else f"block {part}")
                if row == len(rows) - 1:
                    axes.set_xlabel("lag (tokens)")
            grid[row][0].set_ylabel(CURVES[name])
        explain(figure, list(handles.values()), list(handles), caption)
        save_png(figure, path)


def _plain(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
