"""Equal L0 by interpolation in log L0, worked by hand; nothing is extrapolated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tcsae.evaluate.compare.arms import Family, arms_of, families_of
from tcsae.evaluate.compare.folders import read_folders
from tcsae.evaluate.compare.matching import NotComparable, common_l0, match, reach

from .conftest import Planted, planted

METRIC = ("autocorrelation_whole_lag8", "autocorrelation_whole_lag8")
WriteFolder = Callable[..., Path]


def curve(
    arm: str, l0: dict[int, float], y: dict[int, Any], seeds: tuple[int, ...] = (0, 1), **settings: Any
) -> list[Planted]:
    """One family: at each k an L0 and a metric; the metric of seed s is larger by s."""
    return [
        planted(f"{arm}-k{k}", seed, {"l0": l0[k], METRIC[0]: np.asarray(y[k]) + seed}, k=k, **settings)
        for k in l0
        for seed in seeds
    ]


def families(folder: WriteFolder, *saes: list[Planted]) -> list[Family]:
    return families_of(arms_of(read_folders([folder([one for some in saes for one in some])]).saes))


def test_curves_are_read_between_their_arms_in_log_l0(folder: WriteFolder) -> None:
    # treated: 0 at L0 10, 1 at L0 40: at 20 half way in log, 0.5; control: 0 at 10, 4 at 160: at 20 a quarter, 1
    a, b = families(
        folder,
        curve("tc16", {16: 10, 32: 40}, {16: 0, 32: 1}, alpha=0.02),
        curve("block", {16: 10, 32: 160}, {16: 0, 32: 4}),
    )
    found = match(a, b, METRIC, 20.0)
    assert found.treated.figure.value == pytest.approx([0.5, 1.5])
    assert found.difference.value == pytest.approx([-0.5, -0.5])
    assert (found.treated.l0, found.is_equal, found.missing) == (20.0, True, None)


def test_every_resample_is_read_with_the_l0_it_has(folder: WriteFolder) -> None:
    generator = np.random.default_rng(0)
    l0 = {16: generator.uniform(8, 12, 40), 32: generator.uniform(30, 50, 40)}
    y = {16: generator.normal(0, 1, 40), 32: generator.normal(1, 1, 40)}
    a, b = families(
        folder, curve("tc16", l0, y, (0,), alpha=0.02), curve("block", {16: 10, 32: 40}, {16: 0, 32: 0}, (0,))
    )
    found = match(a, b, METRIC, 20.0)
    points = [arm.saes[0] for arm in a.arms]

    def by_hand(pick: Callable[[Any], float]) -> float:
        x, v = ([pick(point.draws[name]) for point in points] for name in ("l0", METRIC[0]))
        return float(np.interp(np.log(20.0), np.log(x), v))

    for r in (0, 7, 399):
        assert found.treated.figure.draws[0, r] == pytest.approx(by_hand(lambda draws, r=r: draws.draws[r]))
    for u in (0, 39):
        assert found.treated.figure.left_out[0][0, u] == pytest.approx(
            by_hand(lambda draws, u=u: draws.leave_one_out[u])
        )


def test_nothing_is_extrapolated_and_the_numbers_are_named(folder: WriteFolder) -> None:
    a, b = families(
        folder,
        curve("tc16", {16: 10, 32: 40}, {16: 0, 32: 1}, alpha=0.02),
        curve("block", {16: 12, 32: 44}, {16: 0, 32: 1}),
    )
    with pytest.raises(
        NotComparable, match=r"L0 42 lies outside of what tc16 reaches with seed 0, 10 to 40.*--l0"
    ):
        match(a, b, METRIC, 42.0)
    assert reach(b) == (12.0, 44.0)


@pytest.mark.parametrize(
    ("high", "wanted", "expected"),
    [
        pytest.param(80.0, None, 40.0, id="the registered one"),
        pytest.param(39.0, None, np.sqrt(12 * 39), id="the middle of what both reach"),
        pytest.param(39.0, 14.0, 14.0, id="what was asked for"),
        pytest.param(11.0, None, None, id="none in common"),
    ],
)
def test_the_l0_of_the_comparison(
    folder: WriteFolder, high: float, wanted: float | None, expected: float | None
) -> None:
    both = families(
        folder,
        curve("tc16", {8: 10, 32: high}, {8: 0, 32: 1}, alpha=0.02),
        curve("block", {16: 12, 32: 90}, {16: 0, 32: 1}),
    )
    assert common_l0(both, wanted) == (None if expected is None else pytest.approx(expected))
    if expected is None:
        with pytest.raises(NotComparable, match="tc16 reaches 10 to 11 with every seed, block 12 to 90"):
            match(*both, METRIC, None)


def test_a_single_arm_sets_the_l0_at_which_a_curve_is_read(folder: WriteFolder) -> None:
    a, b = families(
        folder,
        curve("placebo", {32: 20}, {32: 7}, alpha=0.02, positives="other_document"),
        curve("block", {16: 10, 32: 40}, {16: 0, 32: 1}),
    )
    found = match(a, b, METRIC, 12.0)
    assert found.difference.value == pytest.approx([6.5, 6.5])
    assert found.how == "block interpolated in log L0 at the L0 of placebo-k32, 20"
    turned = match(b, a, METRIC, 12.0)
    assert turned.difference.value == pytest.approx([-6.5, -6.5])
    assert turned.control.l0 == 20.0


@pytest.mark.parametrize(
    ("l0", "is_equal", "how"),
    [
        pytest.param(31.0, True, "L0 31 (tc16-k32) and 30 (block-k32), within 5%", id="within the tolerance"),
        pytest.param(33.0, False, "not at equal L0", id="beyond it"),
    ],
)
def test_two_single_arms_are_compared_as_they_are_and_it_is_said_if_l0_differs(
    folder: WriteFolder, l0: float, is_equal: bool, how: str
) -> None:
    a, b = families(folder, curve("tc16", {32: l0}, {32: 1}, alpha=0.02), curve("block", {32: 30}, {32: 0}))
    found = match(a, b, METRIC, None)
    assert found.difference.value == pytest.approx([1.0, 1.0])
    assert found.is_equal == is_equal
    assert found.how == (how if is_equal else "not at equal L0: L0 33 (tc16-k32) and 30 (block-k32)")


def test_seeds_without_a_partner_are_named(folder: WriteFolder) -> None:
    a, b = families(
        folder,
        curve("tc16", {16: 10, 32: 40}, {16: 0, 32: 1}, (0, 1, 3), alpha=0.02),
        curve("block", {16: 10, 32: 40}, {16: 0, 32: 1}, (1, 0, 2)),
    )
    found = match(a, b, METRIC, 20.0)
    assert found.seeds == (0, 1)
    assert found.missing == "seed 3 (not in block); seed 2 (not in tc16)"


def test_a_seed_that_was_trained_at_one_k_only_is_left_out_and_named(folder: WriteFolder) -> None:
    saes = curve("tc16", {16: 10, 32: 40}, {16: 0, 32: 1}, alpha=0.02)
    a, b = families(folder, saes[:-1], curve("block", {16: 10, 32: 40}, {16: 0, 32: 1}))
    found = match(a, b, METRIC, 20.0)
    assert found.seeds == (0,)
    assert found.missing == "seed 1 (tc16 has it at one k only)"


def test_without_l0_a_difference_is_not_called_one_at_equal_l0(folder: WriteFolder) -> None:
    saes = [planted("tc16", 0, {METRIC[0]: 1}, alpha=0.02), planted("block", 0, {METRIC[0]: 0})]
    found = match(*families(folder, saes), METRIC, None)
    assert not found.is_equal
    assert "L0 was not measured" in found.how


def test_a_metric_on_other_documents_than_l0_has_both_in_its_uncertainty(folder: WriteFolder) -> None:
    generator = np.random.default_rng(0)
    saes = []
    for arm, alpha in (("tc16", 0.02), ("block", 0.0)):
        for k, l0 in ((16, 10.0), (32, 40.0)):
            one = planted(f"{arm}-k{k}", 0, {"l0": l0 * generator.uniform(0.9, 1.1, 40)}, k=k, alpha=alpha)
            replayed = {"loss_recovered": 0.9 + 0.01 * generator.normal(size=12)}
            saes.append(one._replace(documents={**one.documents, **replayed}))
    a, b = families(folder, saes)
    found = match(a, b, ("loss_recovered", "loss_recovered"), 20.0)
    assert [level.shape for level in found.difference.left_out] == [(1, 12), (1, 40)]
