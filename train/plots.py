"""training_metrics.png: reconstruction, sparsity and temporal consistency against training steps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tcsae.store.atomic import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's palette, told apart with every common colour blindness"""

DASHES = ("-", "--", ":", "-.")
"""the palette comes round with another dash"""

_PANELS = (
    ("l2", "Reconstruction Loss", "L2 loss: mean squared error per token"),
    ("l1", "Sparsity", "L1 loss: mean activation sum per token"),
    ("contrast", "Temporal Consistency", "temporal contrastive loss (nats)"),
)


def plot_training(metrics: Path, figure: Path) -> None:
    """Draw the three panels of ``metrics`` (a metrics.parquet) into ``figure``, one colour an arm.

    Seeds of one arm are thin lines of its colour. An arm without a block has no temporal loss; that rises
    with the number of negatives, so it is drawn from where the ring is full.
    """
    table = pq.read_table(metrics)
    arm = np.array(table["arm"].to_pylist())
    seed, step = table["seed"].to_numpy(), table["step"].to_numpy()
    arms = list(dict.fromkeys(arm.tolist()))
    filled = table["ring_filled"].to_numpy()
    drawing = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(1, 3)
    for axes, (column, title, label) in zip(panels, _PANELS, strict=True):
        values = table[column].to_numpy()
        if column == "contrast":
            values = np.where(filled == filled.max(), values, np.nan)
        for i, name in enumerate(arms):
            seeds = np.unique(seed[arm == name])
            for s in seeds:
                own = (arm == name) & (seed == s) & np.isfinite(values)
                if own.any():
                    axes.plot(
                        step[own],
                        values[own],
                        color=COLOURS[i % len(COLOURS)],
                        linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
                        linewidth=1.8 if len(seeds) == 1 else 1.0,
                        label=name if s == seeds[0] else None,
                    )
        _finish(axes, title, label)
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=min(len(arms), 8), frameon=False)
    image = io.BytesIO()
    drawing.savefig(image, format="png", dpi=130, metadata={"Software": "tcsae"})
    write_atomically(figure, image.getvalue())


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=14)
    axes.set_xlabel("training steps", fontsize=12)
    axes.set_ylabel(label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    if low > 0 and low < high / 2:
        axes.set_ylim(bottom=0)
