"""Lag-delta autocorrelation of every feature, from sums that are kept per unit of resampling.

For feature f and lag d, over all pairs (t, t + d) within one context, with m and v the mean and variance of f
over all counted tokens of all documents:

    rho(d) = mean over pairs of (f_t - m) (f_{t+d} - m) / v

The mean is global, so a feature that is on throughout some documents and off in others counts as persistent;
that is what is asked. The within-document part has each document's own mean for m, and for v the mean square about
it; in a document of n tokens that lowers it by about (1 + 2 timescale) / n, more where documents are short.

From n tokens, s = sum f, q = sum f^2, and at each lag n_d pairs, e = sum over pairs of f_t + f_{t+d} and
p = sum over pairs of f_t f_{t+d}:

    sum over pairs of (f_t - m)(f_{t+d} - m) = p - m e + n_d m^2

so the figure without some unit follows from sums, exactly, with its own m and v.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tcsae.evaluate.intervals import Array

ROUNDING = 1e-9
"""Share of the mean square below which a variance is what rounding leaves of a constant."""


def pooled(
    n: Float[np.ndarray, "*any 1"],
    n_pairs: Float[np.ndarray, "*any 1"],
    *,
    total: Float[np.ndarray, "*any feature"],
    square: Float[np.ndarray, "*any feature"],
    ends: Float[np.ndarray, "*any feature"],
    product: Float[np.ndarray, "*any feature"],
) -> Array:
    """Autocorrelation with the global mean; NaN where the feature does not vary or there is no pair.

    A feature that is 1, 1, 0, 0: its three pairs of neighbours give (1/4 - 1/4 + 1/4) / 3 over a variance of 1/4.

    >>> one = lambda number: np.array([[float(number)]])
    >>> pooled(one(4), one(3), total=one(2), square=one(2), ends=one(3), product=one(1)).round(3).tolist()
    [[0.333]]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / n
        variance = _varying(square / n - np.square(mean), square / n)
        return np.asarray(((product - mean * ends) / n_pairs + np.square(mean)) / variance)


def within(
    n: Float[np.ndarray, "*any 1"],
    n_pairs: Float[np.ndarray, "*any 1"],
    *,
    square: Float[np.ndarray, "*any feature"],
    within_square: Float[np.ndarray, "*any feature"],
    within_product: Float[np.ndarray, "*any feature"],
) -> Array:
    """Autocorrelation about each document's own mean, from sums about it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = _varying(within_square / n, square / n)
        return np.asarray(within_product / n_pairs / variance)


def timescale(rho: Float[np.ndarray, " lag *any"], lags: tuple[int, ...]) -> Array:
    """Integral timescale, in tokens: the sum of rho over all lags from 1 to the last one of ``lags``.

    Between two lags rho is taken to fall geometrically, which is exact for an AR(1) process. The sum stops before
    the first of ``lags`` at which rho is not positive (or not defined): from there on it is noise. It is NaN where
    rho is at the first lag, and 0 where that is not positive.

    >>> float(timescale(0.5 ** np.array([1.0, 2.0, 4.0]), (1, 2, 4)))  # 1/2 + 1/4 + 1/8 + 1/16
    0.9375
    >>> float(timescale(np.array([0.5, 0.0, 0.9]), (1, 2, 4)))
    0.5
    """
    going = np.where(np.isnan(rho[0]), np.nan, np.ones_like(rho[0]))
    total, before, at = 0.0 * going, np.ones_like(rho[0]), 0
    for value, lag in zip(rho, lags, strict=True):
        n_steps = lag - at
        with np.errstate(divide="ignore", invalid="ignore"):
            going = going * (value > 0)
            ratio = np.where(value > 0, value / before, 0.0) ** (1 / n_steps)
        reached, term = np.zeros_like(total), before
        for _ in range(n_steps):
            term = term * ratio
            reached += term
        total = total + np.where(going == 0, 0.0, going * reached)
        before, at = np.where(value > 0, value, 1.0), lag
    return np.asarray(total)


def _varying(variance: Array, mean_square: Array) -> Array:
    """NaN for what rounding leaves of no variance."""
    return np.where(variance > ROUNDING * mean_square, variance, np.nan)
