"""Held against a known dictionary, an oracle finds everything, chance finds what chance does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.truth import TrueCodes, TruthResult, pair_figures, truth_result
from tcsae.evaluate.truth_matching import match, purity, recovery
from tcsae.harvest import HarvestConfig, harvest
from tcsae.harvest.synthetic import SyntheticSource, truth_of_store
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE

from .known import known_store, sae_of, solving

QUICK = {"n_bootstrap": 200, "seed": 0, "print_": "p"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Contexts of 40 and 20 rows."""
    return known_store(tmp_path_factory.mktemp("truth"), documents=120, length=60, context_length=40)


@pytest.fixture(scope="module")
def source(store: ActivationStore) -> SyntheticSource:
    return truth_of_store(store)


@pytest.fixture(scope="module")
def held_out(store: ActivationStore) -> HeldOut:
    return HeldOut(store, "synthetic", "all")


def oracle(source: SyntheticSource) -> SAE:
    """Solves for the true values, fewer than dimensions; the slow features are block H."""
    truth = source.truth
    order = np.argsort(truth.kind, kind="stable")
    return solving(truth, order, int(truth.of_kind("slow").sum()))


@pytest.fixture(scope="module")
def oracles_result(source: SyntheticSource, held_out: HeldOut) -> TruthResult:
    return truth_result(oracle(source), held_out, source, **QUICK)


def values(found: TruthResult) -> dict[str, float | None]:
    return {name: one.value for name, one in found.result.estimates.items()}


# An oracle, and chance


def test_an_oracle_finds_every_feature_and_has_a_pure_block(oracles_result, source):
    found = values(oracles_result)
    for name in (
        "mean_max_cosine",
        "mean_max_cosine_of_features",
        "recovered",
        "recovered_slow",
        "recovered_fast",
    ):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert (found["slow_in_H"], found["medium_in_H"], found["fast_in_H"]) == (1, 0, 0)
    assert (found["slow_minus_fast_in_H"], found["purity_H"], found["purity_L"]) == (1, 1, 0)
    assert found["share_of_H"] == found["purity_whole"] == pytest.approx(0.2)
    assert (found["paired"], found["matched_whole"]) == (1, 1)
    truth = source.truth
    slow = truth.of_kind("slow")
    assert found["true_run_length_H"] == pytest.approx(truth.run_length[slow].mean())
    assert found["true_run_length_L"] == pytest.approx(truth.run_length[~slow].mean())
    assert found["energy_weighted_true_run_length_H"] == pytest.approx(found["true_run_length_H"], rel=0.3)
    for suffix in ("", "_slow", "_medium", "_fast"):
        assert found[f"f1{suffix}"] > 0.98
        assert found[f"pearson{suffix}"] > 0.98


def test_intervals_say_what_was_resampled(oracles_result):
    estimates = oracles_result.result.estimates
    assert estimates["true_run_length_whole"].method == "bca over SAE features"
    assert estimates["f1"].method == "bca"
    assert estimates["f1"].low < estimates["f1"].value < estimates["f1"].high
    assert estimates["paired"].reason == "no interval, because it is a property of the two dictionaries"


def test_random_directions_are_recovered_at_chance(source, held_out):
    generator = np.random.default_rng(5)
    drawn = generator.standard_normal((2, 200, 64)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=2, keepdims=True)
    sae = sae_of(drawn[0], source.truth.mean, np.arange(200), 40, threshold=torch.full((200,), 0.05))
    result = truth_result(sae, held_out, source, **QUICK)
    found = values(result)
    # what 200 other random directions reach: there is nothing in the first that knows the dictionary
    chance = np.abs(source.truth.directions @ drawn[1].T - 0).max(axis=1)
    by_sign = (source.truth.directions @ drawn[1].T).max(axis=1)
    assert found["mean_max_cosine"] == pytest.approx(by_sign.mean(), abs=0.03)
    assert found["mean_max_cosine"] < chance.mean() + 0.03
    assert (found["recovered"], found["paired"], found["matched_whole"]) == (0, 0, 0)
    estimates = result.result.estimates
    assert estimates["slow_in_H"].reason == "undefined, because no feature of the kind is recovered"
    assert estimates["purity_H"].reason == "undefined, because no live feature of this part is matched"
    assert estimates["f1"].reason == "undefined, because no pair of the kind is matched and fires"


def test_a_block_drawn_at_random_has_chance_purity(source):
    truth = source.truth
    shares, purities = [], []
    for seed in range(60):
        order = np.random.default_rng(seed).permutation(truth.n_features)
        matching = match(truth.directions, truth.directions[order], np.full(len(order), 99), 8)
        common = {"n_bootstrap": 100, "seed": 0, "n_documents": 1}
        shares.append(recovery(matching, truth, **common)[0]["slow_minus_fast_in_H"].value)
        purities.append(purity(matching, truth, np.ones(len(order)), **common)[0]["purity_H"].value)
    assert np.mean(shares) == pytest.approx(0, abs=4 * np.std(shares) / np.sqrt(60))
    assert np.mean(purities) == pytest.approx(0.2, abs=4 * np.std(purities) / np.sqrt(60))


