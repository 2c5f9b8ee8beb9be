"""Lag-delta autocorrelation of every feature, from sums that are kept per unit of resampling.

For feature f and lag d, over all pairs (t, t + d) within one context, with m and v the mean and variance of f
over all counted tokens of all documents:

    rho(d) = mean over pairs of (f_t - m) (f_{t+d} - m) / v

The mean is global, so a feature that is on throughout some documents and off in others counts as persistent;
that is what is asked. A token counts if it is kept (neither special nor an outlier) and stands at position 8
or later in its context; a pair counts if both its tokens do.

Sufficient statistics per unit u (a document, or a group of them):

    n_u, s_u = sum f, q_u = sum f^2,  and per lag
    n_ud pairs, e_ud = sum over pairs of f_t + f_{t+d}, p_ud = sum over pairs of f_t f_{t+d}
    sum over pairs of (f_t - m)(f_{t+d} - m) = p - m e + n m^2

so a resample of documents is a weighted sum of them: exact, with its own m and v. They take
8 (2 lags + 2) bytes per unit and feature, whatever the length of the store.

All sums are of f minus a shift (the mean over the first block's counted tokens), which changes no correlation but keeps
float32 products accurate where the mean of a feature is large beside its spread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.evaluate.intervals import Array

LAGS = (1, 2, 4, 8, 16, 32)
"""In tokens."""

SKIPPED_POSITIONS = 8
"""First tokens of each context that do not count: their activations depend on the position itself."""


class Codes(NamedTuple):
    """Feature activations of some whole contexts."""

    f: Float[Tensor, "row feature"]
    """features"""
    counted: Bool[Tensor, " row"]
    """tokens that count, see the module"""
    context: Int64[Tensor, " row"]
    """a number that is the same within a context and differs between neighbouring ones"""
    unit: Int64[Tensor, " row"]
    """unit of resampling"""


@dataclass(frozen=True, slots=True)
class LagSums:
    """The sufficient statistics of the module's text; arrays are float64."""

    n: Float[np.ndarray, " unit"]
    """counted tokens"""
    n_pairs: Float[np.ndarray, "unit lag"]
    """counted pairs"""
    total: Float[np.ndarray, "unit feature"]
    """sum of f - shift"""
    square: Float[np.ndarray, "unit feature"]
    """sum of (f - shift)^2"""
    ends: Float[np.ndarray, "lag unit feature"]
    """sum over pairs of both ends, minus 2 shift"""
    product: Float[np.ndarray, "lag unit feature"]
    """sum over pairs of the product of both ends, each minus shift"""
    shift: Float[np.ndarray, " feature"]
    """what was subtracted"""
    firings: Int64[np.ndarray, " feature"]
    """counted tokens at which the feature is not 0"""


def bytes_per_unit(d_sae: int, n_lags: int = len(LAGS)) -> int:
    """Memory that one more unit costs."""
    return 8 * (2 * n_lags + 2) * d_sae


def lag_sums(codes: Iterable[Codes], n_units: int, d_sae: int, lags: tuple[int, ...] = LAGS) -> LagSums:
    """Sums over all ``codes``, one pass, in memory that does not grow with their number.

    Each block of codes must hold whole contexts. The sums by unit are matrix products with a sparse-looking
    but small matrix (units present in the block x rows), which is faster than any scatter.
    """
    n = np.zeros(n_units)
    n_pairs = np.zeros((n_units, len(lags)))
    total, square = np.zeros((n_units, d_sae)), np.zeros((n_units, d_sae))
    ends, product = np.zeros((len(lags), n_units, d_sae)), np.zeros((len(lags), n_units, d_sae))
    firings = np.zeros(d_sae, dtype=np.int64)
    shift: Tensor | None = None
    for f, counted, context, unit in codes:
        if not counted.any():
            continue
        firings += (f[counted] != 0).sum(dim=0).cpu().numpy()
        if shift is None:
            shift = f[counted].mean(dim=0)
        g = f - shift
        present, place = torch.unique(unit, return_inverse=True)
        here = present.numpy()
        one_hot = torch.nn.functional.one_hot(place, len(present)).T.to(torch.float32)
        single = one_hot * counted
        # the units of a block are all different, so indexing with them adds to each once
        n[here] += single.sum(dim=1).numpy()
        total[here] += _by_unit(single, g)
        square[here] += _by_unit(single, g.square())
        for at, lag in enumerate(lags):
            if lag >= len(g):
                continue
            pair = counted[:-lag] & counted[lag:] & (context[:-lag] == context[lag:])
            paired = one_hot[:, :-lag] * pair
            at_either_end = torch.nn.functional.pad(paired, (0, lag)) + torch.nn.functional.pad(
                paired, (lag, 0)
            )
            n_pairs[here, at] += paired.sum(dim=1).numpy()
            ends[at, here] += _by_unit(at_either_end, g)
            product[at, here] += _by_unit(paired, g[:-lag] * g[lag:])
    centre = np.zeros(d_sae) if shift is None else shift.double().cpu().numpy()
    return LagSums(n, n_pairs, total, square, ends, product, centre, firings)


def _by_unit(
    weights: Float[Tensor, "unit row"], values: Float[Tensor, "row feature"]
) -> Float[np.ndarray, "unit feature"]:
    """Sums of ``values`` by unit."""
    return (weights.to(values.device) @ values).cpu().numpy()


def autocorrelation(
    sums: LagSums, weights: Float[np.ndarray, "*resample unit"], features: slice
) -> tuple[Array, Array]:
    """Autocorrelation and energy of some features on weighted units.

    Parameters
    ----------
    sums
        from `lag_sums`
    weights
        how often each unit counts: ones for the sample, a row of counts for a resample
    features
        which features; 2,000 resamples of 128 features take 2 MB a lag

    Returns
    -------
    rho
        [lag, ..., feature]; NaN where the feature does not vary or there is no pair
    energy
        sum of f^2 over the counted tokens, [..., feature]
    """
    n = (weights @ sums.n)[..., None]
    total, square = weights @ sums.total[:, features], weights @ sums.square[:, features]
    shift = sums.shift[features]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / n
        variance = square / n - np.square(mean)
        # rounding leaves a trace of variance in a constant
        variance = np.where(variance > 1e-9 * (square / n), variance, np.nan)
        rho = []
        for at in range(len(sums.product)):
            pairs = (weights @ sums.n_pairs[:, at])[..., None]
            product, ends = weights @ sums.product[at, :, features], weights @ sums.ends[at, :, features]
            covariance = (product - mean * ends) / pairs + np.square(mean)
            rho.append(covariance / variance)
    return np.stack(rho), square + 2 * shift * total + n * np.square(shift)
