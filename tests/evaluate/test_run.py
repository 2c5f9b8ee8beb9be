"""`evaluate` from folders to folder: files, resuming, refusals, table and figure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tcsae.evaluate import EvaluateConfig, Evaluation, evaluate, table
from tcsae.evaluate.saebench import CATEGORIES
from tcsae.evaluate.subjects import control_of, find_saes, load_subject, subject, with_unique_names
from tcsae.harvest.model import LanguageModel
from tcsae.store import ActivationStore
from tcsae.store.errors import (
    ConfigError,
    Interrupted,
    RunBusy,
    RunNotFound,
    StoreMismatch,
    TrainingCollapsed,
)
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import save_sae

from .conftest import HOOK, made_by

StoreFactory = Callable[..., ActivationStore]

ENVELOPE = {
    "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics",
    "eval_result_details", "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version",
    "sae_cfg_dict", "eval_result_unstructured",
}  # fmt: skip


def an_sae(name: str, alpha: float, model: LanguageModel, **changes: Any) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    fields: dict[str, Any] = {
        "architecture": "standard",
        "W_enc": W_dec.T.clone() + 0.1 * alpha,
        "b_enc": torch.zeros(24),
        "W_dec": W_dec,
        "b_dec": torch.zeros(16),
        "block_size": 6,
        "name": f"{name}-s0",
        "metadata": {
            "model_name": model.name,
            "hook_name": HOOK,
            "tcsae": {
                "arm": name,
                "seed": 0,
                "model_sha256": model.sha256,
                "recipe": {"alpha": alpha, "window": 16},
            },
        },
    }
    return SAE(**(fields | changes))


def save_seed(run: Path, model: LanguageModel, seed: int, **recipe: Any) -> Path:
    """Save one seed of arm tc16 into a run; the SAE's folder."""
    sae = an_sae("tc16", 1.0, model)
    sae.name = f"tc16-s{seed}"
    sae.metadata["tcsae"] |= {"seed": seed, "recipe": {"alpha": 1.0, "window": 16} | recipe}
    folder = run / "sae" / sae.name
    save_sae(sae, folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, neox: LanguageModel) -> Path:
    """A run folder of two arms, one the control of the other."""
    for name, alpha in (("batchtopk", 0.0), ("tc16", 1.0)):
        save_sae(an_sae(name, alpha, neox), tmp_path / "run" / "sae" / f"{name}-s0")
    return tmp_path / "run"


def config_of(run: Path, store: ActivationStore, **changes: Any) -> EvaluateConfig:
    fields: dict[str, Any] = {
        "saes": (run,),
        "out": run.parent / "out",
        "store": store.path,
        "split": "all",
        "max_tokens": 200,
        "batch_size": 4,
        "n_bootstrap": 100,
        "device": "cpu",
    }
    return EvaluateConfig(**(fields | changes))


@pytest.fixture
def evaluation(run: Path, neox_store: ActivationStore) -> Evaluation:
    return evaluate(config_of(run, neox_store))


# Files -------------------------------------------------------------------------------------------------


def test_the_core_file_has_saebenchs_envelope_every_category_and_every_field(evaluation: Evaluation) -> None:
    body = json.loads((evaluation.out / "core" / "tc16-s0.json").read_text())
    assert body.keys() == ENVELOPE
    assert body["eval_type_id"] == "core"
    assert {c: tuple(m) for c, m in body["eval_result_metrics"].items()} == CATEGORIES
    assert len(body["eval_result_details"]) == 24
    assert body["eval_config"]["context_size"] == 21
    stats = body["eval_result_metrics"]["token_stats"]
    assert (
        stats["total_tokens_eval_reconstruction"]
        == 21 * 4 * body["eval_config"]["n_eval_reconstruction_batches"]
    )


def test_the_core_file_says_what_sample_its_figures_rest_on(
    evaluation: Evaluation, neox_store: ActivationStore
) -> None:
    body = json.loads((evaluation.out / "core" / "tc16-s0.json").read_text())
    assert body["eval_result_unstructured"]["tcsae"]["conditions"] == {
        "store": neox_store.id,
        "split": "all",
        "max_tokens": 200,
        "n_bootstrap": 100,
        "seed": 0,
    }


