"""The temporal suite: how long features stay on, from the store alone.

Each lag's autocorrelation is averaged over the live features of the whole dictionary, of the contrastive
block H and of the rest L: unweighted, and weighted by energy (sum of f^2). Live features fire on at least
`MIN_FIRINGS` counted tokens of the sample; the set is that of the sample in every resample.

An absolute autocorrelation proves little (a plain SAE has about 0.4 at lag 1): what counts is the difference
from a control at equal L0, see `compare_pairs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from tcsae.evaluate.autocorrelation import (
    LAGS,
    SKIPPED_POSITIONS,
    Codes,
    LagSums,
    autocorrelation,
    bytes_per_unit,
    lag_sums,
)
from tcsae.evaluate.estimates import Draws, Estimate, Metric, SuiteResult, estimates_of
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.intervals import MAX_UNITS, Array, Bootstrap, interval, resample_counts
from tcsae.train.sae.inference import SAE

Part = Literal["whole", "H", "L"]
Weighting = Literal["", "energy_weighted_"]

MIN_FIRINGS = 10
"""Counted tokens on which a feature must fire to be live: fewer say nothing about its correlation."""

MAX_BYTES = 512 * 2**20
"""Bound on the sums of one SAE; documents beyond it are dealt out into groups (see `HeldOut.units`)."""

FEATURES_AT_ONCE = 128
"""Features resampled together: the working set of 2,000 resamples then is about 30 MB."""


def metric_name(part: Part, lag: int, weighting: Weighting = "") -> str:
    """Name of a figure.

    >>> metric_name("H", 8)
    'autocorrelation_H_lag8'
    """
    return f"{weighting}autocorrelation_{part}_lag{lag}"


def temporal_result(sae: SAE, held_out: HeldOut, *, n_bootstrap: int, seed: int, print_: str) -> SuiteResult:
    """Every figure of the suite for one SAE.

    Parameters
    ----------
    sae
        what is measured
    held_out
        the documents
    n_bootstrap, seed
        resamples of the documents; the same for two SAEs makes them comparable in pairs
    print_
        fingerprint that the result carries
    """
    most = max(2, min(MAX_UNITS, MAX_BYTES // bytes_per_unit(sae.d_sae)))
    units = held_out.units(most)
    n_units = int(units.max()) + 1
    sums = lag_sums(_codes(sae, held_out, most), n_units, sae.d_sae)
    sums, n_with_tokens = _drop_empty(sums)
    counts = resample_counts(n_with_tokens, n_bootstrap, seed)
    parts = parts_of(sae)
    live = sums.firings >= MIN_FIRINGS
    members = {part: np.flatnonzero(live[span]) + span.start for part, span in parts.items()}
    found = aggregate(sums, counts, members)
    estimates: dict[str, Estimate] = {}
    draws: dict[str, Draws] = {}
    n_documents = held_out.n_documents if n_units < held_out.n_documents else n_with_tokens
    for metrics, boot in found:
        more, more_draws = estimates_of(metrics, boot, n_documents)
        estimates |= more
        draws |= more_draws
    facts = {
        "lags": list(LAGS),
        "skipped_positions": SKIPPED_POSITIONS,
        "min_firings": MIN_FIRINGS,
        "n_tokens": int(sums.n.sum()),
        "n_pairs": dict(zip(map(str, LAGS), sums.n_pairs.sum(axis=0).astype(int).tolist(), strict=True)),
        "n_resampled_units": len(sums.n),
        "n_live": {part: int(live[span].sum()) for part, span in parts.items()},
        "n_features": {part: span.stop - span.start for part, span in parts.items()},
    }
    return SuiteResult(print_, estimates, draws, facts)


def parts_of(sae: SAE) -> dict[Part, slice]:
    """The parts of the dictionary; H and L only where there is a block."""
    whole: dict[Part, slice] = {"whole": slice(0, sae.d_sae)}
    if not sae.block_size:
        return whole
    return {**whole, "H": slice(0, sae.block_size), "L": slice(sae.block_size, sae.d_sae)}


def _codes(sae: SAE, held_out: HeldOut, most_units: int) -> Iterator[Codes]:
    units = held_out.units(most_units)
    for block in held_out.blocks():
        yield Codes(
            f=sae.encode(block.x.to(sae.device)),
            counted=block.kept & (block.position >= SKIPPED_POSITIONS),
            context=block.context,
            unit=units[block.document],
        )


def _drop_empty(sums: LagSums) -> tuple[LagSums, int]:
    """``sums`` without the units that have no counted token (documents of at most 8 tokens): drawing one of
    them would only make a resample smaller. They are the same for every SAE."""
    kept = sums.n > 0
    return (
        LagSums(
            n=sums.n[kept],
            n_pairs=sums.n_pairs[kept],
            total=sums.total[kept],
            square=sums.square[kept],
            ends=sums.ends[:, kept],
            product=sums.product[:, kept],
            shift=sums.shift,
            firings=sums.firings,
        ),
        int(kept.sum()),
    )


def aggregate(
    sums: LagSums, counts: Array, features: dict[Part, np.ndarray]
) -> list[tuple[list[Metric], Bootstrap]]:
    """Mean autocorrelation of each part, plain and energy-weighted, at each lag, with its resamples."""
    n_units = len(sums.n)
    weights = np.concatenate([np.ones((1, n_units)), counts, 1 - np.eye(n_units)])
    n_lags = len(sums.product)
    results: list[tuple[list[Metric], Bootstrap]] = []
    totals = {part: np.zeros((2, n_lags, len(weights))) for part in features}
    norms = {part: np.zeros((2, n_lags, len(weights))) for part in features}
    for start in range(0, len(sums.shift), FEATURES_AT_ONCE):
        rho, energy = autocorrelation(sums, weights, slice(start, start + FEATURES_AT_ONCE))
        defined = np.isfinite(rho)
        rho = np.where(defined, rho, 0.0)
        energy_at = np.where(defined, energy, 0.0)
        for part, members in features.items():
            inside = members[(members >= start) & (members < start + FEATURES_AT_ONCE)] - start
            totals[part][0] += rho[..., inside].sum(axis=-1)
            norms[part][0] += defined[..., inside].sum(axis=-1)
            totals[part][1] += (rho * energy_at)[..., inside].sum(axis=-1)
            norms[part][1] += energy_at[..., inside].sum(axis=-1)
    for part, members in features.items():
        for which, weighting in enumerate[Weighting](("", "energy_weighted_")):
            reason = (
                f"no feature of this part fires on {MIN_FIRINGS} counted tokens"
                if not len(members)
                else "no pair of tokens lies this far apart in one context"
            )
            metrics = [Metric(metric_name(part, lag, weighting), "1", reason) for lag in LAGS[:n_lags]]
            with np.errstate(divide="ignore", invalid="ignore"):
                mean = (totals[part][which] / norms[part][which]).T
            n_draws = len(counts)
            results.append((metrics, Bootstrap(mean[0], mean[1 : 1 + n_draws], mean[1 + n_draws :])))
    return results


def compare_with_control(
    metric: str, treated: Draws | None, control: Draws | None, n_documents: int
) -> tuple[Estimate, Estimate]:
    """Ratio and difference treated / control of one metric, resampled in pairs.

    The ratio is undefined where the control reaches zero, in the sample, a resample or without one document:
    it has no bound there.
    """
    names = f"{metric}_ratio", f"{metric}_difference"
    missing = "undefined, because the metric is undefined for one of the two"
    if treated is None or control is None or treated.draws.shape != control.draws.shape:
        ratio, difference = (Estimate.count(name, "1", None, n_documents, missing) for name in names)
        return ratio, difference
    apart = interval(
        treated.value - control.value,
        treated.draws - control.draws,
        treated.leave_one_out - control.leave_one_out,
    )
    difference = Estimate.of(names[1], "1", apart, n_documents)
    if min(control.value, control.draws.min(), control.leave_one_out.min()) <= 0:
        reason = "undefined, because the control reaches zero in a resample"
        return Estimate.count(names[0], "1", None, n_documents, reason), difference
    times = interval(
        treated.value / control.value,
        treated.draws / control.draws,
        treated.leave_one_out / control.leave_one_out,
    )
    return Estimate.of(names[0], "1", times, n_documents), difference
