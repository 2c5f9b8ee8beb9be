"""The temporal metrics of every feature, on all units and without each one.

autocorrelation, within_autocorrelation    see `tcsae.evaluate.autocorrelation`
persistence       P(on at t + d | on at t) - P(on), over pairs and over counted tokens
information, permuted_information, matched_information, excess_information    see `tcsae.evaluate.information`
timescale         sum of the autocorrelation over lags 1 to 32, in tokens
run_length        mean length of an on-run, in tokens. A run is a longest stretch of counted tokens of one context
                  that are next to each other and on; one that is cut, by the context's first counted token, its
                  end or a token that does not count, counts with the length that is seen
smoothness        mean over contexts in which the feature is on of max_t |f_{t+1} - f_t| / ||x_{t+1} - x_t||, in
                  activation of the feature per activation of the model; the smaller the smoother
total_variation   sum over neighbours of |f_{t+1} - f_t| over sum of f, at most 2; the smaller the smoother
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from tcsae.evaluate.autocorrelation import pooled, timescale, within
from tcsae.evaluate.information import normalised_information
from tcsae.evaluate.intervals import Array
from tcsae.evaluate.temporal_codes import KINDS
from tcsae.evaluate.temporal_sums import TemporalSums

CACHED_ELEMENTS = 2**15
"""elements of an array that a thread works on at once: what becomes of them stays in the processor's cache"""

NO_PAIR = "no pair of tokens lies this far apart in one context, or no feature here varies"


@dataclass(frozen=True, slots=True)
class TemporalMetric:
    """One figure of a feature."""

    name: str
    """without lag"""
    unit: str
    """as in the result files"""
    has_lag: bool
    """whether there is one for each lag"""
    is_better_high: bool
    """whether more persistent features have larger values"""
    undefined: str
    """why it is undefined where it is"""


_MATCHED = "no two documents have contexts to be matched by position, or none is this long"

METRICS = {
    metric.name: metric
    for metric in (
        TemporalMetric("autocorrelation", "1", True, True, NO_PAIR),
        TemporalMetric("within_autocorrelation", "1", True, True, NO_PAIR),
        TemporalMetric("persistence", "1", True, True, NO_PAIR),
        TemporalMetric("information", "1", True, True, NO_PAIR),
        TemporalMetric("permuted_information", "1", True, True, NO_PAIR),
        TemporalMetric("matched_information", "1", True, True, _MATCHED),
        TemporalMetric("excess_information", "1", True, True, _MATCHED),
        TemporalMetric("timescale", "tokens", False, True, NO_PAIR),
        TemporalMetric("run_length", "tokens", False, True, NO_PAIR),
        TemporalMetric("smoothness", "1", False, False, "no token that counts has a neighbour that counts"),
        TemporalMetric("total_variation", "1", False, False, NO_PAIR),
    )
}
"""By name, in the order of the tables."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric, at one lag if it has them, of every feature."""

    metric: TemporalMetric
    lag: int | None
    """in tokens"""
    values: Float[np.ndarray, "sample feature"]
    """on all units, then without each; NaN where undefined"""

    @property
    def column(self) -> str:
        """Name in the table of features."""
        return self.metric.name if self.lag is None else f"{self.metric.name}_lag{self.lag}"


def samples(by_unit: np.ndarray) -> Array:
    """The sum over units, then the sums without each.

    >>> samples(np.array([1.0, 2.0, 5.0])).tolist()
    [8.0, 7.0, 6.0, 3.0]
    """
    total = by_unit.sum(axis=0, dtype=np.float64, keepdims=True)
    return np.concatenate([total, total - by_unit])


def energy(sums: TemporalSums) -> Float[np.ndarray, "sample feature"]:
    """Sum of f^2 over the counted tokens, the weight of energy-weighted means."""
    return samples(sums.once("square"))


