"""Agreement with the truth is that of ranks, and a metric of persistence has it where it measures persistence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from tcsae.evaluate.estimates import Draws, Estimate, SuiteResult
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.truth_oracle import FILE as ORACLE_FILE
from tcsae.evaluate.truth_oracle import oracle_table
from tcsae.evaluate.truth_ranking import Ranking, bonett_wright, rank, ranking_lines, spearman, write_ranking
from tcsae.harvest.synthetic import SyntheticSource, truth_of_store
from tcsae.store import ActivationStore

from .known import known_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return known_store(tmp_path_factory.mktemp("ranking"), documents=60, length=120, context_length=120)


@pytest.fixture(scope="module")
def source(store: ActivationStore) -> SyntheticSource:
    return truth_of_store(store)


@pytest.fixture(scope="module")
def oracle(
    store: ActivationStore, source: SyntheticSource, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    return oracle_table(HeldOut(store, "synthetic", "all"), source, tmp_path_factory.mktemp("out"), seed=0)


def suite(
    values: dict[str, float | None], draws: dict[str, np.ndarray] | None = None, **facts
) -> SuiteResult:
    estimates = {
        name: Estimate(name, "1", value, None, None, 9, None, None) for name, value in values.items()
    }
    kept = {name: Draws(0.0, found, np.zeros(3)) for name, found in (draws or {}).items()}
    return SuiteResult("p", estimates, kept, {"matches": {"true": [], "feature": []}} | facts)


def ranking_of(temporal: list[SuiteResult], true: list[float | None], source, out: Path, oracle) -> Ranking:
    names = [f"sae-{at}" for at in range(len(true))]
    truths = {name: suite({"true_run_length_H": value}) for name, value in zip(names, true, strict=True)}
    return rank(dict(zip(names, temporal, strict=True)), truths, source, out, oracle)


def test_ranks_that_agree_and_ranks_that_are_turned(source, tmp_path, oracle):
    temporal = [
        suite({"persistence_H_lag8": a, "smoothness_H": b, "autocorrelation_H_lag8": c, "l0": 3.0})
        for a, b, c in ((0.1, 9.0, 0.4), (0.2, 8.0, 0.3), (0.7, 2.0, 0.1), (0.9, 1.0, 0.2))
    ]
    found = ranking_of(temporal, [3.0, 5.0, 8.0, 20.0], source, tmp_path, oracle)
    agreed = {one.metric: one for one in found.over_saes}
    assert set(agreed) == {"persistence_H_lag8", "smoothness_H", "autocorrelation_H_lag8"}
    assert agreed["persistence_H_lag8"].spearman == agreed["persistence_H_lag8"].kendall == pytest.approx(1)
    # smoothness falls with persistence, so falling values are agreement
    assert agreed["smoothness_H"].spearman == pytest.approx(1)
    # ranks 4, 3, 1, 2 against 1, 2, 3, 4: 1 - 6 (9 + 1 + 4 + 4) / 60 and (1 - 5) / 6
    assert agreed["autocorrelation_H_lag8"].spearman == pytest.approx(-0.8)
    assert agreed["autocorrelation_H_lag8"].kendall == pytest.approx(-4 / 6)
    assert agreed["smoothness_H"].reason == "no interval, because a figure has no resamples"


def test_the_interval_is_over_documents_with_the_saes_held_fixed(source, tmp_path, oracle):
    generator = np.random.default_rng(0)
    metric = "timescale_H"
    temporal, all_draws = [], []
    for value in (1.0, 1.3, 1.5, 2.0):
        draws = value + 0.3 * generator.standard_normal(500)
        temporal.append(suite({metric: value}, {metric: draws}))
        all_draws.append(draws)
    found = ranking_of(temporal, [3.0, 5.0, 8.0, 20.0], source, tmp_path, oracle).over_saes[0]
    by_hand = [spearmanr(one, [3.0, 5.0, 8.0, 20.0]).statistic for one in np.stack(all_draws, axis=1)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))
    assert found.low < found.spearman == 1


def test_what_cannot_be_ranked_says_why(source, tmp_path, oracle):
    two = [suite({"persistence_H_lag8": value}) for value in (0.1, 0.2)]
    found = ranking_of(two, [3.0, 5.0], source, tmp_path, oracle).over_saes[0]
    assert (found.spearman, found.n) == (None, 2)
    assert found.reason == "undefined, because fewer than 3 SAEs have it and true_run_length_H"
    assert ranking_lines((found,), 8) == [
        "Ranking of SAEs by the truth: undefined, because fewer than 3 SAEs have it and true_run_length_H."
    ]
    alike = [suite({"persistence_H_lag8": 0.1}) for _ in range(3)]
    found = ranking_of(alike, [3.0, 5.0, 6.0], source, tmp_path, oracle).over_saes[0]
    assert found.reason == "undefined, because all SAEs have the same figure"
    without = [suite({"persistence_H_lag8": value}) for value in (0.1, 0.2, 0.3)]
    found = ranking_of(without, [3.0, None, 6.0], source, tmp_path, oracle).over_saes[0]
    assert found.n == 2


def test_features_are_ranked_through_their_matches(source, tmp_path, oracle):
    run_length = source.truth.run_length
    true = np.arange(5, 25)
    values = np.full(30, np.nan)
    values[true + 3] = -run_length[true]  # feature f + 3 stands for true feature f
    table = pa.table(
        {"feature": np.arange(30), "density": np.ones(30), "total_variation": values, "run_length": values}
    )
    (tmp_path / "features").mkdir()
    pq.write_table(table, tmp_path / "features" / "a.parquet")
    matches = {"true": true.tolist(), "feature": (true + 3).tolist()}
    found = rank({"a": suite({})}, {"a": suite({}, matches=matches)}, source, tmp_path, oracle)
    agreed = {one.metric: one for one in found.over_features["a"]}
    assert set(agreed) == {"total_variation", "run_length"}
    assert agreed["total_variation"].spearman == pytest.approx(1)
    assert agreed["run_length"].spearman == pytest.approx(-1)
    assert agreed["run_length"].n == 20


def test_metrics_of_the_true_codes_order_the_kinds_and_the_features(source, tmp_path, oracle):
    found = ranking_of([], [], source, tmp_path, oracle)
    for metric in (
        "autocorrelation_lag8",
        "persistence_lag8",
        "excess_information_lag8",
        "timescale",
        "run_length",
    ):
        means = found.oracle[metric]
        assert means["slow"] > means["medium"] > means["fast"], metric
    agreed = {one.metric: one for one in found.over_true_features}
    assert agreed["run_length"].spearman > 0.9
    assert agreed["total_variation"].spearman > 0.9  # its sign turned
    assert agreed["autocorrelation_lag8"].low > 0.5
    write_ranking(found, tmp_path)
    written = json.loads((tmp_path / "truth" / "ranking.json").read_text())
    assert written["oracle"]["run_length"]["fast"] == pytest.approx(found.oracle["run_length"]["fast"])


def test_true_run_lengths_are_measured_on_the_true_codes(source, oracle):
    # runs cut by a context's ends count shorter, so the fast ones, which hardly are, fit the closed form
    fast = source.truth.of_kind("fast")
    measured = oracle["run_length"].to_numpy()[fast]
    assert measured.mean() == pytest.approx(source.truth.run_length[fast].mean(), rel=0.02)


def test_the_oracles_table_is_read_again_for_the_same_documents_alone(store, source, tmp_path):
    held_out = HeldOut(store, "synthetic", "test")
    first = oracle_table(held_out, source, tmp_path, seed=0)
    written = (tmp_path / ORACLE_FILE).stat().st_mtime_ns
    assert oracle_table(held_out, source, tmp_path, seed=0).equals(first)
    assert (tmp_path / ORACLE_FILE).stat().st_mtime_ns == written
    oracle_table(held_out, source, tmp_path, seed=1)
    assert (tmp_path / ORACLE_FILE).stat().st_mtime_ns > written


def test_ties_share_their_rank():
    x, y = np.array([1.0, 2.0, 2.0, 5.0]), np.array([3.0, 1.0, 4.0, 4.0])
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(spearman(np.ones(4), y))


def test_the_interval_over_features_covers():
    # 95 % of intervals hold the correlation of the ranks of a large sample of the same distribution
    generator = np.random.default_rng(0)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        x = generator.standard_normal(n)
        return x, x + generator.standard_normal(n)

    expected = float(spearman(*draw(200_000)))
    held = []
    for _ in range(400):
        low, high = bonett_wright(float(spearman(*draw(50))), 50)
        held.append(low <= expected <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.04)
