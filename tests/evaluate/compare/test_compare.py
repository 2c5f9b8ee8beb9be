"""The comparison from folders to report: planted differences, no difference, and what is said of what is missing."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tcsae.evaluate import Compared, compare
from tcsae.evaluate.compare.contrast import holm_correction
from tcsae.evaluate.compare.registered import MARGINS, REGISTERED
from tcsae.evaluate.compare.terminal import terminal
from tcsae.store.errors import ConfigError, RunBusy, UnknownName
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import save_sae

from .conftest import Planted, planted, write_folder

WriteFolder = Callable[..., Path]
L0_OF = {16: 18.0, 64: 70.0}


def experiment(effect: float, fvu_cost: float = 0.0, seeds: int = 5) -> list[Planted]:
    """Two arms at two k: the contrast adds ``effect`` to the temporal metrics and ``fvu_cost`` to FVU.

    Seeds and documents vary far more than the effect, but together for both arms, as they do in pairs.
    """
    generator = np.random.default_rng(7)
    document = generator.normal(0, 0.05, 40)
    saes = []
    for seed in range(seeds):
        of_seed = generator.normal(0, 0.02)
        for k, l0 in L0_OF.items():
            for arm, alpha in (("block", 0.0), ("tc16", 0.02)):
                own = generator.normal(0, 0.004, 40)
                on = alpha > 0
                temporal = 0.2 + 0.01 * np.log(l0) + of_seed + document + own + effect * on
                quality = 0.6 + 0.05 * np.log(l0) + of_seed + document + own / 4 - fvu_cost * on
                documents = {
                    "l0": l0 * np.exp(generator.normal(0, 0.02, 40)),
                    "l0_H": l0 / 4,
                    "explained_variance": quality,
                    "mse_per_dimension": 1 - quality,
                    "loss_recovered": quality + 0.1,
                    "kl_sae": 1 - quality,
                    REGISTERED: temporal,
                }
                for part, lag in (("whole", 1), ("whole", 8), ("H", 8), ("L", 8)):
                    documents[f"autocorrelation_{part}_lag{lag}"] = temporal / lag
                saes.append(planted(f"{arm}-k{k}", seed, documents, alpha=alpha, k=k))
    return saes


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Five seeds, an effect of 0.01 and a cost of 0.002 of FVU, with all figures."""
    folder = tmp_path_factory.mktemp("standard")
    return compare(
        [write_folder(folder / "out", experiment(0.01, 0.002))], folder / "report", n_resamples=2000
    )


@pytest.fixture
def compared(folder: WriteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compared]:
    """Compare some planted SAEs; without figures, which take most of the time."""
    monkeypatch.setattr(import_module("tcsae.evaluate.compare.run"), "_draw", lambda *_: ({}, []))

    def run(saes: list[Planted], **options: Any) -> Compared:
        return compare([folder(saes)], tmp_path / "report", n_resamples=2000, **options)

    return run


# Truth -------------------------------------------------------------------------------------------------


def test_a_planted_difference_is_found_at_the_registered_l0(standard: Compared) -> None:
    one = standard.primary
    assert one is not None
    assert (one.treated, one.control, one.metric) == ("tc16", "block", REGISTERED)
    assert one.difference.low is not None
    assert one.difference.high is not None
    assert 0.005 < one.difference.low < 0.01 < one.difference.high < 0.015
    assert one.p is not None
    assert one.p < 0.01
    assert one.l0 == (40.0, 40.0)
    assert one.l0_block == pytest.approx((10.0, 10.0), rel=0.01)
    assert (one.seeds, one.n_documents, one.n_tokens) == ((0, 1, 2, 3, 4), 40, 1000)
    assert one.difference.note is None
    # the difference is paired: each arm alone is far less certain
    assert one.treated_figure.high is not None
    assert one.treated_figure.low is not None
    assert one.treated_figure.high - one.treated_figure.low > 5 * (one.difference.high - one.difference.low)
    tests = {test.metric: test for test in standard.of_kind("non-inferiority")}
    assert tests["fvu"].holds
    assert tests["loss_recovered"].holds
    assert 0.001 < (tests["fvu"].bound or 0) < 0.004


def test_no_difference_is_none_and_a_cost_beyond_the_margin_is_not_non_inferior(
    compared: Callable[..., Compared],
) -> None:
    found = compared(experiment(0.0, fvu_cost=0.02))
    assert found.primary is not None
    difference = found.primary.difference
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < 0 < difference.high
    assert (found.primary.p or 0) > 0.05
    tests = found.of_kind("non-inferiority")
    assert {test.metric for test in tests} == set(MARGINS)
    assert [test.holds for test in tests] == [False, False]
    assert min(test.p or 0 for test in tests) > 0.9


