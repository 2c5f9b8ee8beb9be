"""`evaluate` on a synthetic store: the truth by itself, what the rows give, and why there is no more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tcsae.evaluate import EvaluateConfig, Evaluation, evaluate, table
from tcsae.harvest.synthetic import truth_of_store
from tcsae.store import ActivationStore
from tcsae.store.errors import StoreMismatch
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import save_sae

from .known import known_store, solving


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return known_store(tmp_path_factory.mktemp("suite"), documents=80, length=60, context_length=60)


@pytest.fixture(scope="module")
def run(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three SAEs of the true directions, with slow, any, and fast features in block H."""
    folder = tmp_path_factory.mktemp("run")
    truth = truth_of_store(store).truth
    orders = {
        "slow": np.argsort(truth.kind, kind="stable"),
        "any": np.arange(truth.n_features),
        "fast": np.argsort(-truth.kind.astype(int), kind="stable"),
    }
    for name, order in orders.items():
        metadata = {"hook_name": "synthetic", "tcsae": {"arm": name, "seed": 0}}
        sae = solving(truth, order, 8, name=f"{name}-s0", metadata=metadata)
        save_sae(sae, folder / "sae" / f"{name}-s0")
    return folder


@pytest.fixture(scope="module")
def config(run: Path, store: ActivationStore) -> EvaluateConfig:
    return EvaluateConfig(
        saes=(run,), out=run / "out", store=store.path, split="all", device="cpu", n_bootstrap=100
    )


@pytest.fixture(scope="module")
def evaluation(config: EvaluateConfig) -> Evaluation:
    return evaluate(config)


def test_the_truth_is_measured_beside_the_default_suites(evaluation, config):
    assert evaluation.conditions["suites"] == ["core", "temporal", "truth"]
    written = json.loads((config.out / "truth" / "slow-s0.json").read_text())
    assert written["eval_type_id"] == "tcsae_truth"
    assert written["eval_result_metrics"]["truth"]["slow_in_H"] == 1
    details = written["eval_result_details"]
    assert len(details) == 40
    assert {one["kind"] for one in details if one["best_feature"] < 8} == {"slow"}


def test_temporal_metrics_rank_blocks_as_the_truth_does(evaluation, config):
    agreed = {one.metric: one for one in evaluation.ranking.over_saes}
    for metric in ("autocorrelation_H_lag8", "persistence_H_lag8", "run_length_H"):
        assert agreed[metric].spearman == pytest.approx(1), metric
        assert agreed[metric].n == 3
    # the whole dictionary is the same in all three
    assert agreed["run_length_whole"].reason == "undefined, because all SAEs have the same figure"
    written = json.loads((config.out / "truth" / "ranking.json").read_text())
    assert {one["metric"] for one in written["over_saes"]} == set(agreed)
    assert set(written["over_features"]) == {"slow-s0", "any-s0", "fast-s0"}


def test_core_gives_the_rows_figures_and_says_why_no_model_was_replayed(evaluation):
    row = evaluation.rows[0]
    assert row.estimates["explained_variance"].value > 0.97
    assert row.estimates["l0"].value > 1
    for metric in ("loss_recovered", "kl_sae", "ce_clean"):
        assert row.estimates[metric].value is None
        assert row.estimates[metric].reason == "undefined, because no language model made the store"
    written = json.loads((evaluation.out / "core" / f"{row.sae}.json").read_text())
    assert written["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"] == -1
    reasons = written["eval_result_unstructured"]["tcsae"]["undefined"]
    assert reasons["ce_loss_score"] == "undefined, because no language model made the store"
    assert "n_replayed_documents" not in evaluation.conditions
    assert (evaluation.out / "final_metrics.png").stat().st_size > 1000


def test_the_table_shows_the_truth_within_its_width(evaluation):
    text = table(evaluation)
    assert "slow in H" in text
    assert "Rank agreement with the true run length" in text
    assert "run_length_H 1.00" in text
    assert max(map(len, text.splitlines())) <= 120


def test_finished_results_are_read_and_not_measured_again(evaluation, config):
    before = {p: p.stat().st_mtime_ns for p in config.out.glob("truth/*-s0.json")}
    again = evaluate(config)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert again.rows[0].estimates["f1"] == evaluation.rows[0].estimates["f1"]


def test_a_store_of_a_model_has_no_truth_to_hold_against(make_store, tmp_path):
    store = make_store(torch.randn(400, 64), [20] * 20)
    save_sae(SAE.identity(64), tmp_path / "sae")
    asked = EvaluateConfig(saes=(tmp_path / "sae",), out=tmp_path / "o", store=store.path, suites=("truth",))
    with pytest.raises(StoreMismatch, match="made by model made-by-hand, whose features nobody knows"):
        evaluate(asked)


def test_what_needs_a_model_is_refused_before_anything_is_measured(config, tmp_path):
    asked = EvaluateConfig(
        saes=config.saes,
        out=tmp_path / "o",
        store=config.store,
        split="all",
        suites=("temporal", "unlearning"),
    )
    with pytest.raises(StoreMismatch, match="by no language model, so there is none to replay"):
        evaluate(asked)
    assert not (tmp_path / "o" / "temporal").exists()
