"""How all figures look: one column of a paper wide, legible there, told apart with every common colour blindness.

A figure is drawn at the size at which it is printed (85 mm), so its type is what the reader gets: nothing below 6
points.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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

_HANDLE_MM = 7.0
"""of a legend's symbol and the room about it"""

_LINE_MM = 2.65
"""height of a line of the smallest type"""

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


def explain(figure: Figure, handles: Sequence[Any], labels: Sequence[str], text: str) -> None:
    """Put a legend below the panels and ``text`` below it; the figure grows by what they need.

    Their heights are known, so the panels keep theirs however many arms there are.
    """
    shown = [_shortened(label, WIDTH_MM - _HANDLE_MM) for label in labels]
    columns = legend_columns(shown)
    lines = _wrapped(text, WIDTH_MM - 2)
    rows = -(-len(labels) // columns)
    width, before = figure.get_size_inches()
    total = before * 25.4 + _LINE_MM * (rows + len(lines)) + 3
    figure.set_size_inches(width, total / 25.4)
    of_text, below = (_LINE_MM * len(lines) + 1) / total, 1 - before * 25.4 / total
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))  # type: ignore[union-attr, call-arg]
    if labels:
        figure.legend(
            handles, shown, loc="lower center", bbox_to_anchor=(0.5, of_text), ncols=columns, borderaxespad=0
        )
    figure.text(
        0.5,
        0.5 / total,
        "\n".join(lines),
        fontsize=SMALL,
        color="#333333",
        ha="center",
        va="bottom",
        linespacing=1.2,
    )


def title_place(title: str) -> Literal["center", "right"]:
    """Where the title of one of three panels stands: a long one is wider than its panel and reaches over the label of
    its y axis."""
    return "right" if len(title) > 12 else "center"


def legend_columns(labels: Sequence[str]) -> int:
    """How many labels stand side by side in one column's width.

    >>> legend_columns(["tc16", "block"]), legend_columns(["a-name-of-more-than-forty-characters-or-so-"] * 9)
    (2, 1)
    """
    longest = max(map(_width_mm, labels), default=0.0)
    return max(1, min(len(labels), int(WIDTH_MM // (_HANDLE_MM + longest))))


def _width_mm(text: str) -> float:
    """Of ``text`` in the smallest type."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    plain = text.replace("$", "S")  # a dollar would begin a formula
    width, _, _ = text_to_path.get_text_width_height_descent(plain, FontProperties(size=SMALL), ismath=False)
    return float(width) / 72 * 25.4


def _shortened(text: str, most_mm: float) -> str:
    """``text``, or its beginning with an ellipsis where it is wider than ``most_mm``."""
    kept = text
    while len(kept) > 1 and _width_mm(kept) > most_mm:
        kept = kept[:-2].rstrip("…") + "…"
    return kept.replace("$", r"\$")


def _wrapped(text: str, most_mm: float) -> list[str]:
    """``text`` in lines of at most ``most_mm``."""
    lines: list[str] = []
    for word in text.split():
        if lines and _width_mm(f"{lines[-1]} {word}") <= most_mm:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(_shortened(word, most_mm))
    return lines


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
