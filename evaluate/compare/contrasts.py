"""The pre-registered comparison: primary endpoint, non-inferiority, and the rest with Holm's correction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tcsae.evaluate.compare.arms import Design, Family, Pair
from tcsae.evaluate.compare.bootstrap import ends, p_value
from tcsae.evaluate.compare.contrast import Contrast, Figure, Kind, figure_of, holm
from tcsae.evaluate.compare.matching import Matched, NotComparable, Side, match
from tcsae.evaluate.compare.registered import BEST_BLOCK, MARGINS, SECONDARY, TOST_LEVEL
from tcsae.evaluate.estimates import Estimate


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
