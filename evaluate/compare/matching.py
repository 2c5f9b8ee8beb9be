"""Figures at equal L0: interpolated linearly in log L0 along the arms of a family that differ in k.

Consistency and reconstruction both change with sparsity, so a difference at unequal L0 is partly one of sparsity. The
interpolation is part of the figure: it is done anew in every resample and without each document, with the L0 realised
there. Nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tcsae.evaluate.compare.arms import Family
from tcsae.evaluate.compare.bootstrap import PerSeed
from tcsae.evaluate.compare.folders import Evaluated
from tcsae.evaluate.estimates import Draws
from tcsae.evaluate.intervals import Array

REGISTERED_L0 = 40.0
"""Active features per token at which the primary endpoint is read, where the curves reach it."""

TOLERANCE = 0.05
"""Relative difference of realised L0 up to which two arms of one k each count as equally sparse."""

L0 = "l0"


class NotComparable(Exception):
    """Why two families have no difference at equal L0; the message is the reason that is reported."""


class Range(NamedTuple):
    """L0 that a family reaches with every seed."""

    low: float
    high: float


class Side(NamedTuple):
    """One side of a comparison."""

    figure: PerSeed
    """the metric at the matched L0"""
    l0: float | None
    """matched or realised, mean over the seeds; None where it was not measured"""
    l0_block: float | None
    """of block H there, None without a block"""


@dataclass(frozen=True, slots=True)
class Matched:
    """Both sides of a comparison over the seeds that they share."""

    treated: Side
    control: Side
    seeds: tuple[int | None, ...]
    """that are paired"""
    missing: str | None
    """which seeds are not, and why; None if all are"""
    how: str
    """how L0 was made equal"""
    is_equal: bool
    """whether it was"""

    @property
    def difference(self) -> PerSeed:
        """Treated minus control, seed by seed, on the same documents."""
        a, b = self.treated.figure, self.control.figure
        left_out = tuple(x - y for x, y in zip(a.left_out, b.left_out, strict=True))
        return PerSeed(a.value - b.value, a.draws - b.draws, left_out)


def reach(family: Family, seeds: Sequence[int | None] | None = None) -> Range | None:
    """L0 that every seed of ``family`` reaches between its arms; None if it has one arm or no L0."""
    spans = []
    for seed in family.seeds if seeds is None else seeds:
        values = [one.estimates[L0].value for one in _points(family, seed) if L0 in one.estimates]
        known = [value for value in values if value]
        if len(known) > 1:
            spans.append((min(known), max(known)))
    if not spans:
        return None
    return Range(max(low for low, _ in spans), min(high for _, high in spans))


def common_l0(families: Sequence[Family], wanted: float | None = None) -> float | None:
    """The L0 at which families are compared: ``wanted``, else `REGISTERED_L0` where all curves reach it, else the
    geometric middle of what they all reach; None if they have no L0 in common."""
    if wanted is not None:
        return wanted
    spans = [span for span in map(reach, families) if span is not None]
    if not spans:
        return None
    low, high = max(span.low for span in spans), min(span.high for span in spans)
    if low > high:
        return None
    return REGISTERED_L0 if low <= REGISTERED_L0 <= high else float(np.sqrt(low * high))


def match(treated: Family, control: Family, metrics: tuple[str, str], target: float | None) -> Matched:
    """Both families' metrics at equal L0.

    Parameters
    ----------
    treated, control
        two families measured on the same documents
    metrics
        the metric of the treated and of the control
    target
        L0 at which two curves are read, None if they have none in common

    A family of one arm sets the L0 at which the other's curve is read; two of one arm each are compared as they are,
    and `Matched.is_equal` says whether their L0 are within `TOLERANCE`.

    Raises
    ------
    NotComparable
        no shared seed, an undefined metric, other documents, or an L0 that would have to be extrapolated
    """
    seeds, missing = _shared_seeds(treated, control, metrics)
    a = [_Curve(treated, seed, metrics[0]) for seed in seeds]
    b = [_Curve(control, seed, metrics[1]) for seed in seeds]
    if any(x.units != y.units for x, y in zip(a, b, strict=True)):
        raise NotComparable(
            f"{metrics[0]} of {treated.name} and {metrics[1]} of {control.name} were resampled in different groups of "
            "documents"
        )
    several = tuple(all(len(curve.points) > 1 for curve in side) for side in (a, b))
    if several == (True, True):
        if target is None:
            raise NotComparable(_no_overlap(treated, control))
        at = [_fixed(target)] * len(seeds)
        how = f"both interpolated in log L0 at {target:.4g}"
        return Matched(_read_at(a, at), _read_at(b, at), seeds, missing, how, True)
    if several == (True, False):
        turned = match(control, treated, (metrics[1], metrics[0]), target)
        return Matched(
            turned.control, turned.treated, turned.seeds, turned.missing, turned.how, turned.is_equal
        )
    if several == (False, True) and all(y.holds(x.l0) for x, y in zip(a, b, strict=True)):
        at = [x.l0 for x in a]
        of_a, of_b = _as_they_are(a), _read_at(b, at)
        how = f"{control.name} interpolated in log L0 at the L0 of {treated.arms[0].name}, {of_a.l0:.4g}"
        return Matched(of_a, of_b, seeds, missing, how, True)
    return _direct(treated, control, a, b, seeds, missing)


def _direct(
    treated: Family,
    control: Family,
    a: list[_Curve],
    b: list[_Curve],
    seeds: tuple[int | None, ...],
    missing: str | None,
) -> Matched:
    """One arm against one arm, the nearest in L0."""
    if any(not curve.has_l0 for curve in (*a, *b)):
        if any(len(curve.points) > 1 for curve in b):
            raise NotComparable("L0 was not measured: evaluate with --suite core as well")
        how = "L0 was not measured (no core suite): not known to be equal"
        return Matched(_as_they_are(a), _as_they_are(b), seeds, missing, how, False)
    b = [curve.nearest(one.l0) for one, curve in zip(a, b, strict=True)]
    of_a, of_b = _as_they_are(a), _as_they_are(b)
    assert of_a.l0 is not None
    assert of_b.l0 is not None
    apart = abs(np.log(of_a.l0 / of_b.l0))
    numbers = f"L0 {of_a.l0:.4g} ({treated.name}) and {of_b.l0:.4g} ({control.name})"
    is_equal = bool(apart <= np.log1p(TOLERANCE))
    how = f"{numbers}, within {TOLERANCE:.0%}" if is_equal else f"not at equal L0: {numbers}"
    return Matched(of_a, of_b, seeds, missing, how, is_equal)


def _points(family: Family, seed: int | None) -> list[Evaluated]:
    return [arm.saes[seed] for arm in family.arms if seed in arm.saes]


def _shared_seeds(
    treated: Family, control: Family, metrics: tuple[str, str]
) -> tuple[tuple[int | None, ...], str | None]:
    """Seeds that both have with a defined metric, and in words which are left out."""
    usable: list[set[int | None]] = []
    gone: list[str] = []
    for family, metric in zip((treated, control), metrics, strict=True):
        if not any(metric in one.estimates for arm in family.arms for one in arm.saes.values()):
            raise NotComparable(f"{family.name} has no {metric}")
        most = max(len(_points(family, seed)) for seed in family.seeds)
        kept = set()
        for seed in family.seeds:
            points = _points(family, seed)
            without = [one for one in points if metric not in one.draws]
            if without:
                estimate = without[0].estimates.get(metric)
                reason = estimate.reason if estimate is not None and estimate.reason else "not measured"
                gone.append(f"seed {seed} ({without[0].sae}: {reason})")
            elif len(points) < min(most, 2):
                gone.append(f"seed {seed} ({family.name} has it at one k only)")
            else:
                kept.add(seed)
        usable.append(kept)
    for family, other in ((treated, control), (control, treated)):
        gone += [f"seed {seed} (not in {other.name})" for seed in family.seeds if seed not in other.seeds]
    seeds = tuple(seed for seed in treated.seeds if all(seed in kept for kept in usable))
    missing = "; ".join(dict.fromkeys(gone)) or None
    if not seeds:
        raise NotComparable(f"{treated.name} and {control.name} share no seed with {metrics[0]}: {missing}")
    return seeds, missing


def _no_overlap(treated: Family, control: Family) -> str:
    a, b = reach(treated), reach(control)
    if a is None or b is None:
        return "L0 was not measured: evaluate with --suite core as well"
    return (
        f"no common L0: {treated.name} reaches {a.low:.4g} to {a.high:.4g} with every seed, {control.name} "
        f"{b.low:.4g} to {b.high:.4g}; nothing is extrapolated, train other k"
    )


def _fixed(target: float) -> Draws:
    """A given L0, which does not vary."""
    return Draws(target, np.array([target]), np.array([target]))


class _Value(NamedTuple):
    """A figure of one seed."""

    value: float
    draws: Float[np.ndarray, " draw"]
    left_out: tuple[Float[np.ndarray, " _"], ...]


class _Curve:
    """One seed's metric over L0."""

    def __init__(
        self, family: Family, seed: int | None, metric: str, points: list[Evaluated] | None = None
    ) -> None:
        found = _points(family, seed) if points is None else points
        self.family, self.seed, self.metric = family, seed, metric
        self.has_l0 = all(L0 in one.draws for one in found)
        self.points = sorted(found, key=lambda one: one.draws[L0].value) if self.has_l0 else found

    @property
    def units(self) -> tuple[int, ...]:
        """Documents behind the metric, and behind L0 if those are others."""
        own = len(self.points[0].draws[self.metric].leave_one_out)
        if not self.has_l0:
            return (own,)
        others = len(self.points[0].draws[L0].leave_one_out)
        return (own,) if own == others else (own, others)

    @property
    def l0(self) -> Draws:
        """Realised L0 of the only point."""
        return self.points[0].draws[L0]

    def nearest(self, l0: Draws) -> _Curve:
        """The point next to ``l0`` alone."""
        point = min(self.points, key=lambda one: abs(np.log(one.draws[L0].value / l0.value)))
        return _Curve(self.family, self.seed, self.metric, [point])

    def holds(self, l0: Draws) -> bool:
        """Whether ``l0`` lies between its points."""
        if not self.has_l0 or len(self.points) < 2:
            return False
        return self.points[0].draws[L0].value <= l0.value <= self.points[-1].draws[L0].value

    def alone(self) -> _Value:
        """The metric of the only point."""
        found = self.points[0].draws[self.metric]
        rest = tuple(np.full(n, found.value) for n in self.units[1:])
        return _Value(found.value, found.draws, (found.leave_one_out, *rest))

    def at(self, l0: Draws) -> _Value:
        """The metric at ``l0``, by the two points around it, in each resample with the L0 that they have there."""
        if not self.has_l0:
            raise NotComparable("L0 was not measured: evaluate with --suite core as well")
        if not self.holds(l0):
            ends = [self.points[at].draws[L0].value for at in (0, -1)]
            raise NotComparable(
                f"L0 {l0.value:.4g} lies outside of what {self.family.name} reaches with seed {self.seed}, "
                f"{ends[0]:.4g} to {ends[1]:.4g}; nothing is extrapolated, choose --l0 within or train other k"
            )
        after = next(i for i, one in enumerate(self.points) if i and l0.value <= one.draws[L0].value)
        low, high = self.points[after - 1], self.points[after]
        y = low.draws[self.metric], high.draws[self.metric]
        x = low.draws[L0], high.draws[L0]
        values, ends_of_x = (y[0].value, y[1].value), (x[0].value, x[1].value)
        value = _between(values, ends_of_x, l0.value)
        draws = _between((y[0].draws, y[1].draws), (x[0].draws, x[1].draws), l0.draws)
        without_y = y[0].leave_one_out, y[1].leave_one_out
        without_x = x[0].leave_one_out, x[1].leave_one_out
        left_out: tuple[Array, ...]
        if len(self.units) == 1:
            left_out = (_between(without_y, without_x, l0.leave_one_out),)
        else:
            left_out = (
                _between(without_y, ends_of_x, l0.value),
                _between(values, without_x, l0.leave_one_out),
            )
        return _Value(float(value), draws, left_out)


