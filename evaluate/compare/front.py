"""Temporal consistency against sparsity and against reconstruction, and which arms are on the front.

Along alpha consistency is bought with reconstruction: the curve that alpha traces, not one point of it, is what two
methods are compared by. An arm is on the front if no other arm is at least as good in both and better in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tcsae.evaluate.compare.arms import Arm
from tcsae.evaluate.compare.bootstrap import PerSeed
from tcsae.evaluate.compare.contrast import Figure, figure_of

COSTS = ("l0", "fvu")
"""What consistency is held against; lower is better."""

_NOT_TRACED = ("name", "explanation", "alpha", "k")


@dataclass(frozen=True, slots=True)
class Point:
    """One arm."""

    arm: str
    """name"""
    trace: str
    """arms of one trace differ in alpha alone (and in nothing else but their k)"""
    alpha: float | None
    """weight of the temporal term"""
    k: int | None
    """active features per token that it was trained for"""
    consistency: Figure
    """higher is better"""
    costs: dict[str, Figure]
    """L0 and FVU, where measured"""
    on_front: dict[str, bool]
    """whether no other arm is better in both, by cost"""


def arm_figure(arm: Arm, metric: str, n_resamples: int) -> Figure:
    """One arm's mean over seeds with its interval; the reason where a seed has none."""
    estimates = [one.estimates[metric] for one in arm.saes.values() if metric in one.estimates]
    if not estimates:
        return Figure(None, None, None, None, 0, None, f"not measured: the folders have no {metric}")
    found = [one.draws[metric] for one in arm.saes.values() if metric in one.draws]
    if len({len(one.leave_one_out) for one in found}) != 1 or len(found) < len(estimates):
        return _without_interval([one.value for one in estimates], [one.reason for one in estimates])
    return figure_of(
        PerSeed(
            np.array([one.value for one in found]),
            np.stack([one.draws for one in found]),
            (np.stack([one.leave_one_out for one in found]),),
        ),
        n_resamples,
    )[0]


def _without_interval(values: Sequence[float | None], reasons: Sequence[str | None]) -> Figure:
    """The mean of figures that have no interval, undefined where one of them is."""
    reason = next(
        (one for one in reasons if one), "no interval, because the seeds were resampled differently"
    )
    defined = [one for one in values if one is not None]
    mean = float(np.mean(defined)) if len(defined) == len(values) else None
    return Figure(mean, None, None, None, len(values), None, reason)


def points_of(
    arms: Sequence[Arm], metric: str, n_resamples: int, advance: Callable[[int], object] = lambda _: None
) -> list[Point]:
    """Every arm that has ``metric``, with its place relative to the front."""
    found = []
    traces = _traces(arms)
    for arm in arms:
        consistency = arm_figure(arm, metric, n_resamples)
        costs = {cost: arm_figure(arm, cost, n_resamples) for cost in COSTS}
        costs = {name: figure for name, figure in costs.items() if figure.value is not None}
        if consistency.value is not None:
            found.append(Point(arm.name, traces[arm.name], arm.alpha, arm.k, consistency, costs, {}))
        advance(1)
    for cost in COSTS:
        with_cost = [one for one in found if cost in one.costs]
        for one in with_cost:
            one.on_front[cost] = not any(_dominates(other, one, cost) for other in with_cost)
    return found


def _dominates(a: Point, b: Point, cost: str) -> bool:
    gain = (a.consistency.value or 0.0) - (b.consistency.value or 0.0)
    saved = (b.costs[cost].value or 0.0) - (a.costs[cost].value or 0.0)
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)


def _traces(arms: Sequence[Arm]) -> dict[str, str]:
    """For each arm the name of its trace: that of the first arm with a temporal term in it, else its own."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        settings = {name: value for name, value in arm.one.settings.items() if name not in _NOT_TRACED}
        groups.setdefault(repr(sorted(settings.items())) if settings else arm.name, []).append(arm)
    names: dict[str, str] = {}
    for group in groups.values():
        first = next((arm for arm in group if arm.alpha), group[0])
        names |= {arm.name: first.name for arm in group}
    return names
