"""Which feature of an SAE stands for which true feature, from the two dictionaries alone.

C is the cosine of a true direction with a decoder row; only live features (`MIN_FIRINGS`) take part, since the row of
one that never fires stands for nothing. Two matchings are used, and each figure says which:

best cosine
    each true feature with the live feature of largest C, and each live feature with its true feature of largest C;
    several may share one
one to one
    the assignment with the largest sum of C (Hungarian method); pairs above `MATCHED` are called matched

Figures of true features are resampled over true features, figures of an SAE's features over these; neither over
documents, on which they do not depend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from scipy.optimize import linear_sum_assignment

from tcsae.evaluate.estimates import Draws, Estimate, Metric, estimates_of
from tcsae.evaluate.intervals import MAX_UNITS, Array, Statistic, bootstrap, resample_counts
from tcsae.store.spec import KINDS
from tcsae.store.truth import Truth

RECOVERED = 0.9
"""Cosine above which a true feature counts as found."""

MATCHED = 0.7
"""Cosine above which a pair's activations are compared (METHOD.md, section 5)."""

MIN_FIRINGS = 10
"""Tokens on which a feature must fire to be live."""

NONE_LIVE = "no feature of the SAE fires often enough"


@dataclass(frozen=True, slots=True, eq=False)
class Matching:
    """An SAE's features beside the true ones."""

    cosine: Float[np.ndarray, "true feature"]
    """C; -1 for features that are not live"""
    live: Bool[np.ndarray, " feature"]
    """features that take part"""
    block_size: int
    """the first features, which are block H; 0: there is no block"""
    true_of_pair: Int64[np.ndarray, " pair"]
    """true feature of each one-to-one pair with a cosine above `MATCHED`"""
    feature_of_pair: Int64[np.ndarray, " pair"]
    """the SAE's feature of that pair"""

    @property
    def best_feature(self) -> Int64[np.ndarray, " true"]:
        """live feature of largest cosine, of each true feature"""
        found: Int64[np.ndarray, " true"] = self.cosine.argmax(axis=1)
        return found

    @property
    def best_true(self) -> Int64[np.ndarray, " feature"]:
        """true feature of largest cosine, of each of the SAE's"""
        found: Int64[np.ndarray, " feature"] = self.cosine.argmax(axis=0)
        return found


def match(
    directions: Float[np.ndarray, "true d_model"],
    W_dec: Float[np.ndarray, "feature d_model"],
    firings: Int64[np.ndarray, " feature"],
    block_size: int,
) -> Matching:
    """Match a decoder's rows with the true directions.

    >>> axes = np.eye(3)
    >>> found = match(axes, np.array([[0.0, 2.0, 0.0], [1.0, 0.1, 0.0]]), np.array([99, 99]), 0)
    >>> found.best_feature[:2].tolist(), list(zip(found.true_of_pair.tolist(), found.feature_of_pair.tolist()))
    ([1, 0], [(0, 1), (1, 0)])
    """
    norms = np.linalg.norm(W_dec.astype(np.float64), axis=1)
    live = (firings >= MIN_FIRINGS) & (norms > 0)
    cosine = np.full((len(directions), len(W_dec)), -1.0)
    alive = np.flatnonzero(live)
    cosine[:, alive] = directions.astype(np.float64) @ (W_dec[alive] / norms[alive, None]).T
    true, at = linear_sum_assignment(cosine[:, alive], maximize=True)
    good = cosine[true, alive[at]] > MATCHED
    return Matching(cosine, live, block_size, true[good], alive[at[good]])


Found = tuple[dict[str, Estimate], dict[str, Draws]]