def test_holm_is_over_the_rest_and_never_over_the_registered_hypotheses(standard: Compared) -> None:
    assert standard.primary is not None
    assert standard.primary.p_holm is None
    assert all(one.p_holm is None for one in standard.of_kind("non-inferiority"))
    rest = standard.of_kind("secondary")
    assert [one.p_holm for one in rest] == pytest.approx(holm_correction([one.p or 0 for one in rest]))


def test_few_seeds_are_said_beside_every_figure(compared: Callable[..., Compared]) -> None:
    found = compared(experiment(0.01, seeds=3))
    assert all(one.difference.note == "3 seeds, fewer than 5" for one in found.contrasts)
    text = (found.report.parent / "report.md").read_text()
    intervals = re.findall(r"\[[-0-9.e]+, [-0-9.e]+\](.{10})", text)
    assert len(intervals) > 100
    assert set(intervals) == {" (3 seeds)"}


def test_one_seed_has_intervals_over_documents_only(compared: Callable[..., Compared]) -> None:
    found = compared(experiment(0.01, seeds=1))
    assert found.primary is not None
    assert found.primary.difference.note == "1 seed: interval over documents only"
    assert found.primary.n_resamples == 400
    assert "(1 seed: documents only)" in terminal(found)


# Missing -----------------------------------------------------------------------------------------------


def test_without_the_registered_metric_another_stands_in_and_it_is_said(
    compared: Callable[..., Compared],
) -> None:
    saes = [
        one._replace(documents={name: y for name, y in one.documents.items() if name != REGISTERED})
        for one in experiment(0.01, seeds=1)
    ]
    found = compared(saes)
    assert found.metric == "autocorrelation_whole_lag8"
    assert any("stands in its place" in line for line in found.not_computed)
    assert "not the registered metric" in found.report.read_text()


def test_unequal_l0_is_marked_and_has_no_p(compared: Callable[..., Compared]) -> None:
    saes = [one for one in experiment(0.01, seeds=2) if one.arm in ("block-k16", "tc16-k64")]
    found = compared(saes)
    assert found.primary is not None
    assert re.fullmatch(r"not at equal L0: L0 [67]\d\S* .* and 1[78]\S* .*", found.primary.matching)
    assert found.primary.difference.value is not None
    assert found.primary.p is None
    assert all(test.holds is None for test in found.of_kind("non-inferiority"))
    assert any("not at equal L0" in line for line in found.not_computed)


def test_an_l0_beyond_the_curves_is_refused_with_the_numbers(compared: Callable[..., Compared]) -> None:
    found = compared(experiment(0.01, seeds=1), l0=90.0)
    assert found.primary is not None
    assert found.primary.difference.value is None
    assert re.search(
        r"L0 90 lies outside of what tc16 reaches with seed 0, 1\d.* to \d+",
        found.primary.difference.reason or "",
    )
    assert all(one.p is None for one in found.contrasts)


def test_a_missing_seed_is_named_everywhere(compared: Callable[..., Compared]) -> None:
    found = compared([one for one in experiment(0.01, seeds=3) if (one.arm, one.seed) != ("block-k16", 2)])
    assert found.primary is not None
    assert found.primary.seeds == (0, 1)
    assert "seed 2 (block has it at one k only)" in found.report.read_text()


