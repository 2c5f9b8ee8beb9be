"""SAEBench's selection rule on densities written by hand, controls, densities against a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.unlearning.clamp import MULTIPLES, settings_of
from tcsae.evaluate.unlearning.select import (
    NEIGHBOURS,
    NUMBERS,
    Activity,
    activities,
    matched_controls,
    select,
)
from tcsae.store import ActivationStore
from tcsae.train.sae.inference import SAE

from .conftest import HOOK


def activity_of(forget: list[float], retain: list[float]) -> Activity:
    return Activity(np.array(forget), np.array(retain), np.ones(len(forget)), 1000, 1000)


@pytest.mark.parametrize(
    ("forget", "retain", "threshold", "number", "expected"),
    [
        pytest.param([0.1, 0.3, 0.2], [0.0, 0.0, 0.0], 0.01, 2, (1, 2), id="the densest on forget, in order"),
        pytest.param(
            [0.1, 0.3, 0.2], [0.0, 0.02, 0.0], 0.01, 2, (2, 0), id="too dense on retain is left out"
        ),
        pytest.param([0.1, 0.3], [0.0, 0.01], 0.01, 2, (0,), id="at the threshold is left out: below it"),
        pytest.param([0.1, 0.3], [0.0009, 0.001], 0.001, 2, (0,), id="the strict threshold"),
        pytest.param([0.0, 0.3], [0.0, 0.0], 0.01, 2, (1,), id="silent on forget is dropped"),
        pytest.param([0.0, 0.3], [0.0, 0.5], 0.01, 2, (), id="none at all"),
        pytest.param([0.2, 0.2, 0.2], [0.0] * 3, 0.01, 2, (0, 1), id="the first of equals wins"),
    ],
)
def test_selection(
    forget: list[float], retain: list[float], threshold: float, number: int, expected: tuple[int, ...]
) -> None:
    assert select(activity_of(forget, retain), threshold, number) == expected


def test_controls_are_as_many_live_features_of_like_density_and_none_that_is_selected() -> None:
    generator = np.random.default_rng(0)
    forget = np.exp(generator.uniform(-6, -1, size=300))
    forget[::7] = 0.0
    retain = generator.uniform(0, 0.02, size=300)
    activity = Activity(forget, retain, np.ones(300), 1000, 1000)
    selected = select(activity, 0.01, 20)
    controls = matched_controls(activity, selected, seed=3)
    assert len(controls) == len(set(controls)) == 20
    assert not set(controls) & set(selected)
    free = np.setdiff1d(np.flatnonzero(forget), selected)
    for one, control in zip(selected, controls, strict=True):
        closer = np.abs(np.log(forget[free] / forget[one])) < abs(np.log(forget[control] / forget[one]))
        # the earlier controls may have been among the nearest
        assert np.count_nonzero(closer) < NEIGHBOURS + 20
    assert controls == matched_controls(activity, selected, seed=3)
    assert controls != matched_controls(activity, selected, seed=4)


def test_controls_are_the_few_that_are_left() -> None:
    activity = activity_of([0.3, 0.2, 0.1, 0.0], [0.0, 0.0, 0.5, 0.0])
    assert matched_controls(activity, (0, 1), seed=0) == (2,)


def test_all_settings_are_there_and_the_smaller_number_takes_the_first_of_the_larger() -> None:
    activity = activity_of([0.01 * (i + 1) for i in range(60)], [0.0] * 60)
    settings = settings_of(activity, seed=0)
    assert len(settings) == len(set(settings)) == 2 * 2 * len(NUMBERS) * len(MULTIPLES)
    of = {(one.kind, one.threshold, one.n_wanted, one.multiple): one.features for one in settings}
    for (kind, threshold, number, multiple), features in of.items():
        assert len(features) == number
        assert features == of[kind, threshold, 20, multiple][:number]


def test_densities_and_means_are_those_of_a_loop_over_tokens(neox_store: ActivationStore) -> None:
    generator = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = {
        "W_enc": torch.randn(16, 9, generator=generator),
        "b_enc": torch.randn(9, generator=generator),
        "W_dec": torch.randn(9, 16, generator=generator),
        "b_dec": torch.zeros(16),
    }
    sae = SAE(architecture="standard", **fields)
    held_out = HeldOut(neox_store, HOOK, "all")
    contexts = np.arange(neox_store.n_contexts)
    pairs = [(contexts[::3], contexts[1::3]), (contexts[2::3], contexts[::3])]
    found = activities(sae, held_out, pairs)
    limit = held_out.outlier_norm
    for one, (forget, retain) in zip(found, pairs, strict=True):
        for which, density, n in (
            (forget, one.forget_density, one.n_forget),
            (retain, one.retain_density, one.n_retain),
        ):
            codes = [
                torch.relu((neox_store.rows(row, row + 1)[0] - sae.b_dec) @ sae.W_enc + sae.b_enc)
                for c in which
                for row in range(neox_store.context_offsets[c], neox_store.context_offsets[c + 1])
                if neox_store.tokens[row] != 0 and neox_store.rows(row, row + 1).norm() <= limit
            ]
            assert n == len(codes)
            f = torch.stack(codes).double().numpy()
            np.testing.assert_allclose(density, (f > 0).mean(axis=0), rtol=1e-12)
            if which is forget:
                np.testing.assert_allclose(one.mean_active, f.sum(0) / (f > 0).sum(0), rtol=1e-5)
