"""What is shown: the terminal's table and the bars of final_metrics.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tcsae.evaluate.cells import WIDTH
from tcsae.evaluate.estimates import Draws, Estimate
from tcsae.evaluate.plots import PANELS, Bar, Panel, _limits, bars_of, final_metrics
from tcsae.evaluate.summary import Comparison, Evaluation, Row
from tcsae.evaluate.table import table

REPLAYED = ("loss_recovered", "kl_sae", "kl_score")


def a_row(arm: str, seed: int, value: float, spread: float = 0.02) -> Row:
    draws = value + spread * np.linspace(-1, 1, 201)
    names = {
        "l0": value * 40,
        "l0_H": value * 8,
        "dead_fraction": 0.0312,
        "explained_variance": value,
        "mse_per_dimension": 5.5,
        "loss_recovered": 0.91,
        "kl_sae": 0.3,
        "kl_score": 0.95,
        "autocorrelation_whole_lag8": 0.0213,
        "autocorrelation_H_lag8": 0.1234,
    }
    estimates = {
        name: Estimate(name, "1", v, v - spread, v + spread, 31 if name in REPLAYED else 127, "bca", None)
        for name, v in names.items()
    }
    kept = {"explained_variance": Draws(value, draws, value + np.array([-0.001, 0.001]))}
    return Row(f"{arm}-s{seed}", arm, seed, 6, estimates, kept)


def evaluation_of(*rows: Row) -> Evaluation:
    return Evaluation(Path("out"), rows, (), {"n_documents": 127, "split": "test"}, None)


def test_columns_are_aligned_and_fit_however_long_the_names() -> None:
    text = table(
        evaluation_of(a_row("batchtopk", 0, 0.78), a_row("a-very-long-name-of-an-arm-" * 3, 11, 0.5))
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(lines).endswith("over both its nulls.")
    assert len({len(line) for line in lines[:1] + lines[2:4]}) == 1
    assert "0.780 [.760,.800]" in lines[2]
    assert "0.1234 [.1034,.1434]" in lines[2]
    assert "a-very-long-name-of…" in lines[3]


def test_the_note_tells_the_replayed_documents_from_the_stored_ones_and_counts_what_is_left_out() -> None:
    evaluation = evaluation_of(a_row("tc16", 0, 0.5))
    note = " ".join(table(evaluation).splitlines()[3:])
    assert note.startswith("127 test documents;")
    assert "Loss recovered and KL: model replayed with the SAE spliced in, on 31 of them;" in note
    assert "outlier" not in note
    evaluation.conditions["n_outliers_left_out"] = {"hook": 17}
    assert "stored activations (17 outlier rows left out)" in " ".join(table(evaluation).splitlines())


def test_a_table_of_one_suite_says_nothing_of_a_replay() -> None:
    row = a_row("tc16", 0, 0.5)
    for name in REPLAYED:
        del row.estimates[name]
    note = " ".join(table(evaluation_of(row)).splitlines()[3:])
    assert "replayed" not in note
    assert (
        "intervals over documents. All figures: stored activations. Means over live features at lag 8" in note
    )
    for name in ("autocorrelation_whole_lag8", "autocorrelation_H_lag8"):
        del row.estimates[name]
    assert " ".join(table(evaluation_of(row)).splitlines()[3:]).endswith("All figures: stored activations.")


def test_a_probe_that_could_not_be_made_says_why_and_without_any_there_is_no_table() -> None:
    row = a_row("tc16", 0, 0.5)
    reason = "undefined, because no topic is named in the store"
    row.estimates["probe_topic_chance"] = Estimate.count("probe_topic_chance", "1", None, 0, reason)
    row.estimates["probe_source_chance"] = Estimate(
        "probe_source_chance", "1", 0.25, None, None, 9, None, None
    )
    lines = table(evaluation_of(row)).splitlines()
    assert lines[-1] == f"Probe of the topic: {reason}"
    assert any(line.startswith("chance") and line.endswith("0.25") for line in lines)
    for task in ("source", "position", "token", "previous_token"):
        name = f"probe_{task}_chance"
        row.estimates[name] = Estimate.count(name, "1", None, 0, reason)
    lines = table(evaluation_of(row)).splitlines()
    assert lines[-1] == f"Probe of the previous token: {reason}"
    assert not any(line.startswith("chance") for line in lines)


def test_what_has_no_column_in_the_table_has_no_table_of_names_alone() -> None:
    row = a_row("tc16", 0, 0.5)
    row.estimates.clear()
    nothing = Comparison("tc16-s0", "block-s0", {})
    evaluation = Evaluation(Path("out"), (row,), (nothing,), {"n_documents": 127, "split": "test"}, None)
    assert table(evaluation) == "127 test documents; in brackets 95 % bootstrap intervals over documents."


def test_a_long_comparison_is_wrapped_and_no_figure_is_cut() -> None:
    found = {
        f"autocorrelation_H_lag8_{kind}": Estimate(kind, "1", value, -value, 3 * value, 127, "bca", None)
        for kind, value in (("ratio", 12345.6), ("difference", -0.1234))
    }
    comparison = Comparison("a-long-name-of-an-arm-that-is-cut-s0", "another-long-name-of-an-arm-s0", found)
    rows = (a_row("a-very-long-name-of-an-arm-" * 3, 11, -12345.678), a_row("tc16", 0, 0.5))
    text = table(Evaluation(Path("out"), rows, (comparison,), {"n_documents": 127, "split": "test"}, None))
    assert max(map(len, text.splitlines())) <= WIDTH
    words = " ".join(text.split())
    assert "ratio 12345.6 [-12345.6,37036.8], difference -0.1234 [.1234,-.3702]" in words
    assert "-12345.678 [-12345.698,-12345.658]" in words


def test_what_is_missing_is_a_dash_and_a_column_of_dashes_is_left_out() -> None:
    row = a_row("plain", 0, 0.5)
    assert "summary.json says why" not in table(evaluation_of(row))
    name = "autocorrelation_H_lag8"
    row.estimates[name] = Estimate.count(name, "1", None, 9, "undefined, because nothing fires")
    lines = table(evaluation_of(row)).splitlines()
    assert " ".join(lines).endswith("What is undefined is a dash or has no column; summary.json says why.")
    del row.estimates["autocorrelation_H_lag8"]
    other = a_row("other", 1, 0.6)
    assert table(evaluation_of(row, other)).splitlines()[2].endswith("-")
    del other.estimates["autocorrelation_H_lag8"]
    assert "ac8 H" not in table(evaluation_of(row, other)).splitlines()[0]


def test_seeds_of_an_arm_make_one_bar_whose_interval_is_that_of_their_mean() -> None:
    bars = bars_of(
        [a_row("tc16", 0, 0.7), a_row("base", 0, 0.8), a_row("tc16", 1, 0.5)], "explained_variance"
    )
    assert [bar.arm for bar in bars] == ["tc16", "base"]
    assert bars[0].value == pytest.approx(0.6)
    assert bars[0].seeds == (0.7, 0.5)
    # draws of the mean run evenly over 0.6 +- 0.02: their central 95 % is 0.6 +- 0.019
    assert (bars[0].low, bars[0].high) == (pytest.approx(0.581), pytest.approx(0.619))


def test_an_arm_whose_figure_is_undefined_has_no_bar() -> None:
    row = a_row("broken", 0, 0.7)
    row.estimates["explained_variance"] = Estimate.count("explained_variance", "1", None, 9, "undefined")
    assert bars_of([row], "explained_variance") == []


def test_the_panels_are_those_of_the_source_document() -> None:
    assert [panel.title for panel in PANELS] == ["Explained Variance", "Mean Squared Error", "KL Divergence"]


@pytest.mark.parametrize("value", [0.8, -3.5], ids=["an ordinary SAE", "worse than the source's range"])
def test_the_figure_is_drawn_for_many_arms_and_odd_values(tmp_path: Path, value: float) -> None:
    rows = [a_row(f"arm-with-a-long-name-{i}", s, value + i / 50) for i in range(9) for s in (0, 1)]
    final_metrics(rows, tmp_path / "final_metrics.png", "caption")
    assert (tmp_path / "final_metrics.png").stat().st_size > 10_000


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.metric)
def test_single_seeds_far_from_their_mean_are_inside_the_axes(panel: Panel) -> None:
    axes = Figure().subplots()
    _limits(axes, panel, [Bar("tc16", -1.5, -1.6, -1.4, (-4.0, 1.0))])
    low, high = axes.get_ylim()
    assert low < -4.0
    assert high >= 1.0


def test_probes_have_a_table_of_their_own_with_the_chance_level_above_them() -> None:
    row = a_row("tc16", 0, 0.5)
    assert "Probes" not in table(evaluation_of(row))
    row.estimates["probe_topic_chance"] = Estimate("chance", "1", 0.2, None, None, 60, None, "known")
    row.estimates["probe_topic_H_k20"] = Estimate("topic", "1", 0.76, 0.66, 0.83, 60, "bca", None)
    row.estimates["probe_source_chance"] = Estimate("chance", "1", None, None, None, 0, None, "one source")
    lines = table(evaluation_of(row)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:3] == ["arm", "seed", "topic"])
    assert lines[at + 2].split() == ["chance", "-", "0.20"]
    assert lines[at + 3].split() == ["tc16", "0", "0.76", "[.66,.83]"]
    assert max(map(len, lines)) <= WIDTH
