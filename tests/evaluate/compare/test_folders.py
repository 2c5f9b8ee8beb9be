"""What is refused, with both sides named, and what is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcsae.evaluate.compare.folders import read_folders
from tcsae.store.errors import ConfigError, RunError, RunMismatch, RunNotFound

from .conftest import planted

WriteFolder = Callable[..., Path]
FIGURES = {"l0": 30.0, "explained_variance": 0.75, "autocorrelation_whole_lag8": 0.1}


def test_two_folders_measured_alike_are_one_set_of_saes(folder: WriteFolder) -> None:
    one = folder([planted("tc16", 0, FIGURES)], "one")
    other = folder(
        [planted("tc16", 1, FIGURES), planted("block", 0, FIGURES)], "other", conditions={"tcsae": "0.2"}
    )
    found = read_folders([one, other])
    assert [(sae.arm, sae.seed) for sae in found.saes] == [("tc16", 0), ("tc16", 1), ("block", 0)]
    assert found.hook == "blocks.1.hook_resid_post"


def test_fvu_is_one_minus_explained_variance_in_every_resample(folder: WriteFolder) -> None:
    import numpy as np

    (sae,) = read_folders([folder([planted("a", 0, {"explained_variance": np.linspace(0.5, 0.9, 40)})])]).saes
    ev = sae.draws["explained_variance"]
    assert sae.draws["fvu"].draws == pytest.approx(1 - ev.draws)
    assert sae.draws["fvu"].leave_one_out == pytest.approx(1 - ev.leave_one_out)
    assert sae.estimates["fvu"].low == pytest.approx(1 - (sae.estimates["explained_variance"].high or 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"store": "store-2"}, "store is store-1 there and store-2 here", id="another store"),
        pytest.param({"model": "huge"}, "model is tiny there and huge here", id="another model"),
        pytest.param(
            {"model": "huge", "store": "store-2"},
            "model is tiny there and huge here",
            id="another model's store",
        ),
        pytest.param({"model_sha256": "1" * 64}, "model_sha256", id="other weights"),
        pytest.param(
            {"hooks": ["blocks.2.hook_resid_post"]}, "hooks is .*blocks.1.*blocks.2", id="another hook"
        ),
        pytest.param({"split": "train"}, "split is test there and train here", id="another split"),
        pytest.param({"n_bootstrap": 500}, "n_bootstrap is 400 there and 500 here", id="other resamples"),
        pytest.param({"max_tokens": 9}, "max_tokens is 500 there and 9 here", id="other replay"),
        pytest.param(
            {"forget": ["law"]}, "forget is None there and .'law'. here", id="a suite's own setting"
        ),
    ],
)
def test_folders_measured_otherwise_are_refused_and_both_are_named(
    folder: WriteFolder, changes: dict[str, Any], message: str
) -> None:
    one = folder([planted("tc16", 0, FIGURES)], "one")
    other = folder([planted("block", 0, FIGURES)], "other", conditions=changes)
    with pytest.raises(RunMismatch, match=rf"one and .*other were not measured alike: {message}"):
        read_folders([one, other])


def test_another_seed_of_the_resamples_is_refused(folder: WriteFolder) -> None:
    one, other = (
        folder([planted("a", 0, FIGURES)], "one"),
        folder([planted("b", 0, FIGURES)], "other", seed=1),
    )
    with pytest.raises(RunMismatch, match="seed is 0 there and 1 here"):
        read_folders([one, other])


def test_a_suite_that_one_folder_lacks_is_named(folder: WriteFolder) -> None:
    one = folder([planted("a", 0, FIGURES)], "one")
    other = folder([planted("b", 0, {"l0": 30.0})], "other")
    with pytest.raises(RunMismatch, match=r"other: without suite temporal, which .*one has"):
        read_folders([one, other])


def test_one_sae_in_two_folders_is_refused(folder: WriteFolder) -> None:
    one, other = (folder([planted("a", 0, FIGURES)], name) for name in ("one", "other"))
    _edit(other, lambda summary: summary["saes"][0]["origin"].update(digest=_digest(one)))
    with pytest.raises(RunMismatch, match=r"one: a-s0 and .*other: a-s0 are one SAE"):
        read_folders([one, other])


def test_two_saes_of_one_arm_and_seed_are_refused(folder: WriteFolder) -> None:
    one, other = (folder([planted("a", 0, FIGURES)], name) for name in ("one", "other"))
    with pytest.raises(RunMismatch, match="are both arm 'a' of seed 0"):
        read_folders([one, other])


def test_arms_of_one_name_that_were_not_trained_alike_are_told_apart(folder: WriteFolder) -> None:
    one = folder([planted("a", 0, FIGURES)], "one")
    other = folder([planted("a", 0, FIGURES, alpha=0.3)], "other")
    assert [sae.arm for sae in read_folders([one, other]).saes] == ["one-a", "other-a"]


def test_saes_of_two_hooks_in_one_folder_are_refused(folder: WriteFolder) -> None:
    out = folder([planted("a", 0, FIGURES), planted("b", 0, FIGURES)])
    _edit(out, lambda summary: summary["saes"][1]["origin"].update(hook="blocks.2.hook_resid_post"))
    with pytest.raises(RunMismatch, match=r"a-s0 reads blocks\.1.*b-s0 reads blocks\.2"):
        read_folders([out])


def test_what_is_not_a_finished_evaluation_is_refused_in_one_line(
    folder: WriteFolder, tmp_path: Path
) -> None:
    with pytest.raises(RunNotFound, match=r"nowhere/summary\.json: no such file; .*tcsae evaluate"):
        read_folders([tmp_path / "nowhere"])
    out = folder([planted("a", 0, FIGURES)])
    with pytest.raises(ConfigError, match="given twice"):
        read_folders([out, out])
    with pytest.raises(ConfigError, match="at least one evaluation folder"):
        read_folders([])


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        pytest.param(lambda s: s["saes"][0].pop("origin"), RunError, "older tcsae", id="no origin"),
        pytest.param(
            lambda s: s["conditions"].pop("result_version"), RunError, "older tcsae", id="no version"
        ),
        pytest.param(
            lambda s: s["conditions"].update(result_version=99),
            RunMismatch,
            "results of version 99",
            id="newer",
        ),
        pytest.param(
            lambda s: s["saes"][0].pop("seed"), RunError, "fields are missing", id="a field is missing"
        ),
        pytest.param(lambda s: s.update(saes=[]), RunError, "holds no SAE", id="empty"),
        pytest.param(lambda s: s.update(saes=3), RunError, "not a summary", id="another file"),
        pytest.param(
            lambda s: s["saes"][0]["metrics"]["l0"].update(value=1.0),
            RunError,
            "was not finished",
            id="stale",
        ),
    ],
)
def test_a_damaged_or_foreign_summary_is_refused(
    folder: WriteFolder, edit: Callable[[dict[str, Any]], object], error: type[Exception], message: str
) -> None:
    out = folder([planted("a", 0, FIGURES)])
    _edit(out, edit)
    with pytest.raises(error, match=message):
        read_folders([out])


def test_missing_draws_are_refused(folder: WriteFolder) -> None:
    out = folder([planted("a", 0, FIGURES)])
    (out / "draws" / "core" / "a-s0.parquet").unlink()
    with pytest.raises(RunError, match=r"core/a-s0\.json: missing, or without its draws"):
        read_folders([out])


def test_damaged_draws_are_refused(folder: WriteFolder) -> None:
    out = folder([planted("a", 0, FIGURES)])
    path = out / "draws" / "core" / "a-s0.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"draws/core/a-s0\.parquet: not a table that tcsae wrote"):
        read_folders([out])


def test_a_result_whose_fields_are_of_another_kind_is_refused(folder: WriteFolder) -> None:
    out = folder([planted("a", 0, FIGURES)])
    path = out / "core" / "a-s0.json"
    body = json.loads(path.read_text())
    body["eval_result_unstructured"]["tcsae"]["estimates"] = []
    path.write_text(json.dumps(body))
    with pytest.raises(RunError, match=r"core/a-s0\.json: not a result that tcsae wrote"):
        read_folders([out])


@pytest.mark.parametrize(
    ("figures", "is_used"), [(FIGURES, True), ({"l0": 30.0}, False)], ids=["temporal", "core alone"]
)
def test_a_table_of_features_that_an_earlier_evaluation_left_is_not_used(
    folder: WriteFolder, figures: dict[str, float], is_used: bool
) -> None:
    one = planted("a", 0, figures)._replace(features={"density": [0.1, 0.2]})
    (sae,) = read_folders([folder([one])]).saes
    assert (sae.features is not None) == is_used


def _edit(out: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    summary = json.loads((out / "summary.json").read_text())
    edit(summary)
    (out / "summary.json").write_text(json.dumps(summary))


def _digest(out: Path) -> str:
    return str(json.loads((out / "summary.json").read_text())["saes"][0]["origin"]["digest"])
