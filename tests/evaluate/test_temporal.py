"""The suite: which features count, how they are averaged, how two SAEs are compared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tcsae.evaluate.autocorrelation import LagSums, autocorrelation, lag_sums
from tcsae.evaluate.estimates import Draws
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.temporal import _codes, aggregate, compare_with_control, temporal_result
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE

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
def held_out(make_store: StoreFactory) -> HeldOut:
    """Thirty documents of one context of 60; dimension 0 sticky and weak, 1 and 2 noise, 3 almost silent.

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
    return HeldOut(store, HOOK, "all")


def sums_of(held_out: HeldOut) -> LagSums:
    return lag_sums(_codes(positive_part(1, 4), held_out, 99), held_out.n_documents, 4)


def test_the_block_and_the_rest_are_averaged_apart_over_live_features(held_out: HeldOut) -> None:
    result = temporal_result(positive_part(1, 4), held_out, n_bootstrap=100, seed=0, print_="p")
    rho, _ = autocorrelation(sums_of(held_out), np.ones(30), slice(None))
    value = {name: estimate.value for name, estimate in result.estimates.items()}
    at_8 = rho[3]
    assert value["autocorrelation_H_lag8"] == pytest.approx(at_8[0])
    # feature 3 fires twice: not live
    assert value["autocorrelation_L_lag8"] == pytest.approx(at_8[1:3].mean())
    assert value["autocorrelation_whole_lag8"] == pytest.approx(at_8[:3].mean())
    assert result.facts["n_live"] == {"whole": 3, "H": 1, "L": 2}
    # the sticky chain has eigenvalue 0.9, so 0.43 at lag 8; its 30 documents leave it uncertain
    assert at_8[0] == pytest.approx(0.9**8, abs=0.12)


def test_the_energy_weighted_mean_belongs_to_the_strong_features(held_out: HeldOut) -> None:
    result = temporal_result(positive_part(1, 4), held_out, n_bootstrap=100, seed=0, print_="p")
    rho, energy = autocorrelation(sums_of(held_out), np.ones(30), slice(None))
    expected = (rho[3] * energy)[:3].sum() / energy[:3].sum()
    found = result.estimates["energy_weighted_autocorrelation_whole_lag8"].value
    assert found == pytest.approx(expected)
    assert found is not None
    assert abs(found) < 0.06  # two noise features of 1,320 pairs: standard error 0.02; unweighted it is 0.14


def test_the_first_eight_tokens_and_their_constant_are_nowhere_in_it(held_out: HeldOut) -> None:
    sums = sums_of(held_out)
    assert sums.n.sum() == 30 * 52
    assert sums.n_pairs.sum(axis=0).tolist() == [30 * (52 - lag) for lag in (1, 2, 4, 8, 16, 32)]
    assert sums.firings[3] == 2


def test_resamples_of_the_mean_are_means_over_resampled_documents(held_out: HeldOut) -> None:
    sums = sums_of(held_out)
    counts = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=7).astype(float)
    ((_, plain), _) = aggregate(sums, counts, {"whole": np.array([0, 1, 2])})
    for draw, weights in zip(plain.draws, counts, strict=True):
        expected = autocorrelation(sums, weights, slice(None))[0][:, :3].mean(axis=1)
        assert draw == pytest.approx(expected)
    without_4 = autocorrelation(sums, (np.arange(30) != 4).astype(float), slice(None))[0][:, :3].mean(axis=1)
    assert plain.leave_one_out[4] == pytest.approx(without_4)


def test_the_interval_contains_the_value_and_more_documents_make_it_narrower(held_out: HeldOut) -> None:
    result = temporal_result(positive_part(1, 4), held_out, n_bootstrap=300, seed=0, print_="p")
    estimate = result.estimates["autocorrelation_H_lag1"]
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.value < estimate.high
    assert estimate.n_documents == 30


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


def test_an_undefined_metric_makes_an_undefined_comparison() -> None:
    ratio, difference = compare_with_control("a", None, draws_about(0.1, 0.01), 9)
    assert (ratio.value, difference.value) == (None, None)
