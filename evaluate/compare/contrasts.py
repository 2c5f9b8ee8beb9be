"""The pre-registered comparison: primary endpoint, non-inferiority, and the rest with Holm's correction.

Registered before any measurement (METHOD.md, section 5):

- primary: the contrast (w = 16) minus the same SAE with alpha = 0, in the excess normalised mutual information at lag 8
  over the whole dictionary, at L0 = 40 or the nearest that all arms reach; 5 % two-sided, no correction;
- non-inferiority of reconstruction, two one-sided tests (TOST): FVU rises by at most 0.01, loss recovered falls by at
  most 0.005; each at 5 % one-sided, that is, the 90 % interval lies within the margin. Both must hold, which needs
  no correction (intersection-union; Berger 1982);
- everything else: two-sided, Holm's (1979) correction over all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tcsae.evaluate.compare.arms import Design, Family, Pair
from tcsae.evaluate.compare.bootstrap import (
    ENOUGH_SEEDS,
    Alternative,
    Ends,
    PerSeed,
    Resampled,
    ends,
    over_seeds,
    p_value,
)
from tcsae.evaluate.compare.matching import Matched, NotComparable, Side, match
from tcsae.evaluate.estimates import Estimate
from tcsae.evaluate.intervals import LEVEL
from tcsae.evaluate.probe_figures import probe_name

REGISTERED = "excess_information_whole_lag8"
"""Metric of the primary endpoint."""

STAND_IN = "autocorrelation_whole_lag8"
"""Metric in its place where an evaluation has no excess information; said wherever it is shown."""

TEMPORAL = tuple(
    f"{kind}_{part}_lag{lag}"
    for kind in ("excess_information", "autocorrelation", "within_autocorrelation")
    for part in ("whole", "H", "L")
    for lag in (1, 8, 32)
)
QUALITY = ("fvu", "loss_recovered", "kl_sae")
PROBES = tuple(
    probe_name(task, part, 20)
    for task in ("topic", "source", "position", "token", "previous_token")
    for part in ("H", "whole")
)
USES = ("unlearning_score", *PROBES)

SECONDARY = tuple((metric, metric) for metric in (*TEMPORAL, *QUALITY, *USES))
"""Compared beside the primary endpoint, where measured: the metric of the treated and of the control."""

BEST_BLOCK = tuple(
    (f"{kind}_H_lag8", f"{kind}_best_lag8") for kind in ("excess_information", "autocorrelation")
)
"""Block H against the block of the same size that hindsight finds in the control."""

MARGINS: dict[str, tuple[float, Alternative]] = {"fvu": (0.01, "less"), "loss_recovered": (-0.005, "greater")}
"""Differences, treated minus control, that reconstruction must stay within, and on which side."""

TOST_LEVEL = 0.90
"""The two-sided interval whose ends are one-sided bounds of 95 %."""

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
        return Figure(
            found.value, None, None, None, found.n_seeds, note, "no interval, because nothing varies"
        )
    return Figure(found.value, interval.low, interval.high, interval.method, found.n_seeds, note, None)


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


def contrasts_of(
    design: Design,
    *,
    primary: str,
    target: Callable[[Pair], float | None],
    n_resamples: int,
    advance: Callable[[int], object] = lambda _: None,
) -> list[Contrast]:
    """Every comparison of ``design``, Holm's correction done.

    Parameters
    ----------
    design
        the pairs
    primary
        metric of the primary endpoint
    target
        L0 at which two curves are compared
    n_resamples
        of the bootstrap
    advance
        told of each finished pair
    """
    found = []
    for pair in design.pairs:
        for metrics in dict.fromkeys(((primary, primary), *SECONDARY, *BEST_BLOCK)):
            kind: Kind = (
                "primary" if pair.role == "primary" and metrics[0] == metrics[1] == primary else "secondary"
            )
            if all(_estimate(*one) for one in zip((pair.treated, pair.control), metrics, strict=True)):
                found += _compared(pair, metrics, kind, target(pair), n_resamples)
            elif kind == "primary":
                reason = f"undefined, because the folders have no {primary}"
                found.append(_absent(pair, metrics, kind, reason))
        advance(1)
    return holm(found)


def _estimate(family: Family, metric: str) -> Estimate | None:
    saes = [one for arm in family.arms for one in arm.saes.values() if metric in one.estimates]
    return saes[0].estimates[metric] if saes else None


def _compared(
    pair: Pair, metrics: tuple[str, str], kind: Kind, target: float | None, n_resamples: int
) -> list[Contrast]:
    """The comparison in one metric and, where it has a margin, the test of non-inferiority."""
    metric = metrics[0]
    try:
        matched = match(pair.treated, pair.control, metrics, target)
        difference, found = figure_of(matched.difference, n_resamples)
    except NotComparable as reason:
        return [_absent(pair, metrics, kind, f"undefined, because {reason}")]
    p = p_value(found, 0.0) if matched.is_equal else None
    plain = _contrast(pair, metrics, kind, matched, difference, p, n_resamples)
    if metric not in MARGINS:
        return [plain]
    margin, side = MARGINS[metric]
    both = ends(found, TOST_LEVEL)
    bound = None if both is None else both.high if side == "less" else both.low
    inferior = p_value(found, margin, side)
    shown = (
        None
        if bound is None or not matched.is_equal
        else bound < margin
        if side == "less"
        else bound > margin
    )
    test = replace(
        plain,
        kind="non-inferiority",
        margin=margin,
        bound=bound,
        holds=shown,
        p=inferior if matched.is_equal else None,
    )
    return [plain, test]


def _contrast(
    pair: Pair,
    metrics: tuple[str, str],
    kind: Kind,
    matched: Matched,
    difference: Figure,
    p: float | None,
    n_resamples: int,
) -> Contrast:
    def figure(side: Side) -> Figure:
        return figure_of(side.figure, n_resamples)[0]

    estimate = _estimate(pair.treated, metrics[0])
    assert estimate is not None
    return Contrast(
        kind=kind,
        treated=pair.treated.name,
        control=pair.control.name,
        why=pair.why,
        metric=metrics[0],
        control_metric=metrics[1],
        unit=estimate.unit,
        difference=difference,
        treated_figure=figure(matched.treated),
        control_figure=figure(matched.control),
        p=p,
        p_holm=None,
        margin=None,
        bound=None,
        holds=None,
        matching=matched.how,
        is_equal_l0=matched.is_equal,
        l0=(matched.treated.l0, matched.control.l0),
        l0_block=(matched.treated.l0_block, matched.control.l0_block),
        seeds=matched.seeds,
        missing_seeds=matched.missing,
        n_documents=estimate.n_documents,
        n_tokens=pair.treated.one.tokens.get(metrics[0]),
        training_tokens=(pair.treated.arms[0].training_tokens, pair.control.arms[0].training_tokens),
        n_resamples=n_resamples if len(matched.seeds) > 1 else matched.treated.figure.draws.shape[1],
    )


def _absent(pair: Pair, metrics: tuple[str, str], kind: Kind, reason: str) -> Contrast:
    """A comparison that cannot be made, with its reason."""
    nothing = Figure(None, None, None, None, 0, None, reason)
    estimate = _estimate(pair.treated, metrics[0])
    return Contrast(
        kind=kind,
        treated=pair.treated.name,
        control=pair.control.name,
        why=pair.why,
        metric=metrics[0],
        control_metric=metrics[1],
        unit="" if estimate is None else estimate.unit,
        difference=nothing,
        treated_figure=nothing,
        control_figure=nothing,
        p=None,
        p_holm=None,
        margin=None,
        bound=None,
        holds=None,
        matching="not matched",
        is_equal_l0=False,
        l0=(None, None),
        l0_block=(None, None),
        seeds=(),
        missing_seeds=None,
        n_documents=0 if estimate is None else estimate.n_documents,
        n_tokens=None,
        training_tokens=(pair.treated.arms[0].training_tokens, pair.control.arms[0].training_tokens),
        n_resamples=0,
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