def recovery(matching: Matching, truth: Truth, *, n_bootstrap: int, seed: int, n_documents: int) -> Found:
    """Figures of the true features, by best cosine; intervals over true features.

    mean_max_cosine, recovered
        mean of the largest C, and share with a C above `RECOVERED`: all, and of each kind
    slow_in_H, medium_in_H, fast_in_H
        of the recovered features of the kind, the share whose best match is in block H; chance is ``share_of_H``
    slow_minus_fast_in_H
        difference of two of them; chance is 0
    """
    best = matching.cosine.max(axis=1)
    found = best > RECOVERED
    in_h = found & (matching.best_feature < matching.block_size)
    groups = {"": np.ones(len(best), dtype=bool), **{f"_{kind}": truth.of_kind(kind) for kind in KINDS}}
    sums, metrics = [], []
    for suffix, of in groups.items():
        sums += [of, of * best, of & found, of & in_h]
        empty = f"there is no{suffix.replace('_', ' ')} feature"
        metrics += [Metric(f"mean_max_cosine{suffix}", "1", empty), Metric(f"recovered{suffix}", "1", empty)]
    if matching.block_size:
        for kind in (*KINDS, "slow_minus_fast"):
            metrics.append(Metric(f"{kind}_in_H", "1", "no feature of the kind is recovered"))

    def statistic(sums: Array) -> Array:
        columns: list[Array] = []
        shares: dict[str, Array] = {}
        for at, suffix in enumerate(groups):
            n, cosine, n_found, n_in_h = (sums[..., 4 * at + part] for part in range(4))
            columns += [cosine / n, n_found / n]
            shares[suffix] = n_in_h / n_found
        if matching.block_size:
            columns += [shares[f"_{kind}"] for kind in KINDS]
            columns.append(shares["_slow"] - shares["_fast"])
        return np.stack(columns, axis=-1)

    return _resampled(
        np.stack(sums, axis=1), statistic, metrics, "true feature", n_bootstrap, seed, n_documents
    )


def purity(
    matching: Matching,
    truth: Truth,
    energy: Float[np.ndarray, " feature"],
    *,
    n_bootstrap: int,
    seed: int,
    n_documents: int,
) -> Found:
    """Figures of the SAE's live features, by best cosine; intervals over the SAE's features.

    For each part (whole, H and L):

    matched
        share with a cosine above `MATCHED` to some true feature; the next ones are over these
    purity
        share that stands for a slow feature; chance is ``purity_whole``
    true_run_length, energy_weighted_true_run_length
        mean of the true features' mean run length in tokens, plain and by energy (sum of f^2)

    and ``mean_max_cosine_of_features``, the mean of the largest cosine of the live features.
    """
    at = matching.best_true
    best = matching.cosine.max(axis=0)
    places = np.arange(len(best))
    parts = {"whole": matching.live}
    if matching.block_size:
        parts |= {
            "H": matching.live & (places < matching.block_size),
            "L": matching.live & (places >= matching.block_size),
        }
    is_matched = best > MATCHED
    run_length, slow = truth.run_length[at], truth.of_kind("slow")[at]
    sums, metrics = [matching.live * best], []
    for part, members in parts.items():
        good = members & is_matched
        heavy = good * energy
        sums += [members, good, good & slow, good * run_length, heavy, heavy * run_length]
        metrics += [
            Metric(f"matched_{part}", "1", NONE_LIVE),
            *(
                Metric(f"{name}_{part}", unit, "no live feature of this part is matched")
                for name, unit in (
                    ("purity", "1"),
                    ("true_run_length", "tokens"),
                    ("energy_weighted_true_run_length", "tokens"),
                )
            ),
        ]
    metrics.append(Metric("mean_max_cosine_of_features", "1", NONE_LIVE))

    def statistic(sums: Array) -> Array:
        columns: list[Array] = []
        for number in range(len(parts)):
            n, n_good, n_slow, length, weight, weighted = (
                sums[..., 1 + 6 * number + part] for part in range(6)
            )
            columns += [n_good / n, n_slow / n_good, length / n_good, weighted / weight]
        columns.append(sums[..., 0] / sums[..., 1])
        return np.stack(columns, axis=-1)

    return _resampled(
        np.stack(sums, axis=1), statistic, metrics, "SAE feature", n_bootstrap, seed, n_documents
    )


def _resampled(
    sums: Array,
    statistic: Statistic,
    metrics: Sequence[Metric],
    unit: str,
    n_bootstrap: int,
    seed: int,
    n_documents: int,
) -> Found:
    """Estimates whose ``method`` names the ``unit`` that was resampled; more than `MAX_UNITS` are dealt out."""
    grouped = np.zeros((min(len(sums), MAX_UNITS), sums.shape[1]))
    np.add.at(grouped, np.arange(len(sums)) % len(grouped), sums.astype(np.float64))
    counts = resample_counts(len(grouped), n_bootstrap, seed)
    estimates, draws = estimates_of(metrics, bootstrap(grouped, statistic, counts), n_documents, unit)
    named: dict[str, Any] = {
        name: one if one.method is None else replace(one, method=f"{one.method} over {unit}s")
        for name, one in estimates.items()
    }
    return named, draws