def test_repaired_figures_say_whether_they_come_from_the_store_or_the_replay(evaluation: Evaluation) -> None:
    body = json.loads((evaluation.out / "core" / "tc16-s0.json").read_text())
    ours = body["eval_result_unstructured"]["tcsae"]
    assert "explained_variance" in ours["store"]["metrics"]
    assert "loss_recovered" in ours["replay"]["metrics"]
    assert set(ours["estimates"]) == {*ours["store"]["metrics"], *ours["replay"]["metrics"]}
    assert ours["store"]["n_documents"] == 40
    assert ours["replay"]["n_documents"] < 40
    for estimate in ours["estimates"].values():
        assert estimate["value"] is not None
        assert (estimate["low"] is None) == (estimate["reason"] is not None)
        if estimate["low"] is not None:
            assert estimate["low"] <= estimate["high"]


def test_the_summary_is_one_line_a_figure(evaluation: Evaluation) -> None:
    found = pq.read_table(evaluation.out / "summary.parquet")
    assert found.column_names == [
        "sae", "arm", "seed", "metric", "value", "low", "high", "n_documents", "unit",
    ]  # fmt: skip
    assert found.num_rows == sum(len(row.estimates) for row in evaluation.rows)
    assert json.loads((evaluation.out / "summary.json").read_text())["comparisons"][0]["control"] == (
        "batchtopk-s0"
    )


def test_the_contrastive_arm_is_compared_with_its_control_in_pairs(evaluation: Evaluation) -> None:
    (comparison,) = evaluation.comparisons
    assert (comparison.sae, comparison.control) == ("tc16-s0", "batchtopk-s0")
    difference = comparison.estimates["autocorrelation_H_lag8_difference"]
    value = {row.sae: row.estimates["autocorrelation_H_lag8"].value for row in evaluation.rows}
    treated, control = value["tc16-s0"], value["batchtopk-s0"]
    assert treated is not None
    assert control is not None
    assert difference.value == pytest.approx(treated - control)


def test_the_table_fits_120_columns_and_names_every_arm(evaluation: Evaluation) -> None:
    lines = table(evaluation).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[2].startswith("batchtopk")
    assert lines[3].startswith("tc16")
    assert len({len(line) for line in lines[1:4]}) == 1


def test_note_and_caption_name_the_replayed_documents(
    run: Path, neox_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[str] = []
    monkeypatch.setattr(
        "tcsae.evaluate.finish.final_metrics", lambda _rows, _path, caption: captions.append(caption)
    )
    found = evaluate(config_of(run, neox_store))
    replayed = found.rows[0].estimates["loss_recovered"].n_documents
    assert replayed < 40
    assert found.conditions["n_replayed_documents"] == replayed
    assert found.conditions["n_outliers_left_out"] == {HOOK: 0}
    assert f"40 documents, KL on {replayed} of them;" in captions[0]
    assert "outlier" not in captions[0]
    assert f"spliced in, on {replayed} of them" in " ".join(table(found).split())


def test_the_figure_is_a_png_of_one_columns_width_and_wider_than_high(evaluation: Evaluation) -> None:
    assert evaluation.figure is not None
    header = evaluation.figure.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(header[a : a + 4]) for a in (16, 20))
    assert width == int(85 / 25.4 * 450)  # 85 mm at 450 dots an inch
    assert width > height


# Resuming ----------------------------------------------------------------------------------------------


