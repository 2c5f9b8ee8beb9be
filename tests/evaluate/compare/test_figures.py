"""The figures at the size at which they are printed: legible type, nothing over anything else, nothing cut off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tcsae.evaluate.compare.arms import Arm, arms_of, families_of
from tcsae.evaluate.compare.folders import read_folders
from tcsae.evaluate.compare.front import arm_figure, points_of
from tcsae.train import figure_style
from tcsae.train.figure_style import SMALL, WIDTH_MM

from .conftest import planted

WriteFolder = Callable[..., Path]
DRAWING = import_module("tcsae.evaluate.compare.figures")
PLOTS = import_module("tcsae.evaluate.plots")
LAGS = (1, 2, 4, 8, 16, 32)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is drawn, as it is before it becomes a file."""
    figures: list[Figure] = []

    @contextmanager
    def kept(height_mm: float) -> Iterator[Figure]:
        with figure_style.one_column(height_mm) as figure:
            figures.append(figure)
            yield figure

    for module in (DRAWING, PLOTS):
        monkeypatch.setattr(module, "one_column", kept)
    return figures


NAMES = {
    "2 arms of short names": ["block", "tc16"],
    "4 arms of short names": ["block", "tc16", "t-sae", "a0"],
    "12 arms of long names": [
        *(f"an-arm-with-a-rather-long-name-number-{i}" for i in range(11)),
        "an-arm-whose-name-is-so-long-that-no-column-of-any-paper-could-ever-hold-it-in-one-line",
    ],
}


@pytest.fixture(params=NAMES)
def arms(request: pytest.FixtureRequest, folder: WriteFolder) -> list[Arm]:
    names = NAMES[request.param]
    saes = []
    for i, name in enumerate(names):
        for seed in (0, 1):
            values = {f"autocorrelation_{part}_lag{lag}": (1 + i / 9) / lag for part in "LH" for lag in LAGS}
            values |= {f"autocorrelation_whole_lag{lag}": (1 + i / 9) / lag + seed / 50 for lag in LAGS}
            values |= {
                "l0": 20.0 + 3 * i + seed,
                "explained_variance": 0.8 - i / 90,
                "kl_sae": 0.0615 + i / 300 + seed / 50,
            }
            values |= {"mse_per_dimension": 3.0 + i}
            saes.append(planted(name, seed, values, alpha=i / 100))
    return [arm for family in families_of(arms_of(read_folders([folder(saes)]).saes)) for arm in family.arms]


def figures_of(arms: list[Arm]) -> dict[str, dict[str, Any]]:
    return {arm.name: {name: arm_figure(arm, name, 1000) for name in arm.one.estimates} for arm in arms}


@pytest.mark.parametrize("which", ["bars", "tradeoff", "lags"])
def test_a_figure_is_legible_at_one_column_and_nothing_overlaps(
    which: str, arms: list[Arm], drawn: list[Figure], tmp_path: Path
) -> None:
    path, caption = tmp_path / "figure.png", "tiny, blocks.1.hook_resid_post; 40 test documents; " * 3
    metric = "autocorrelation_whole_lag8"
    if which == "bars":
        DRAWING.draw_bars(arms, figures_of(arms), path, caption)
    elif which == "tradeoff":
        DRAWING.draw_tradeoff(points_of(arms, metric, 1000), metric, path, caption)
    else:
        DRAWING.draw_lags(arms, figures_of(arms), path, caption)
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = drawn[-1]  # arms' names that do not fit below their bars are drawn once more as numbers
    assert figure.get_figwidth() * 25.4 == pytest.approx(WIDTH_MM)
    texts = list(shown_texts(figure))
    assert min(text.get_fontsize() for text, _ in texts) >= SMALL
    page = figure.bbox
    for text, box in texts:
        assert box.x0 >= page.x0 - 1, text.get_text()
        assert box.x1 <= page.x1 + 1, text.get_text()
        assert box.y0 >= page.y0 - 1, text.get_text()
        assert box.y1 <= page.y1 + 1, text.get_text()
    for (a, of_a), (b, of_b) in itertools.combinations(texts, 2):
        assert not overlap(of_a, of_b), (a.get_text(), b.get_text())


def test_a_bar_has_its_arms_name_and_figure_where_there_is_room_for_them(
    drawn: list[Figure], tmp_path: Path
) -> None:
    names = NAMES["4 arms of short names"]
    for n in (2, 4):
        bars = {
            panel.metric: [PLOTS.Bar(arm, value, value, value, (value,)) for arm in names[:n]]
            for panel, value in zip(PLOTS.PANELS, (0.728, 1234.5, 0.0615), strict=True)
        }
        PLOTS.draw_final(bars, names[:n], tmp_path / "figure.png", "tiny")
    two, four = drawn[0], drawn[-1]
    assert [[text.get_text() for text in axes.texts] for axes in two.axes] == [
        ["0.728"] * 2,
        [],
        ["0.061"] * 2,
    ]
    assert [label.get_text() for label in two.axes[0].get_xticklabels()] == ["block", "tc16"]
    assert [text.get_text() for axes in four.axes for text in axes.texts] == []
    assert [label.get_text() for label in four.axes[0].get_xticklabels()] == ["1", "2", "3", "4"]
    assert [text.get_text() for text in four.legends[0].get_texts()] == [
        "1  block",
        "2  tc16",
        "3  t-sae",
        "4  a0",
    ]


def shown_texts(figure: Figure) -> Iterator[tuple[Text, Bbox]]:
    """Every piece of text that is drawn, with its place in pixels."""
    figure.canvas.draw()
    beyond = {id(text) for axes in figure.axes for text in labels_beyond(axes)}
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        if id(text) not in beyond and text.get_visible() and text.get_text().strip() and box.width > 0:
            yield text, box


def labels_beyond(axes: Axes) -> Iterator[Text]:
    """Labels of ticks outside of the axes, which matplotlib keeps but does not draw."""
    for axis, which in ((axes.xaxis, 0), (axes.yaxis, 1)):
        low, high = axes.bbox.get_points()[:, which]
        for tick in axis.get_major_ticks():
            at = axis.get_transform().transform([tick.get_loc()])[0]
            a, b = axis.get_transform().transform(axis.get_view_interval())
            place = low + (high - low) * (at - a) / (b - a)
            if not low - 1 <= place <= high + 1:
                yield from (tick.label1, tick.label2)


def overlap(a: Bbox, b: Bbox) -> bool:
    """Whether two boxes share more than a pixel's edge."""
    shared = Bbox.intersection(a, b)
    return shared is not None and shared.width > 1 and shared.height > 1
