"""The two-level bootstrap: seeds are drawn with replacement, documents are drawn with replacement.

Every seed of an arm was measured on the same documents, so seeds and documents are crossed, not nested: one resample
is a set of seeds and one resample of documents that all of them see (Owen 2007, "The pigeonhole bootstrap"). What
`evaluate` has saved, each SAE's figure on the same resamples of documents, is all that this needs: resample number r
takes saved draw r modulo their number, and its own seeds.

The interval is Efron's (1987) BCa. Its acceleration, for a figure of several samples (seeds, documents), is

    a = sum_k sum_i u_ki^3 / (6 (sum_k sum_i u_ki^2)^1.5),   u_ki = (n_k - 1) / n_k (mean_j theta_(kj) - theta_(ki))

with theta_(ki) the figure without unit i of sample k (Davison and Hinkley 1997, section 5.3; for one sample it is that
of Efron 1987 and of DiCiccio and Efron 1996).

With 5 seeds a BCa interval of "95 %" covers about 85 %: a bootstrap of n units is too narrow by sqrt((n - 1) / n), and
it has the normal's quantiles where Student's would be right. So the levels that BCa takes are expanded, as Hesterberg
(2015, "What teachers should know about the bootstrap") does for one sample:

    z becomes t_df sqrt(V) / (spread of the draws)

    V = V_seeds + sum_k (V_k - V_ks)
    df = V^2 / (V_seeds^2 / (S - 1) + sum_k V_k^2 / (n_k - 1) + V_ks^2 / ((n_k - 1) (S - 1)))

V_seeds and V_k are the variances of the figure over S seeds and over n_k documents, V_ks that of their interaction,
which both contain (analysis of variance of the crossed values y_si = theta_s + n_k u_si, df by Satterthwaite). With
one seed only V_k is left. Where a quantile beyond the outermost `TAIL` of the resamples is asked for, their
distribution goes on as the normal one with their spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from tcsae.evaluate.intervals import LEVEL, Array

N_RESAMPLES = 10_000
"""Resamples of seeds and documents behind every figure, as pre-registered."""

ENOUGH_SEEDS = 5
"""Fewer are said to be few beside every figure."""

TAIL = 0.0025
"""Share of the resamples at either end that says too little about where exactly a quantile lies."""

Alternative = Literal["two-sided", "less", "greater"]

_NORMAL = NormalDist()


class PerSeed(NamedTuple):
    """A figure for each seed, on the sample, on every saved resample of documents and without each document."""

    value: Float[np.ndarray, " seed"]
    """on the sample"""
    draws: Float[np.ndarray, "seed draw"]
    """on each resample of documents; the same documents in a column"""
    left_out: tuple[Float[np.ndarray, "seed _"], ...]
    """without each document; one array for each set of documents that the figure rests on"""


@dataclass(frozen=True, slots=True)
class Resampled:
    """A figure with its bootstrap over all levels."""

    value: float
    """on the sample"""
    draws: Float[np.ndarray, " resample"]
    """on each resample"""
    acceleration: float
    """of BCa"""
    variance: float
    """of the value, without the bootstrap's bias; 0: nothing varies"""
    df: float
    """degrees of freedom of that variance"""
    n_seeds: int
    """seeds that it is the mean of"""


@dataclass(frozen=True, slots=True)
class Ends:
    """An interval."""

    low: float
    """lower end"""
    high: float
    """upper end"""
    method: Literal["bca", "percentile"]
    """percentile where BCa does not exist"""