def autocorrelation_figures(sums: TemporalSums) -> Iterator[Figure]:
    """What needs no feature to be off: autocorrelation, its within-document part, timescale."""
    n, square, total = (samples(part) for part in (sums.n[:, None], sums.once("square"), sums.once("total")))
    within_square = samples(sums.once("within_square"))
    rho = []
    for at, lag in enumerate(sums.lags):
        n_pairs = samples(sums.n_pairs[:, 0, at, None])
        ends, product = samples(sums.by_lag("ends", at)), samples(sums.by_lag("product", at))
        rho.append(pooled(n, n_pairs, total=total, square=square, ends=ends, product=product))
        yield Figure(METRICS["autocorrelation"], lag, rho[-1])
        within_product = samples(sums.by_lag("within_product", at))
        values = within(n, n_pairs, square=square, within_square=within_square, within_product=within_product)
        yield Figure(METRICS["within_autocorrelation"], lag, values)
    if sums.lags[0] == 1:
        yield Figure(METRICS["timescale"], None, timescale(np.stack(rho), sums.lags))


def figures(sums: TemporalSums) -> Iterator[Figure]:
    """Every metric at every lag."""
    yield from autocorrelation_figures(sums)
    n, firings = samples(sums.n[:, None]), samples(sums.once("firings"))
    for at, lag in enumerate(sums.lags):
        yield from _of_states(sums, at, lag, _ratio(firings, n))
    total, runs = samples(sums.once("total")), samples(sums.once("runs"))
    steepest, n_steepest = samples(sums.once("steepest")), samples(sums.once("n_steepest"))
    yield Figure(METRICS["run_length"], None, _ratio(firings, runs))
    yield Figure(METRICS["smoothness"], None, _ratio(steepest, n_steepest))
    if sums.lags[0] == 1:
        # |a - b| = a + b - 2 min(a, b)
        variation = samples(sums.by_lag("ends", 0) - 2 * sums.once("minima"))
        has_pair = samples(sums.n_pairs[:, 0, 0, None]) > 0
        yield Figure(METRICS["total_variation"], None, np.where(has_pair, _ratio(variation, total), np.nan))


def _of_states(sums: TemporalSums, at: int, lag: int, density: Array) -> Iterator[Figure]:
    """What follows from the joint states of pairs."""
    shape = sums.n_units + 1, sums.d_sae
    stays, nmi = np.empty(shape), np.empty((len(KINDS), *shape))

    def fill(features: slice) -> None:
        for kind in range(len(KINDS)):
            by_unit = sums.joint(kind, at, features)
            total = by_unit.sum(axis=2, keepdims=True)
            joint = np.concatenate([total, total - by_unit], axis=2)
            nmi[kind, :, features] = normalised_information(joint)
            if kind == 0:
                stays[:, features] = _ratio(joint[1:, 1:].sum(axis=(0, 1)), joint[1:].sum(axis=(0, 1)))

    width = max(1, CACHED_ELEMENTS // shape[0])
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(fill, (slice(start, start + width) for start in range(0, sums.d_sae, width))):
            pass  # an error in a thread is raised here
    yield Figure(METRICS["persistence"], lag, stays - density)
    for name, values in zip(("information", "permuted_information", "matched_information"), nmi, strict=True):
        yield Figure(METRICS[name], lag, values)
    yield Figure(METRICS["excess_information"], lag, nmi[0] - nmi[1] - nmi[2])


def _ratio(above: Array, below: Array) -> Array:
    """Quotient of sums, NaN where there is nothing below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def feature_table(sums: TemporalSums, block_size: int, columns: dict[str, Array]) -> pa.Table:
    """One row a feature; what is undefined is null.

    Parameters
    ----------
    sums
        of one SAE
    block_size
        features of block H
    columns
        figures on all units, by name
    """
    firings, total = (sums.once(name).sum(axis=0) for name in ("firings", "total"))
    n = int(sums.n.sum())
    blocks = [("H" if feature < block_size else "L") if block_size else None for feature in range(sums.d_sae)]
    found = {
        "density": firings / n if n else np.full(sums.d_sae, np.nan),
        "mean_active": _ratio(total, firings),
        **columns,
    }
    return pa.table(
        {
            "feature": pa.array(np.arange(sums.d_sae)),
            "block": pa.array(blocks, pa.string()),
            "firings": pa.array(firings.astype(np.int64)),
            **{name: pa.array(values, pa.float64(), from_pandas=True) for name, values in found.items()},
        }
    )