def _between(y: tuple[Any, Any], x: tuple[Any, Any], at: Any) -> Any:
    """Linear in log x, for numbers and arrays alike.

    >>> round(float(_between((0.0, 1.0), (10.0, 1000.0), 100.0)), 6)
    0.5
    """
    share = (np.log(at) - np.log(x[0])) / (np.log(x[1]) - np.log(x[0]))
    return y[0] + share * (y[1] - y[0])


def _as_they_are(curves: Sequence[_Curve]) -> Side:
    """The figures of one point a seed."""
    figure = _stacked([curve.alone() for curve in curves])
    if not curves[0].has_l0:
        return Side(figure, None, None)
    block = None
    if all("l0_H" in curve.points[0].draws for curve in curves):
        block = float(np.mean([curve.points[0].draws["l0_H"].value for curve in curves]))
    return Side(figure, float(np.mean([curve.l0.value for curve in curves])), block)


def _read_at(curves: Sequence[_Curve], l0: Sequence[Draws]) -> Side:
    """The seeds' figures at one L0 each."""
    figure = _stacked([curve.at(one) for curve, one in zip(curves, l0, strict=True)])
    block = None
    if all("l0_H" in one.draws for curve in curves for one in curve.points):
        # what a block keeps grows with L0, so its logarithm is what is linear in log L0
        block = float(np.mean([_block_l0(curve, one) for curve, one in zip(curves, l0, strict=True)]))
    return Side(figure, float(np.mean([one.value for one in l0])), block)


def _block_l0(curve: _Curve, l0: Draws) -> float:
    """L0 of block H on the sample, where ``l0`` lies between the curve's points."""
    total, block = (np.log([one.draws[name].value for one in curve.points]) for name in (L0, "l0_H"))
    return float(np.exp(np.interp(np.log(l0.value), total, block)))


def _stacked(found: Sequence[_Value]) -> PerSeed:
    return PerSeed(
        np.array([one.value for one in found]),
        np.stack([one.draws for one in found]),
        tuple(np.stack(level) for level in zip(*(one.left_out for one in found), strict=True)),
    )
