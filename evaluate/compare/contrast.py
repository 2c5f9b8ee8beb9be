"""One comparison: what is found, what it rests on, and what must be said beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tcsae.evaluate.compare.bootstrap import ENOUGH_SEEDS, Ends, PerSeed, Resampled, ends, over_seeds
from tcsae.evaluate.intervals import LEVEL

Kind = Literal["primary", "secondary", "non-inferiority"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure over seeds and documents."""

    value: float | None
    """mean over seeds, None where undefined"""
    low: float | None
    """lower end of the interval, None where there is none"""
    high: float | None
    """upper end"""
    method: str | None
    """bca or percentile; None without an interval"""
    n_seeds: int
    """seeds that it is the mean of"""
    note: str | None
    """what the interval leaves out"""
    reason: str | None
    """why the value or its interval is missing"""


@dataclass(frozen=True, slots=True)
class Contrast:
    """One family against another in one metric."""

    kind: Kind
    """which hypothesis it belongs to"""
    treated: str
    """family"""
    control: str
    """family"""
    why: str
    """why this is the control"""
    metric: str
    """of the treated"""
    control_metric: str
    """of the control: the same, but for its best equal block"""
    unit: str
    """of the metric"""
    difference: Figure
    """treated minus control"""
    treated_figure: Figure
    """at the matched L0"""
    control_figure: Figure
    """at the matched L0"""
    p: float | None
    """two-sided, of no difference; for non-inferiority one-sided, of being inferior by the margin"""
    p_holm: float | None
    """corrected; None for what the correction is not over"""
    margin: float | None
    """of non-inferiority"""
    bound: float | None
    """95 % one-sided bound that must stay within the margin"""
    holds: bool | None
    """whether non-inferiority is shown; None where it is not asked"""
    matching: str
    """how L0 was made equal, or that it is not"""
    is_equal_l0: bool
    """whether it is; if not, the difference may be one of sparsity and no p is given"""
    l0: tuple[float | None, float | None]
    """of treated and control, total"""
    l0_block: tuple[float | None, float | None]
    """of block H"""
    seeds: tuple[int | None, ...]
    """paired"""
    missing_seeds: str | None
    """which are left out, and why"""
    n_documents: int
    """behind the metric"""
    n_tokens: int | None
    """behind the metric, None where its suite does not say"""
    training_tokens: tuple[int | None, int | None]
    """of each SAE of treated and control"""
    n_resamples: int
    """behind the interval"""


def figure_of(values: PerSeed, n_resamples: int, level: float = LEVEL) -> tuple[Figure, Resampled]:
    """The mean over seeds with its interval, and the bootstrap behind it."""
    found = over_seeds(values, n_resamples)
    return described(found, ends(found, level)), found


def described(found: Resampled, interval: Ends | None) -> Figure:
    """A figure with what must be said beside it."""
    note = few_seeds(found.n_seeds)
    if interval is None:
        reason = f"no interval, because {_obstacle(found)}"
        return Figure(found.value, None, None, None, found.n_seeds, note, reason)
    return Figure(found.value, interval.low, interval.high, interval.method, found.n_seeds, note, None)


def _obstacle(found: Resampled) -> str:
    """Why the bootstrap gives no interval."""
    n_bad = int(np.count_nonzero(~np.isfinite(found.draws)))
    if n_bad:
        return f"{n_bad} of {len(found.draws)} resamples are undefined"
    if not np.isfinite(found.variance):
        return "it is undefined without one of the documents"
    if found.variance == 0 or found.draws.std() == 0:
        return "nothing varies"
    return "all resamples lie on one side of it"


def few_seeds(n_seeds: int) -> str | None:
    """What is said beside every figure of fewer than `ENOUGH_SEEDS` seeds.

    >>> few_seeds(1)
    '1 seed: interval over documents only'
    """
    if n_seeds >= ENOUGH_SEEDS:
        return None
    return (
        "1 seed: interval over documents only"
        if n_seeds == 1
        else f"{n_seeds} seeds, fewer than {ENOUGH_SEEDS}"
    )


def holm(found: Sequence[Contrast]) -> list[Contrast]:
    """The contrasts with Holm's correction over the secondary ones that have a p."""
    tested = [i for i, one in enumerate(found) if one.kind == "secondary" and one.p is not None]
    corrected = dict(zip(tested, holm_correction([found[i].p or 0.0 for i in tested]), strict=True))
    return [replace(one, p_holm=corrected.get(i)) for i, one in enumerate(found)]


def holm_correction(p: Sequence[float]) -> list[float]:
    """Holm's step-down p-values: the i-th smallest of m times m - i + 1, never falling, at most 1.

    >>> holm_correction([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    corrected = [0.0] * len(p)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, p[i] * (len(p) - rank)))
        corrected[i] = highest
    return corrected