def test_without_a_temporal_suite_quality_is_still_compared(compared: Callable[..., Compared]) -> None:
    core = ("l0", "l0_H", "explained_variance", "loss_recovered", "kl_sae")
    saes = [
        one._replace(documents={name: y for name, y in one.documents.items() if name in core})
        for one in experiment(0.0)
    ]
    found = compared(saes)
    assert found.primary is not None
    assert "have no excess_information_whole_lag8" in (found.primary.difference.reason or "")
    assert all(test.holds for test in found.of_kind("non-inferiority"))
    assert found.points == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"l0": 0.0}, ConfigError, "l0: expected a number above 0", id="L0 of nothing"),
        pytest.param({"l0": float("nan")}, ConfigError, "l0: expected", id="L0 nan"),
        pytest.param(
            {"primary": "autocorelation_whole_lag8"},
            UnknownName,
            "autocorrelation_whole",
            id="unknown metric",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(
    compared: Callable[..., Compared],
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        compared(experiment(0.0, seeds=1), **options)
    assert not (tmp_path / "report").exists()


def test_two_reports_into_one_folder_at_once_are_refused(
    compared: Callable[..., Compared], tmp_path: Path
) -> None:
    from tcsae.store.atomic import exclusive

    with (
        exclusive(tmp_path / "report" / ".lock", RunBusy("held")),
        pytest.raises(RunBusy, match="another process"),
    ):
        compared(experiment(0.0, seeds=1))


# What is written ---------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_asks_for_nothing_and_holds_every_interval(standard: Compared) -> None:
    found = standard
    page = found.report.read_text()
    assert "<script" not in page
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)\w", page)
    assert page.count("data:image/png;base64,") == len(found.images) == 3
    text = html.unescape(page)
    for line in pq.read_table(found.report.parent / "arms.parquet").to_pylist():
        assert f"{line['value']:.4g}" in text
        assert line["low"] is None or f"[{line['low']:.4g}, {line['high']:.4g}]" in text
    for said in ("store-1", "tiny", "blocks.1.hook_resid_post", "12,800", "0, 1, 2, 3, 4", "Pre-registered"):
        assert said in text


def test_report_and_figure_say_on_how_many_documents_the_model_was_replayed(
    folder: WriteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = import_module("tcsae.evaluate.compare.figures")
    captions: list[str] = []
    monkeypatch.setattr(drawing, "draw_bars", lambda arms, figures, path, caption: captions.append(caption))
    for name in ("draw_tradeoff", "draw_lags"):
        monkeypatch.setattr(drawing, name, lambda *_: None)
    html = import_module("tcsae.evaluate.compare.report")
    monkeypatch.setattr(html, "html_of", lambda *_: "")
    out = folder(experiment(0.0, seeds=1), conditions={"n_replayed_documents": 12})
    report = tmp_path / "report"
    compare([out], report, n_resamples=1000)
    assert captions == ["tiny, blocks.1.hook_resid_post; 40 test documents, KL on 12 of them"]
    said = "40 test documents, loss recovered and KL on 12 of them; 1,000 tokens."
    assert said in (report / "report.md").read_text()


def test_names_cannot_break_out_of_the_page_or_a_table(compared: Callable[..., Compared]) -> None:
    evil = "<img src=x onerror=alert(1)>|$x"
    saes = [one._replace(arm=f"{one.arm}{evil}".replace("/", "")) for one in experiment(0.0, seeds=1)]
    found = compared(saes)
    page = found.report.read_text()
    assert "<img src=x" not in page
    assert html.escape("<img src=x") in page
    lines = (found.report.parent / "report.md").read_text().splitlines()
    assert not any("<img" in line for line in lines)
    head, _, first = next(
        lines[i : i + 3] for i, line in enumerate(lines) if line.startswith("| arm | alpha")
    )
    assert len(re.findall(r"(?<!\\)\|", head)) == len(re.findall(r"(?<!\\)\|", first))


def test_tables_json_and_python_agree(standard: Compared) -> None:
    found = standard
    folder = found.report.parent
    written = json.loads((folder / "compare.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    table = pq.read_table(folder / "comparisons.parquet").to_pylist()
    assert len(table) == len(found.contrasts) == len(written["comparisons"])
    assert table[0]["kind"] == "primary"
    assert table[0]["difference_low"] == found.contrasts[0].difference.low


def test_the_same_folders_give_the_same_bytes(standard: Compared) -> None:
    names = ("report.html", "report.md", "compare.json", "comparisons.parquet", "tradeoff.png")
    report = standard.report.parent
    first = [(report / name).read_bytes() for name in names]
    compare([report.parent / "out"], report, n_resamples=2000)
    assert [(report / name).read_bytes() for name in names] == first


# Matched features --------------------------------------------------------------------------------------


def an_sae(folder: Path, W_dec: torch.Tensor) -> Path:
    """An SAE with these rows; its encoder's biases are drawn from its name, so that no two are the same SAE."""
    n, d = W_dec.shape
    draw = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    sae = SAE(
        architecture="standard",
        W_enc=W_dec.T.clone(),
        b_enc=torch.randn(n, generator=draw),
        W_dec=W_dec,
        b_dec=torch.zeros(d),
    )
    save_sae(sae, folder)
    return folder


def test_matched_features_are_found_whatever_their_order_and_their_change_is_measured(
    compared: Callable[..., Compared], tmp_path: Path
) -> None:
    # 12 rows in 16 dimensions; the treated has the first 9 in another order, 3 of its own, and the last never fires
    rows = torch.eye(16)[:12]
    order = [3, 1, 0, 2, 8, 7, 6, 5, 4]
    saes = []
    for seed in range(5):
        for arm, alpha, shift in (("block", 0.0, 0.0), ("tc16", 0.02, 0.25)):
            W_dec = rows if arm == "block" else torch.cat([rows[order], torch.eye(16)[12:15]])
            lasting = (
                np.arange(12) / 10 if arm == "block" else np.array([*(np.array(order) / 10 + shift), 9, 9, 9])
            )
            density = np.full(12, 0.1)
            if arm == "block":
                density[11] = 0.0
            one = planted(arm, seed, {"l0": 30.0, REGISTERED: 0.1 + alpha}, alpha=alpha)
            folder = an_sae(tmp_path / "run" / "sae" / f"{arm}-s{seed}", W_dec)
            features = {"density": density, "autocorrelation_lag8": lasting + 0.001 * seed * (arm == "tc16")}
            saes.append(one._replace(folder=folder, features=features))
    (found,) = compared(saes).features
    assert found.rates == {seed: pytest.approx(9 / 11) for seed in range(5)}
    # block H is the first 8: of those, control's 0-3 are treated's 0-3, its 5-7 treated's 5-7, and 4 moves to L
    assert found.moved == {"H to H": 35, "H to L": 5, "L to H": 5}
    changes = {(one.column, one.part): one for one in found.changes}
    whole = changes["autocorrelation_lag8", "whole"]
    assert whole.n_features == 45
    assert whole.change.value == pytest.approx(0.252)
    assert changes["density", "H"].change.value == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (float("nan"), "sae_weights.safetensors: W_enc holds 1 NaN or infinite of 192 values"),
        (0.5, "block-s0 holds other weights than when block-s0 was evaluated"),
    ],
    ids=["NaN", "trained again"],
)
def test_an_sae_that_has_changed_since_it_was_evaluated_is_not_matched(
    folder: WriteFolder, tmp_path: Path, value: float, why: str
) -> None:
    rows = torch.eye(16)[:12]
    saes = []
    for arm, alpha in (("block", 0.0), ("tc16", 0.02)):
        one = planted(arm, 0, {"l0": 30.0, REGISTERED: 0.1 + alpha}, alpha=alpha)
        where = an_sae(tmp_path / "run" / "sae" / f"{arm}-s0", rows)
        saes.append(one._replace(folder=where, features={"density": np.full(12, 0.1)}))
    out = folder(saes)
    changed = rows.clone()
    changed[3, 4] = value
    an_sae(tmp_path / "run" / "sae" / "block-s0", changed)
    words = ["compare", str(out), "--report", str(tmp_path / "report")]
    command = [sys.executable, "-P", "-m", "tcsae.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (features,) = json.loads((tmp_path / "report" / "compare.json").read_text())["matched_features"]
    assert features["reason"].startswith("undefined, because ")
    assert why in features["reason"]
    assert (features["rates"], features["changes"]) == ({}, [])
    assert why in (tmp_path / "report" / "report.md").read_text()


def test_saes_that_are_gone_take_only_the_matched_features_with_them(standard: Compared) -> None:
    found = standard
    assert [one.reason for one in found.features] == [found.features[0].reason]
    assert "is no longer at" in (found.features[0].reason or "")
    assert any(line.startswith("matched features of tc16-k") for line in found.not_computed)
    assert any(
        line.startswith("training_metrics.png: the run folders are not") for line in found.not_computed
    )


# Front -------------------------------------------------------------------------------------------------


def test_the_front_is_what_no_arm_beats_in_both(compared: Callable[..., Compared]) -> None:
    # at L0 30: consistency 1, 2, 3 at FVU 0.1, 0.2, 0.15: the second is beaten by the third
    arms = {0.0: (1, 0.9), 0.02: (2, 0.8), 0.1: (3, 0.85)}
    saes = [
        planted(f"a{alpha}", 0, {"l0": 30.0, "explained_variance": ev, REGISTERED: y}, alpha=alpha)
        for alpha, (y, ev) in arms.items()
    ]
    points = {one.alpha: one for one in compared(saes).points}
    assert [points[alpha].on_front["fvu"] for alpha in arms] == [True, False, True]
    assert [points[alpha].on_front["l0"] for alpha in arms] == [False, False, True]
    assert len({one.trace for one in points.values()}) == 1