def test_a_dead_sae_is_undefined_and_not_zero(source, held_out):
    silent = sae_of(
        source.truth.directions, source.truth.mean, np.arange(40), 8, threshold=torch.full((40,), 99.0)
    )
    result = truth_result(silent, held_out, source, **QUICK)
    estimates = result.result.estimates
    assert estimates["mean_max_cosine_of_features"].value is None
    assert estimates["matched_whole"].reason == "undefined, because no feature of the SAE fires often enough"
    assert estimates["recovered"].value == 0
    assert result.details[0]["best_feature"] is None


# Matching


def test_both_matchings_on_a_dictionary_worked_by_hand():
    # rows: a copy of axis 0 that fires, a better copy that never does, a mixture of axes 1 and 2, axis 2
    half = np.sqrt(0.5)
    W_dec = np.array([[0.99, 0.141, 0.0], [1.0, 0, 0], [0, half, half], [0, 0, 3.0]])
    found = match(np.eye(3), W_dec, np.array([50, 9, 50, 50]), 1)
    assert found.live.tolist() == [True, False, True, True]
    assert found.best_feature.tolist() == [0, 2, 3]
    assert found.best_true[[0, 2, 3]].tolist() in ([0, 1, 2], [0, 2, 2])
    assert found.cosine[1].round(3).tolist() == [0.141, -1, 0.707, 0]
    # one to one: axis 1 gets the mixture although axis 2 is as near to it
    assert dict(zip(found.true_of_pair.tolist(), found.feature_of_pair.tolist(), strict=True)) == {
        0: 0,
        1: 2,
        2: 3,
    }


def test_a_pair_below_the_threshold_is_none():
    found = match(np.eye(2), np.array([[0.6, 0.8]]), np.array([99]), 0)
    assert found.true_of_pair.tolist() == [1]
    assert match(np.eye(2), np.array([[0.71, -0.71]]), np.array([99]), 0).true_of_pair.tolist() == [0]
    assert match(np.eye(2), np.array([[-0.8, -0.6]]), np.array([99]), 0).true_of_pair.tolist() == []


# True codes and pairs


def test_true_codes_follow_the_rows_of_blocks_across_documents(store, source):
    held_out = HeldOut(store, "synthetic", "test")
    codes = TrueCodes(held_out, source)
    n = 0
    for block in held_out.blocks(rows=50):  # a document's two contexts come in different blocks
        x = codes.of(block).toarray() @ source.truth.directions + source.truth.mean
        error = np.square(block.x.numpy() - x).sum() / np.square(block.x.numpy() - source.truth.mean).sum()
        assert (
            error < 0.1
        )  # the noise has 1 % of the energy on average, other rows would have twice all of it
        n += len(x)
    assert n == held_out.n_tokens


def test_figures_of_pairs_are_those_of_all_tokens_put_together(oracles_result, source, held_out):
    codes = TrueCodes(held_out, source)
    f, v = [], []
    sae = oracle(source)
    for block in held_out.blocks():
        f.append(sae.encode(block.x[block.kept]).numpy())
        v.append(codes.of(block).toarray()[block.kept.numpy()])
    f, v = np.concatenate(f).astype(float), np.concatenate(v).astype(float)
    matches = oracles_result.result.facts["matches"]
    f1, pearson = [], []
    for true, feature in zip(matches["true"], matches["feature"], strict=True):
        on, true_on = f[:, feature] > 0, v[:, true] > 0
        precision, recall = (on & true_on).sum() / on.sum(), (on & true_on).sum() / true_on.sum()
        f1.append(2 * precision * recall / (precision + recall))
        pearson.append(np.corrcoef(f[:, feature], v[:, true])[0, 1])
    found = values(oracles_result)
    assert found["f1"] == pytest.approx(np.mean(f1))
    assert found["pearson"] == pytest.approx(np.mean(pearson))
    slow = source.truth.of_kind("slow")[matches["true"]]
    assert found["f1_slow"] == pytest.approx(np.mean(np.array(f1)[slow]))


def test_a_pair_that_never_fires_has_no_figure():
    sums = np.zeros((9, 1))
    sums[0] = 20
    f1, pearson = pair_figures(sums)
    assert np.isnan(f1).all()
    assert np.isnan(pearson).all()


def test_one_document_gives_figures_without_an_interval(
    tmp_path: Path, store: ActivationStore, source: SyntheticSource
):
    corpus = store.provenance.corpus
    config = HarvestConfig(store=tmp_path / "s.zarr", corpus=corpus, context_length=40, max_tokens=60)
    harvest(replace(config, rows_per_chunk=100))
    one = ActivationStore.open(tmp_path / "s.zarr")
    result = truth_result(oracle(source), HeldOut(one, "synthetic", "all"), truth_of_store(one), **QUICK)
    estimate = result.result.estimates["f1"]
    assert estimate.low is None
    assert "one document" in estimate.reason
