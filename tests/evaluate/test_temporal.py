"""The suite: which features count, how they are averaged, how two SAEs are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tcsae.evaluate.estimates import Draws, SuiteResult
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.intervals import resample_counts
from tcsae.evaluate.jackknife import linear_bootstrap
from tcsae.evaluate.temporal import compare_with_control, temporal_figures
from tcsae.evaluate.temporal_encoders import SAEEncoder
from tcsae.evaluate.temporal_features import METRICS, figures
from tcsae.evaluate.temporal_pass import temporal_sums
from tcsae.evaluate.temporal_sums import TemporalSums
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE

from .sequences import by_name, codes_of, markov, sparse, sums_of

StoreFactory = Callable[..., ActivationStore]
HOOK = "blocks.0.hook_resid_post"


def positive_part(block_size: int, d_in: int) -> SAE:
    """Feature i is ReLU of dimension i."""
    return SAE(
        architecture="standard",
        W_enc=torch.eye(d_in),
        b_enc=torch.zeros(d_in),
        W_dec=torch.eye(d_in),
        b_dec=torch.zeros(d_in),
        block_size=block_size,
    )


@pytest.fixture
def sums(make_store: StoreFactory) -> TemporalSums:
    """Of thirty documents of one context of 60; dimension 0 sticky and weak, 1 and 2 noise, 3 almost silent.

    The first 8 rows of every context hold a large constant in all dimensions.
    """
    generator = np.random.default_rng(0)
    x = np.zeros((30 * 60, 4), dtype=np.float32)
    on = False
    for row in range(len(x)):
        on = bool(generator.random() < (0.95 if on else 0.05))
        x[row, 0] = 0.1 * on
    x[:, 1:3] = 5 * (generator.random((len(x), 2)) < 0.3)
    x[[70, 700], 3] = 1.0
    x[np.arange(len(x)) % 60 < 8] = 50.0
    store = make_store(torch.from_numpy(x), [60] * 30, context_rows=60, dtype="float32")
    return temporal_sums(SAEEncoder(positive_part(1, 4)), HeldOut(store, HOOK, "all"), seed=0)


def result_of(
    sums: TemporalSums, block_size: int = 1, n_bootstrap: int = 100
) -> tuple[SuiteResult, pa.Table]:
    return temporal_figures(
        sums,
        figures(sums),
        block_size=block_size,
        n_documents=sums.n_units,
        n_bootstrap=n_bootstrap,
        seed=0,
        print_="p",
    )


# Averages ----------------------------------------------------------------------------------------------


def test_the_block_and_the_rest_are_averaged_apart_over_live_features(sums: TemporalSums) -> None:
    result, _ = result_of(sums)
    value = {name: estimate.value for name, estimate in result.estimates.items()}
    for name in ("autocorrelation_lag8", "excess_information_lag8", "run_length"):
        of_feature = by_name(sums)[name][0]
        metric, _, lag = name.partition("_lag")
        end = f"_lag{lag}" if lag else ""
        assert value[f"{metric}_H{end}"] == pytest.approx(of_feature[0])
        # feature 3 fires twice: not live
        assert value[f"{metric}_L{end}"] == pytest.approx(of_feature[1:3].mean())
        assert value[f"{metric}_whole{end}"] == pytest.approx(of_feature[:3].mean())
        assert value[f"{metric}_best{end}"] == pytest.approx(of_feature[:3].max())
    assert result.facts["n_live"] == {"whole": 3, "H": 1, "L": 2}
    # the sticky chain has eigenvalue 0.9, so 0.43 at lag 8; its 30 documents leave it uncertain
    assert value["autocorrelation_H_lag8"] == pytest.approx(0.9**8, abs=0.12)


def test_the_best_block_has_the_smallest_values_where_small_is_smooth(sums: TemporalSums) -> None:
    result, _ = result_of(sums)
    for metric in ("smoothness", "total_variation"):
        best = by_name(sums)[metric][0, :3].min()
        assert result.estimates[f"{metric}_best"].value == pytest.approx(best)


def test_the_energy_weighted_mean_belongs_to_the_strong_features(sums: TemporalSums) -> None:
    result, _ = result_of(sums)
    rho, energy = by_name(sums)["autocorrelation_lag8"][0], sums.once("square").sum(axis=0)
    expected = (rho * energy)[:3].sum() / energy[:3].sum()
    found = result.estimates["energy_weighted_autocorrelation_whole_lag8"].value
    assert found == pytest.approx(expected)
    assert found is not None
    assert abs(found) < 0.06  # two noise features of 1,320 pairs: standard error 0.02; unweighted it is 0.14


def test_the_first_eight_tokens_and_their_constant_are_nowhere_in_it(sums: TemporalSums) -> None:
    assert sums.n.sum() == 30 * 52
    assert sums.n_pairs[:, 0].sum(axis=0).tolist() == [30 * (52 - lag) for lag in (1, 2, 4, 8, 16, 32)]
    assert sums.once("firings").sum(axis=0)[3] == 2


def test_deciles_are_ten_groups_of_live_features_by_how_often_they_fire() -> None:
    generator = np.random.default_rng(0)
    densities = generator.permutation(np.linspace(0.1, 0.9, 20))
    sums = sums_of(codes_of([(generator.random((400, 20)) < densities) * 1.0 for _ in range(3)]))
    result, _ = result_of(sums, block_size=0)
    order = np.argsort(sums.once("firings").sum(axis=0), kind="stable")
    persistence = by_name(sums)["persistence_lag4"][0]
    expected = [persistence[order[at : at + 2]].mean() for at in range(0, 20, 2)]
    assert result.facts["by_decile"]["persistence_whole_lag4"] == pytest.approx(expected)
    firings = sums.once("firings").sum(axis=0)[order].reshape(10, 2).mean(axis=1) / 1200
    assert result.facts["density_by_decile"]["whole"] == pytest.approx(firings.tolist())


def test_the_table_has_a_row_for_each_feature_and_null_where_a_figure_is_undefined(
    sums: TemporalSums,
) -> None:
    _, table = result_of(sums)
    assert table["feature"].to_pylist() == [0, 1, 2, 3]
    assert table["block"].to_pylist() == ["H", "L", "L", "L"]
    assert table["density"].to_pylist() == pytest.approx((sums.once("firings").sum(axis=0) / 1560).tolist())
    assert table["mean_active"].to_pylist() == pytest.approx([0.1, 5.0, 5.0, 1.0])
    of_feature = by_name(sums)
    for metric in METRICS.values():
        for lag in (1, 2, 4, 8, 16, 32) if metric.has_lag else (None,):
            column = metric.name if lag is None else f"{metric.name}_lag{lag}"
            expected = of_feature[column][0]
            for found, value in zip(table[column].to_pylist(), expected, strict=True):
                assert (found is None) == bool(np.isnan(value))
                assert found is None or found == value


# Intervals ---------------------------------------------------------------------------------------------


def test_draws_are_to_first_order_what_resampled_documents_give() -> None:
    # rates differ between documents, so that there is something to resample; every pair counts in float64
    generator = np.random.default_rng(1)
    documents = [sparse(120, 4, generator, density) for density in generator.uniform(0.1, 0.5, size=30)]
    result, _ = result_of(sums_of(codes_of(documents), (1, 4)), block_size=0)
    counts = resample_counts(30, 100, 0)[:40]
    names = (
        "autocorrelation_whole_lag4",
        "persistence_whole_lag4",
        "total_variation_whole",
        "run_length_whole",
    )
    exact = np.zeros((40, len(names)))
    for at, drawn in enumerate(counts):
        again = [documents[d] for d in np.repeat(np.arange(30), drawn.astype(int))]
        figure = by_name(sums_of(codes_of(again), (1, 4)))
        exact[at] = [figure[name.replace("_whole", "")][0].mean() for name in names]
    for at, name in enumerate(names):
        draws = result.draws[name].draws[:40]
        assert np.corrcoef(draws, exact[:, at])[0, 1] > 0.97, name
        assert draws.std() == pytest.approx(exact[:, at].std(), rel=0.15), name


def test_the_linear_draws_of_a_mean_are_its_resamples_and_keep_pairs() -> None:
    x = np.random.default_rng(0).normal(size=(20, 2))
    counts = resample_counts(20, 50, 3)
    without = (x.sum(axis=0) - x) / 19
    found = linear_bootstrap(x.mean(axis=0), without, counts)
    assert found.draws == pytest.approx(counts @ x / 20)


def test_the_interval_contains_the_value_and_more_documents_make_it_narrower() -> None:
    widths = []
    for n in (20, 80):
        generator = np.random.default_rng(0)
        result, _ = result_of(sums_of(codes_of([markov(100, generator, 4, 0.1, 0.05) for _ in range(n)])))
        estimate = result.estimates["autocorrelation_H_lag1"]
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
        assert estimate.n_documents == n
        widths.append(estimate.high - estimate.low)
    assert widths[1] < 0.7 * widths[0]


# Undefined ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "name", "reason"),
    [
        pytest.param(
            [sparse(90, 3, np.random.default_rng(0))],
            "excess_information_whole_lag8",
            "undefined, because no two documents have contexts to be matched by position, or none is this long",
            id="one document",
        ),
        pytest.param(
            [sparse(90, 3, np.random.default_rng(0))],
            "autocorrelation_whole_lag8",
            "no interval, because there is only one document to resample",
            id="one document, no null",
        ),
        pytest.param(
            [sparse(20, 3, np.random.default_rng(d)) for d in range(9)],
            "persistence_whole_lag32",
            "undefined, because no pair of tokens lies this far apart in one context, or no feature here varies",
            id="contexts shorter than the lag",
        ),
        pytest.param(
            [np.zeros((50, 3)) for _ in range(4)],
            "smoothness_H",
            "undefined, because no feature of this part fires on 10 counted tokens",
            id="nothing fires",
        ),
    ],
)
def test_what_cannot_be_said_is_undefined_with_its_reason(documents: Any, name: str, reason: str) -> None:
    result, _ = result_of(sums_of(codes_of(documents)))
    estimate = result.estimates[name]
    assert estimate.reason == reason
    assert (estimate.value is None) == reason.startswith("undefined")
    assert estimate.low is None


# Comparison with a control -----------------------------------------------------------------------------


def draws_about(value: float, spread: float, shared: float = 0.0) -> Draws:
    steps = np.linspace(-1, 1, 101)
    return Draws(value, value + spread * steps + shared * steps[::-1] ** 3, value + 0.01 * steps[::10])


def test_ratio_and_difference_of_a_hand_made_pair() -> None:
    treated, control = draws_about(0.12, 0.012), draws_about(0.04, 0.004)
    ratio, difference = compare_with_control("a", treated, control, 9)
    assert (ratio.metric, difference.metric) == ("a_ratio", "a_difference")
    assert ratio.value == pytest.approx(3.0)
    # every draw of one is 3 times that of the other: in pairs the ratio does not vary at all
    assert (ratio.low, ratio.high) == (pytest.approx(3.0), pytest.approx(3.0))
    assert difference.value == pytest.approx(0.08)
    assert difference.low is not None
    assert 0.07 < difference.low < 0.08


def test_a_ratio_to_a_control_that_may_be_zero_is_undefined_and_says_so() -> None:
    ratio, difference = compare_with_control("a", draws_about(0.1, 0.01), draws_about(0.01, 0.02), 9)
    assert ratio.value is None
    assert ratio.reason == "undefined, because the control reaches zero in a resample"
    assert difference.value == pytest.approx(0.09)


@pytest.mark.parametrize("where", ["draws", "leave_one_out"])
def test_a_single_resample_in_which_the_control_is_zero_is_enough(where: str) -> None:
    treated, control = draws_about(0.12, 0.012), draws_about(0.04, 0.004)
    getattr(control, where)[0] = 0.0
    ratio, difference = compare_with_control("a", treated, control, 9)
    assert (ratio.value, ratio.low, ratio.high) == (None, None, None)
    assert difference.value == pytest.approx(0.08)


def test_a_resample_in_which_the_control_is_undefined_leaves_no_ratio_though_another_is_zero() -> None:
    treated, control = draws_about(0.12, 0.012), draws_about(0.04, 0.004)
    control.draws[:2] = np.nan, 0.0  # the least of these is neither
    ratio, difference = compare_with_control("a", treated, control, 9)
    assert ratio.reason == "undefined, because the control is undefined in a resample"
    assert (difference.value, difference.low) == (pytest.approx(0.08), None)


def test_an_undefined_metric_makes_an_undefined_comparison() -> None:
    ratio, difference = compare_with_control("a", None, draws_about(0.1, 0.01), 9)
    assert (ratio.value, difference.value) == (None, None)
