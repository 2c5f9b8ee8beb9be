"""How all figures look: one column of a paper wide, legible there, told apart with every common colour blindness.

A figure is drawn at the size at which it is printed (85 mm), so its type is what the reader gets: nothing below 6
points.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from tcsae.store.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's palette"""

DASHES = ("-", "--", ":", "-.")
"""the palette comes round with another dash"""

HATCHES = ("", "////", "....", "xxxx")
"""the palette of bars comes round with another hatch"""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""of points; seven of them and eight colours make 56 pairs"""

WIDTH_MM = 85.0
"""of one column"""

DPI = 450
"""dots an inch at that size"""

SMALL = 6.0
"""points: ticks and legends; titles and labels are larger"""

_CHARACTER_MM = 1.12
"""mean width of a character of that size in DejaVu Sans"""

_HANDLE_MM = 8.0
"""of a legend's symbol and the room about it"""

_RC: dict[Any, Any] = {
    "font.size": 6.5,
    "axes.titlesize": 7,
    "axes.labelsize": 6.5,
    "axes.labelpad": 2,
    "axes.titlepad": 3,
    "axes.linewidth": 0.5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "xtick.major.pad": 1.5,
    "ytick.major.pad": 1.5,
    "lines.linewidth": 0.9,
    "grid.linewidth": 0.4,
    "hatch.linewidth": 0.4,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "legend.labelspacing": 0.25,
    "legend.borderpad": 0.2,
}


@contextmanager
def one_column(height_mm: float) -> Iterator[Figure]:
    """A figure of one column's width, in the style of all of them.

    Its own canvas, not pyplot's: no global state but the style within the block, no display.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(_RC):
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.03)
        figure = Figure(figsize=(WIDTH_MM / 25.4, height_mm / 25.4), dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def explain(figure: Figure, handles: Sequence[Any], labels: Sequence[str], text: str) -> float:
    """Put the legend below the panels and ``text`` below it; the height in mm that they take, added to the figure."""
    columns = legend_columns(labels)
    lines = wrap(text, int(WIDTH_MM / _CHARACTER_MM * 1.12), break_on_hyphens=False)
    rows = -(-len(labels) // columns)
    height = 2.75 * (rows + len(lines)) + 2.5
    width, before = figure.get_size_inches()
    figure.set_size_inches(width, before + height / 25.4)
    shown = [
        label if len(label) <= MOST_CHARACTERS else f"{label[: MOST_CHARACTERS - 1]}…" for label in labels
    ]
    if labels:
        figure.legend(handles, shown, loc="outside lower center", ncols=columns)
    figure.supxlabel("\n".join(lines), fontsize=SMALL, color="#333333", linespacing=1.15)
    return height


MOST_CHARACTERS = int((WIDTH_MM - _HANDLE_MM) / _CHARACTER_MM)
"""of one name in a legend; longer ones end in an ellipsis"""


def legend_columns(labels: Sequence[str]) -> int:
    """How many labels stand side by side in one column's width.

    >>> legend_columns(["tc16", "block"]), legend_columns(["a-name-of-30-characters-or-so-"] * 9)
    (2, 2)
    """
    longest = max(map(len, labels), default=0)
    return max(1, min(len(labels), int(WIDTH_MM // (_HANDLE_MM + _CHARACTER_MM * longest))))


def colour(index: int) -> str:
    """Of arm number ``index``."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """Of arm number ``index``: arms of one colour differ in it."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def hatch(index: int) -> str:
    """Of arm number ``index``: bars of one colour differ in it."""
    return HATCHES[index // len(COLOURS) % len(HATCHES)]


def marker(index: int) -> str:
    """Of arm number ``index``: points of one colour differ in it."""
    return MARKERS[index % len(MARKERS)]


def save_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path``, whole or not at all, with nothing in it that depends on when."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI, metadata={"Software": "tcsae"})
    write_atomically(path, image.getvalue())
