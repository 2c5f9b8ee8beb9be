"""Bootstrap intervals over documents, for any metric that is a function of per-document sums.

Tokens of a document are not independent, documents are: so documents are resampled, never tokens. A metric
such as explained variance is a function of sums over tokens (of squared errors, of squares, ...). With those
sums kept per document, a resample is a row of counts (how often each document was drawn) times the matrix of
sums, and all resamples are one matrix product: exact, and no token is touched again.

With the same counts two SAEs are resampled in pairs, so the interval of their difference is the interval of
the elementwise differences of their draws.

The unit of resampling is a *unit*: one document, or a fixed group of documents where there are too many to
keep apart (the caller says which).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Array = np.ndarray[Any, np.dtype[np.float64]]

Statistic = Callable[[Array], Array]
"""From sums [..., sum] to metrics [..., metric]; must work on any leading axes. NaN means undefined."""

Method = Literal["bca", "percentile"]

LEVEL = 0.95
"""Coverage of every interval that is reported."""

MAX_UNITS = 4096
"""More documents than this are resampled in groups: 2,000 resamples then take 64 MB."""


class Bootstrap(NamedTuple):
    """A metric on the sample, on every resample and with every unit left out."""

    value: Float[np.ndarray, " metric"]
    """on the sample itself"""
    draws: Float[np.ndarray, "resample metric"]
    """on each resample"""
    leave_one_out: Float[np.ndarray, "unit metric"]
    """without one unit, for the acceleration of BCa"""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the range that `LEVEL` of such intervals contain it in, or the reason there is none."""

    value: float | None
    """None where the figure itself is undefined"""
    low: float | None
    """lower end, None where there is no interval"""
    high: float | None
    """upper end, None where there is no interval"""
    method: Method | None
    """how the ends were found"""
    reason: str | None
    """why the value or the interval is missing, None if neither is"""


def resample_counts(n_units: int, n_resamples: int, seed: int) -> Float[np.ndarray, "resample unit"]:
    """How often each unit is drawn in each resample; a function of the arguments alone, so that SAEs
    evaluated in different calls are resampled in pairs.

    >>> resample_counts(4, 3, seed=0).sum(axis=1).tolist()
    [4.0, 4.0, 4.0]
    """
    if n_units == 0:
        return np.zeros((n_resamples, 0))
    generator = np.random.default_rng([seed, n_units])
    return generator.multinomial(n_units, np.full(n_units, 1.0 / n_units), size=n_resamples).astype(
        np.float64
    )


def bootstrap(
    sums: Float[np.ndarray, "unit sum"], statistic: Statistic, counts: Float[np.ndarray, "resample unit"]
) -> Bootstrap:
    """``statistic`` on the sample, on the resamples given by ``counts`` and leaving each unit out.

    >>> ratio = lambda sums: sums[..., :1] / sums[..., 1:]
    >>> bootstrap(np.array([[1.0, 2.0], [5.0, 2.0]]), ratio, np.array([[2.0, 0.0]])).draws
    array([[0.5]])
    """
    total = sums.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Bootstrap(statistic(total), statistic(counts @ sums), statistic(total - sums))


def percentile_ends(draws: Float[np.ndarray, " resample"], level: float = LEVEL) -> tuple[float, float]:
    """The central ``level`` of the draws (linear interpolation between order statistics)."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bca_ends(
    value: float,
    draws: Float[np.ndarray, " resample"],
    leave_one_out: Float[np.ndarray, " unit"],
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """Ends of the bias-corrected and accelerated interval, or None where it does not exist.

    Efron (1987): with z0 the normal quantile of the share of draws below the value (ties count half) and
    ``a`` the skewness of the jackknife values over 6, the percentiles taken are
    Phi(z0 + (z0 + z) / (1 - a (z0 + z))) for z at (1 -+ level) / 2. It does not exist if every draw lies on
    one side of the value, if leaving out any unit changes nothing or if its ends are one and the same.
    """
    normal = NormalDist()
    below = float(np.mean(draws < value) + 0.5 * np.mean(draws == value))
    deviations = leave_one_out.mean() - leave_one_out
    spread = float(np.square(deviations).sum())
    if not 0.0 < below < 1.0 or spread == 0.0:
        return None
    bias = normal.inv_cdf(below)
    acceleration = float((deviations**3).sum()) / (6.0 * spread**1.5)
    shares = []
    for z in (normal.inv_cdf((1 - level) / 2), normal.inv_cdf((1 + level) / 2)):
        shrink = 1.0 - acceleration * (bias + z)
        if shrink <= 0.0:
            return None
        shares.append(normal.cdf(bias + (bias + z) / shrink))
    low, high = np.quantile(draws, shares)
    # few units, most resamples on one side of the value: both ends may come from resamples that tie
    return (float(low), float(high)) if low < high else None


def interval(
    value: float,
    draws: Float[np.ndarray, " resample"],
    leave_one_out: Float[np.ndarray, " unit"],
    *,
    undefined: str = "0/0",
    unit: str = "document",
    level: float = LEVEL,
) -> Interval:
    """The BCa interval of one metric, the percentile interval where BCa does not exist.

    Parameters
    ----------
    value, draws, leave_one_out
        one metric of a `Bootstrap`, or elementwise combinations of two with the same counts
    undefined
        why the value is undefined, should it be NaN or infinite; the reason given is
        "undefined, because ``undefined``"
    unit
        what was resampled, for the reason why there is no interval
    """
    if not np.isfinite(value):
        return Interval(None, None, None, None, f"undefined, because {undefined}")
    if len(leave_one_out) < 2:
        return Interval(
            float(value), None, None, None, f"no interval, because there is only one {unit} to resample"
        )
    n_bad = int(np.count_nonzero(~np.isfinite(draws)))
    if n_bad:
        return Interval(
            float(value),
            None,
            None,
            None,
            f"no interval, because {n_bad} of {len(draws)} resamples are undefined",
        )
    ends = bca_ends(value, draws, leave_one_out, level) if np.isfinite(leave_one_out).all() else None
    method: Method = "bca" if ends else "percentile"
    low, high = ends or percentile_ends(draws, level)
    return Interval(float(value), low, high, method, None)
