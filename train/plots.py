"""training_metrics.png: reconstruction, sparsity and temporal consistency against training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tcsae.store.errors import RunError
from tcsae.train.config import ArmConfig, TrainConfig
from tcsae.train.figure_style import colour, dash, explain, one_column, save_png, title_place
from tcsae.train.run import Run, own_config

_PANELS = (
    ("l2", "Reconstruction Loss", "L2 loss: mean squared error per token"),
    ("l1", "Sparsity", "L1 loss: mean activation sum per token"),
    ("contrast", "Temporal Consistency", None),
)

_OF_KIND = {
    ("info_nce", "cosine"): "temporal contrastive loss (nats)",
    ("in_batch", "cosine"): "contrastive loss within the batch (nats)",
    ("in_batch", "dot"): "contrastive loss of dot products (nats)",
    ("difference", "cosine"): "squared difference of a pair's codes",
}
"""the temporal term by objective and similarity: no two of them compare"""


@dataclass(frozen=True, slots=True)
class Plotted:
    """A figure that `plot_run` has drawn."""

    figure: Path
    step: int
    """the last that is in it"""
    steps: int
    """of the whole run"""


def plot_run(run: str | Path) -> Plotted:
    """Draw training_metrics.png of a run, finished or going on, from what it has written; trains nothing.

    A run writes its metrics with each checkpoint. Raises `RunNotFound` if there is no run, `RunError` if it has
    written no metrics yet.
    """
    opened = Run.open(run)
    if not opened.metrics.exists():
        raise RunError(
            f"{opened.metrics}: not there yet; a run writes it with its first checkpoint (checkpoint_every steps)"
        )
    plot_training(opened.metrics, opened.figure, own_config(opened.path))
    last = pq.read_table(opened.metrics, columns=["step"])["step"].to_numpy().max()
    return Plotted(figure=opened.figure, step=int(last), steps=opened.steps)


def plot_training(metrics: Path, figure: Path, config: TrainConfig) -> None:
    """Draw the three panels of ``metrics`` (a metrics.parquet of ``config``) into ``figure``; see `draw_training`."""
    draw_training(pq.read_table(metrics), {arm.name: arm for arm in config.arms}, figure)


def draw_training(
    table: pa.Table, arms: Mapping[str, ArmConfig], figure: Path, order: Sequence[str] = ()
) -> None:
    """Draw the three panels of one or more runs into ``figure``, one colour an arm.

    Several seeds of one arm are their mean, in a band from the lowest to the highest. An arm without a block has no
    temporal loss; that of a ring rises with the number of negatives, so it is drawn from where the ring is full.
    Losses of different objectives do not compare: the third panel has those of one (`comparable`) and names the
    other arms.

    Parameters
    ----------
    table
        metrics.parquet of all runs, one below the other; each arm's name occurs in one run only
    arms
        the configurations of the arms in it, by the name that the table has
    figure
        the PNG to write
    order
        all arms that other figures show, so that an arm has its colour there; by default those of the table
    """
    names = list(dict.fromkeys(table["arm"].to_pylist()))
    contrast, others = _comparable(arms)
    most_seeds = 1
    with one_column(44.0) as drawing:
        panels = drawing.subplots(1, 3)
        for axes, (column, title, label) in zip(panels, _PANELS, strict=True):
            for i, name in enumerate(order or names):
                if name not in names or (label is None and name in others):
                    continue
                step, values = over_seeds(table, name, column)
                most_seeds = max(most_seeds, len(values))
                shown = np.isfinite(values).all(axis=0)
                if not shown.any():
                    continue
                axes.plot(
                    step[shown],
                    values[:, shown].mean(axis=0),
                    color=colour(i),
                    linestyle=dash(i),
                    label=name,
                )
                if len(values) > 1:
                    low, high = values[:, shown].min(axis=0), values[:, shown].max(axis=0)
                    axes.fill_between(step[shown], low, high, color=colour(i), alpha=0.2, linewidth=0)
            _finish(axes, title, label or contrast)
        notes = []
        if most_seeds > 1:
            notes.append(f"mean of {most_seeds} seeds, band from the lowest to the highest")
        if others:
            left_out = ", ".join(f"{name} ({of})" for name, of in others.items())
            notes.append(f"temporal losses that do not compare with these, left out: {left_out}")
        handles, labels = panels[0].get_legend_handles_labels()
        explain(drawing, handles, labels, "; ".join(notes))
        save_png(drawing, figure)


def comparable(arms: Sequence[ArmConfig]) -> tuple[str, dict[str, str]]:
    """What the third panel shows, and the objectives of the arms with another temporal term, by name.

    It shows InfoNCE against the ring, or what the first arm that learns from its term has where none learns from
    that.

    >>> base, tc16 = ArmConfig(name="block"), ArmConfig(name="tc16", alpha=0.1)
    >>> tsae = ArmConfig(name="tsae", alpha=0.1, objective="in_batch")
    >>> comparable([base, tc16, tsae])
    ('temporal contrastive loss (nats)', {'tsae': 'in_batch'})
    >>> comparable([base, tsae])
    ('contrastive loss within the batch (nats)', {'block': 'info_nce'})
    """
    return _comparable({arm.name: arm for arm in arms})


def _comparable(arms: Mapping[str, ArmConfig]) -> tuple[str, dict[str, str]]:
    kinds = {name: (arm.objective, arm.similarity) for name, arm in arms.items() if arm.block_share > 0}
    ring = ("info_nce", "cosine")
    learning = [kinds[name] for name, arm in arms.items() if arm.alpha > 0] or list(kinds.values())
    shown = ring if ring in learning or not learning else learning[0]
    return _OF_KIND[shown], {name: kind[0] for name, kind in kinds.items() if kind != shown}


def over_seeds(
    table: pa.Table, arm: str, column: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The logged steps, and ``column`` of ``arm`` for each seed and step; nan before the ring is full."""
    own = table.filter(pc.equal(table["arm"], arm))
    step = np.unique(own["step"].to_numpy())
    # One line a step and seed, the steps in order.
    order = np.lexsort((own["step"].to_numpy(), own["seed"].to_numpy()))
    values = own[column].to_numpy()[order].astype(np.float64).reshape(-1, len(step))
    if column == "contrast":
        filled = own["ring_filled"].to_numpy()[order].reshape(values.shape)
        values = np.where(filled == filled.max(), values, np.nan)
    return step, values


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc=title_place(title))
    axes.set_xlabel("training steps")
    axes.set_ylabel(fill(label, 24))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    if low > 0 and low < high / 2:
        axes.set_ylim(bottom=0)