def test_finished_results_are_kept_and_need_no_model(
    run: Path, neox_store: ActivationStore, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((evaluation.out / "core").glob("*.json"))
    before = [file.stat().st_mtime_ns for file in files]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("tcsae.harvest.model.load_model", refuse)
    again = evaluate(config_of(run, neox_store))
    assert [file.stat().st_mtime_ns for file in files] == before
    assert [row.estimates for row in again.rows] == [row.estimates for row in evaluation.rows]
    assert again.comparisons == evaluation.comparisons


def test_only_what_is_missing_is_measured_and_it_comes_out_the_same(
    run: Path, neox_store: ActivationStore, evaluation: Evaluation
) -> None:
    kept = (evaluation.out / "core" / "batchtopk-s0.json").stat().st_mtime_ns
    (evaluation.out / "core" / "tc16-s0.json").unlink()
    again = evaluate(config_of(run, neox_store))
    assert (evaluation.out / "core" / "batchtopk-s0.json").stat().st_mtime_ns == kept
    for old, new in zip(evaluation.rows, again.rows, strict=True):
        for name, estimate in old.estimates.items():
            value = new.estimates[name].value
            assert (value is None) == (estimate.value is None)
            assert value is None or value == pytest.approx(estimate.value, rel=1e-5, abs=1e-6)


def test_other_settings_are_measured_again(
    run: Path, neox_store: ActivationStore, evaluation: Evaluation
) -> None:
    again = evaluate(config_of(run, neox_store, max_tokens=100))
    before, after = evaluation.rows[0].estimates, again.rows[0].estimates
    assert after["ce_clean"].n_documents < before["ce_clean"].n_documents
    assert after["explained_variance"] == before["explained_variance"]


def test_an_interrupted_evaluation_keeps_what_is_finished_and_says_how_to_go_on(
    run: Path, neox_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tcsae.evaluate.core.Replay.add", stop)
        with pytest.raises(Interrupted, match="run the same command again"):
            evaluate(config_of(run, neox_store))
    finished = run.parent / "out" / "temporal" / "tc16-s0.json"
    before = finished.stat().st_mtime_ns
    assert len(evaluate(config_of(run, neox_store)).rows) == 2
    assert finished.stat().st_mtime_ns == before


# Refusals ----------------------------------------------------------------------------------------------


def test_an_sae_of_another_hook_is_refused_and_both_are_named(
    tmp_path: Path, neox: LanguageModel, neox_store: ActivationStore
) -> None:
    metadata = {"model_name": neox.name, "hook_name": "blocks.2.hook_resid_post"}
    save_sae(an_sae("other", 0, neox, metadata=metadata), tmp_path / "other")
    with pytest.raises(StoreMismatch, match=r"blocks\.2\.hook_resid_post.*blocks\.1\.hook_resid_post"):
        evaluate(config_of(tmp_path / "other", neox_store))


def test_an_sae_of_another_model_is_refused_and_both_are_named(
    neox: LanguageModel, neox_store: ActivationStore
) -> None:
    metadata = {"model_name": "EleutherAI/pythia-70m", "hook_name": HOOK}
    with pytest.raises(StoreMismatch, match="EleutherAI/pythia-70m.*neox"):
        subject(an_sae("other", 0, neox, metadata=metadata), neox_store, where="other")


def test_an_sae_of_another_width_is_refused(neox_store: ActivationStore) -> None:
    with pytest.raises(StoreMismatch, match="12 dimensions.*16"):
        subject(SAE.identity(12), neox_store, where="narrow")


def test_a_model_with_other_weights_than_the_stores_is_refused(
    run: Path, make_store: StoreFactory, neox: LanguageModel
) -> None:
    made = made_by(neox) | {"tokenizer_sha256": "f" * 64}
    store = make_store(torch.randn(60, 16), [30, 30], context_rows=20, **made)
    with pytest.raises(StoreMismatch, match="ffffffffffff.*neox"):
        evaluate(config_of(run, store, suites=("core",)))


def test_an_sae_with_nan_weights_is_refused(neox: LanguageModel, neox_store: ActivationStore) -> None:
    broken = torch.zeros(24)
    broken[3] = torch.nan
    with pytest.raises(TrainingCollapsed, match="b_enc holds 1 NaN or infinite of 24"):
        subject(an_sae("broken", 0, neox, b_enc=broken), neox_store, where="broken")


@pytest.mark.parametrize("suite", ["core", "temporal"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_measured(
    run: Path, neox_store: ActivationStore, suite: Any
) -> None:
    with pytest.raises(ConfigError, match="device: .* got 'abacus'"):
        evaluate(config_of(run, neox_store, suites=(suite,), device="abacus"))
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_mid", "blocks.1.ln2.hook_in"])
def test_nothing_is_spliced_beside_the_residual_stream(
    tmp_path: Path, make_store: StoreFactory, neox: LanguageModel, hook: str
) -> None:
    store = make_store(torch.randn(60, 16), [30, 30], context_rows=20, **made_by(neox) | {"hooks": (hook,)})
    save_sae(an_sae("mid", 0, neox, metadata={"hook_name": hook}), tmp_path / "mid")
    with pytest.raises(ConfigError, match=rf"{hook}.*--suite temporal"):
        evaluate(config_of(tmp_path / "mid", store))
    assert len(evaluate(config_of(tmp_path / "mid", store, suites=("temporal",))).rows) == 1


def test_a_split_without_documents_is_refused(
    run: Path, make_store: StoreFactory, neox: LanguageModel
) -> None:
    store = make_store(torch.randn(30, 16), [30], context_rows=20, **made_by(neox))  # its hash says train
    with pytest.raises(StoreMismatch, match="no document in split 'test'"):
        evaluate(config_of(run, store, split="test"))


def test_one_document_gives_figures_and_says_why_there_is_no_interval(
    run: Path, make_store: StoreFactory, neox: LanguageModel
) -> None:
    tokens = np.arange(1, 41)
    store = make_store(torch.randn(40, 16), [40], context_rows=20, tokens=tokens, **made_by(neox))
    estimate = evaluate(config_of(run, store)).rows[0].estimates["explained_variance"]
    assert estimate.value is not None
    assert estimate.low is None
    assert estimate.reason is not None
    assert "one document" in estimate.reason


def test_a_block_that_never_fires_is_undefined_with_its_reason(
    tmp_path: Path, neox: LanguageModel, neox_store: ActivationStore
) -> None:
    b_enc = torch.zeros(24)
    b_enc[:6] = -1e6
    save_sae(an_sae("silent", 0, neox, b_enc=b_enc), tmp_path / "silent")
    (row,) = evaluate(config_of(tmp_path / "silent", neox_store, suites=("temporal",))).rows
    estimate = row.estimates["autocorrelation_H_lag8"]
    assert estimate.value is None
    assert estimate.reason == "undefined, because no feature of this part fires on 10 counted tokens"


def test_two_saes_of_one_name_are_told_apart_by_their_runs_or_refused(
    run: Path, tmp_path: Path, neox: LanguageModel, neox_store: ActivationStore
) -> None:
    save_sae(an_sae("tc16", 1.0, neox), tmp_path / "second" / "sae" / "tc16-s0")
    found = evaluate(config_of(run, neox_store, saes=(run, tmp_path / "second"), suites=("temporal",)))
    assert [row.sae for row in found.rows] == ["batchtopk-s0", "run-tc16-s0", "second-tc16-s0"]
    with pytest.raises(ConfigError, match="both called"):
        evaluate(config_of(run, neox_store, saes=(run, run), suites=("temporal",)))


@pytest.mark.parametrize("name", ["_reference-raw", "_truth", ".lock", "a/../b"])
def test_a_name_that_an_evaluation_folder_needs_for_itself_is_refused(
    neox: LanguageModel, neox_store: ActivationStore, tmp_path: Path, name: str
) -> None:
    sae = an_sae("tc16", 1.0, neox)
    save_sae(sae, tmp_path / "sae")
    one = replace(load_subject(tmp_path / "sae", neox_store), name=name)
    with pytest.raises(ConfigError, match=f"'{re.escape(name)}' cannot name a file"):
        with_unique_names([one])


def test_an_arm_whose_name_occurs_in_two_runs_keeps_its_seeds_together(
    run: Path, tmp_path: Path, neox: LanguageModel, neox_store: ActivationStore
) -> None:
    save_seed(tmp_path / "run", neox, 1)
    save_seed(tmp_path / "second", neox, 0)
    paths = (run, tmp_path / "second")
    found = with_unique_names([load_subject(folder, neox_store) for p in paths for folder in find_saes(p)])
    assert [(one.arm, one.seed) for one in found] == [
        ("batchtopk", 0),
        ("run-tc16", 0),
        ("run-tc16", 1),
        ("second-tc16", 0),
    ]


@pytest.mark.parametrize(
    ("window", "arms"), [(16, ["tc16", "tc16"]), (32, ["run-tc16", "second-tc16"])], ids=["alike", "not"]
)
def test_seeds_of_two_runs_are_one_arm_only_if_trained_alike(
    tmp_path: Path, neox: LanguageModel, neox_store: ActivationStore, window: int, arms: list[str]
) -> None:
    folders = save_seed(tmp_path / "run", neox, 0), save_seed(tmp_path / "second", neox, 1, window=window)
    found = with_unique_names([load_subject(folder, neox_store) for folder in folders])
    assert [one.arm for one in found] == arms


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        pytest.param({}, True, id="equal sparsity"),
        pytest.param({"k": 64}, False, id="another k"),
        pytest.param({"block_k_share": 0.5}, False, id="another k of the block"),
    ],
)
def test_a_control_has_equal_sparsity(
    tmp_path: Path, neox: LanguageModel, neox_store: ActivationStore, recipe: dict[str, Any], found: bool
) -> None:
    sparsity = {"k": 32, "block_k_share": 0.25}
    treated = load_subject(save_seed(tmp_path / "a", neox, 0, **sparsity), neox_store)
    settings = sparsity | recipe | {"alpha": 0.0}
    control = load_subject(save_seed(tmp_path / "b", neox, 0, **settings), neox_store)
    assert (control_of(treated, [treated, control]) is control) == found


def test_a_folder_without_saes_is_refused(tmp_path: Path, neox_store: ActivationStore) -> None:
    with pytest.raises(RunNotFound, match=r"no SAE there.*cfg\.json"):
        evaluate(config_of(tmp_path / "nothing", neox_store))


def test_a_second_evaluation_into_the_same_folder_is_refused(run: Path, neox_store: ActivationStore) -> None:
    from tcsae.store.atomic import exclusive

    with exclusive(run.parent / "out" / ".lock", RunBusy("held")), pytest.raises(RunBusy, match="another"):
        evaluate(config_of(run, neox_store))


@pytest.mark.parametrize("below", ["", "below"])
def test_results_in_the_place_of_a_file_are_refused(
    below: str, run: Path, neox_store: ActivationStore, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=f"expected a folder, there or not, but {file} is a file"):
        evaluate(config_of(run, neox_store, out=file / below))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"saes": ()}, ConfigError, "at least one", id="no SAE"),
        pytest.param({"suites": ()}, ConfigError, "suites: expected some of core, temporal", id="no suite"),
        pytest.param({"max_tokens": 0}, ConfigError, "max_tokens", id="no tokens"),
        pytest.param({"n_bootstrap": 10}, ConfigError, "n_bootstrap", id="too few resamples"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    fields: dict[str, Any] = {"saes": (Path("run"),), "out": Path("out"), "store": Path("store")}
    with pytest.raises(error, match=message):
        EvaluateConfig(**(fields | changes))


def test_an_unknown_suite_or_split_is_refused_with_the_known_ones() -> None:
    # in a process of its own: here the tests' own type checker would refuse it first
    code = """
import sys
from pathlib import Path
from tcsae.evaluate.config import EvaluateConfig
from tcsae.store.errors import UnknownName
for wrong in ({"suites": ("cores",)}, {"split": "tests"}):
    try:
        EvaluateConfig(saes=(Path("run"),), out=Path("out"), store=Path("store"), **wrong)
    except UnknownName as error:
        sys.stdout.write(str(error) + "\\n")
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [
        "unknown suite 'cores'; did you mean: core",
        "unknown split 'tests'; did you mean: test",
    ]