@lru_cache(maxsize=16)
def seed_counts(n_seeds: int, n_resamples: int) -> Float[np.ndarray, "resample seed"]:
    """How often each seed is drawn in each resample; a function of its arguments, so that all figures of the same
    seeds are resampled together. The array is shared, hence read-only.

    >>> seed_counts(3, 2).sum(axis=1).tolist()
    [3.0, 3.0]
    """
    generator = np.random.default_rng(n_seeds)
    share = np.full(n_seeds, 1.0 / n_seeds)
    counts = generator.multinomial(n_seeds, share, size=n_resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def over_seeds(figure: PerSeed, n_resamples: int = N_RESAMPLES) -> Resampled:
    """The mean of ``figure`` over its seeds, resampled over seeds and documents.

    One seed cannot be resampled: then the saved draws are what there is, and the interval is over documents only.
    """
    n_seeds, n_draws = figure.draws.shape
    influences = [_influence(one) for one in figure.left_out if one.shape[1] > 1]
    levels = [one.mean(axis=0) for one in influences]
    if n_seeds == 1:
        draws = figure.draws[0]
    else:
        rows = np.arange(n_resamples) % n_draws
        draws = np.einsum("rs,sr->r", seed_counts(n_seeds, n_resamples), figure.draws[:, rows]) / n_seeds
        levels.append((figure.value - figure.value.mean()) / n_seeds)
    variance, df = _variance(figure.value, influences)
    squares = sum(float((one**2).sum()) for one in levels)
    cubes = sum(float((one**3).sum()) for one in levels)
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0
    return Resampled(float(figure.value.mean()), draws, acceleration, variance, df, n_seeds)


def _influence(left_out: Float[np.ndarray, "seed unit"]) -> Float[np.ndarray, "seed unit"]:
    """What each unit adds to each seed's figure, about 0."""
    n = left_out.shape[1]
    influence: Array = (n - 1) / n * (left_out.mean(axis=1, keepdims=True) - left_out)
    return influence


def _variance(value: Array, influences: list[Array]) -> tuple[float, float]:
    """Variance of the mean over seeds, and its degrees of freedom; see the module."""
    n_seeds = len(value)
    whole = narrowest = uncertain = 0.0
    if n_seeds > 1:
        whole = narrowest = float(value.var(ddof=1)) / n_seeds
        uncertain = whole**2 / (n_seeds - 1)
    for influence in influences:
        n = influence.shape[1]
        of_documents = influence.mean(axis=0)
        own = n / (n - 1) * float((of_documents**2).sum())
        narrowest = max(narrowest, own)
        whole += own
        uncertain += own**2 / (n - 1)
        if n_seeds > 1:
            rest = influence - of_documents
            shared = float((rest**2).sum()) / ((n_seeds - 1) * (n - 1)) * n / n_seeds
            whole -= shared
            uncertain += shared**2 / ((n_seeds - 1) * (n - 1))
    whole = max(whole, narrowest)
    return whole, whole**2 / uncertain if uncertain > 0 else np.inf


class _Map(NamedTuple):
    """What turns levels into quantiles."""

    bias: float
    acceleration: float
    widening: float


def _map(found: Resampled) -> _Map | None:
    """Bias, acceleration and expansion; None where nothing varies."""
    spread = float(found.draws.std())
    below = float(np.mean(found.draws < found.value) + 0.5 * np.mean(found.draws == found.value))
    if not (found.variance > 0 and spread > 0 and 0 < below < 1):
        return None
    return _Map(_NORMAL.inv_cdf(below), found.acceleration, float(np.sqrt(found.variance)) / spread)


def ends(found: Resampled, level: float = LEVEL) -> Ends | None:
    """The two-sided interval of ``level``, None where the figure does not vary at all."""
    shape = _map(found)
    if shape is None:
        return None
    z = shape.widening * float(student.ppf((1 + level) / 2, found.df))
    low, high = _bca(shape, -z), _bca(shape, z)
    if low is None or high is None:
        return Ends(_quantile(found.draws, -z), _quantile(found.draws, z), "percentile")
    return Ends(_quantile(found.draws, low), _quantile(found.draws, high), "bca")


def _bca(shape: _Map, z: float) -> float | None:
    shrink = 1 - shape.acceleration * (shape.bias + z)
    return None if shrink <= 0 else shape.bias + (shape.bias + z) / shrink


def p_value(found: Resampled, null: float, alternative: Alternative = "two-sided") -> float | None:
    """The smallest p at which the interval of level 1 - p leaves ``null`` out.

    Parameters
    ----------
    found
        the figure
    null
        its value under the hypothesis
    alternative
        "two-sided"; "less" or "greater": the one-sided bound, against the hypothesis that the figure is at least or
        at most ``null``

    The interval is inverted in closed form: the null's normal score among the draws is taken back through BCa and the
    expansion, and what comes out is a value of Student's t. None where the figure does not vary.
    """
    shape = _map(found)
    if shape is None:
        return None
    from_bias = _normal_score(found.draws, null) - shape.bias
    grow = 1 + shape.acceleration * from_bias
    # beyond the pole of BCa's map no level reaches; there the acceleration is left out
    z = (from_bias / grow if grow > 0 else from_bias) - shape.bias
    score = z / shape.widening
    if alternative == "two-sided":
        return float(2 * student.sf(abs(score), found.df))
    return float(student.sf(score if alternative == "less" else -score, found.df))


def _quantile(draws: Array, z: float) -> float:
    """The draws' quantile at Phi(z), beyond `TAIL` continued with the spread of the draws."""
    edge = _NORMAL.inv_cdf(1 - TAIL)
    inside = min(max(z, -edge), edge)
    return float(np.quantile(draws, _NORMAL.cdf(inside)) + (z - inside) * draws.std())


def _normal_score(draws: Array, at: float) -> float:
    """The z whose `_quantile` is ``at``."""
    edge = _NORMAL.inv_cdf(1 - TAIL)
    low, high = np.quantile(draws, [TAIL, 1 - TAIL])
    spread = float(draws.std())
    if at < low:
        return -edge + float(at - low) / spread
    if at > high:
        return edge + float(at - high) / spread
    ordered = np.sort(draws)
    first, after = int(np.searchsorted(ordered, at, "left")), int(np.searchsorted(ordered, at, "right"))
    # places of order statistics as np.quantile has them: 0 for the lowest, 1 for the highest, linear between
    if first < after:
        place = (first + after - 1) / 2
    else:
        place = first - 1 + float((at - ordered[first - 1]) / (ordered[first] - ordered[first - 1]))
    return _NORMAL.inv_cdf(min(max(place / (len(draws) - 1), TAIL), 1 - TAIL))
