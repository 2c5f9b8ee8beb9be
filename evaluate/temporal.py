"""The temporal suite's figures: how long features stay on, averaged over the features of a part of the dictionary.

Each metric of `tcsae.evaluate.temporal_features` is averaged over the live features of the whole dictionary, of the
contrastive block H, of the rest L, and of the best block: as many features as H has, those with the best values of
that metric at that lag. Unweighted, and weighted by energy (sum of f^2). Live features fire on at least `MIN_FIRINGS`
counted tokens of the sample; which features are live and best is that of the sample in every resample. The best block
is chosen on the documents that it is measured on, so its figures flatter it: as the baseline's, to hold H against,
they are conservative.

An absolute autocorrelation proves little (a plain SAE has about 0.4 at lag 1): what counts is the difference
from a control at equal L0, see `compare_with_control`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from tcsae.evaluate.estimates import Draws, Estimate, Metric, SuiteResult, estimates_of
from tcsae.evaluate.intervals import Array, interval, resample_counts
from tcsae.evaluate.jackknife import linear_bootstrap
from tcsae.evaluate.temporal_codes import KINDS, SKIPPED_POSITIONS
from tcsae.evaluate.temporal_features import Figure, energy, feature_table, samples
from tcsae.evaluate.temporal_sums import PARTS, TemporalSums
from tcsae.train.sae.inference import SAE

Part = Literal["whole", "H", "L", "best"]
Weighting = Literal["", "energy_weighted_"]
WEIGHTINGS: tuple[Weighting, ...] = ("", "energy_weighted_")

PRIMARY_METRIC = "excess_information"
"""At lag 8 on the whole dictionary the pre-registered primary endpoint."""

MIN_FIRINGS = 10
"""Counted tokens on which a feature must fire to be live: fewer say nothing about its correlation."""

N_DECILES = 10


def metric_name(
    part: Part, lag: int | None, metric: str = "autocorrelation", weighting: Weighting = ""
) -> str:
    """Name of a figure.

    >>> metric_name("H", 8), metric_name("best", None, "run_length", "energy_weighted_")
    ('autocorrelation_H_lag8', 'energy_weighted_run_length_best')
    """
    name = f"{weighting}{metric}_{part}"
    return name if lag is None else f"{name}_lag{lag}"


def parts_of(sae: SAE) -> dict[Part, slice]:
    """The parts of the dictionary; H and L only where there is a block."""
    return _spans(sae.d_sae, sae.block_size)


def _spans(d_sae: int, block_size: int) -> dict[Part, slice]:
    whole: dict[Part, slice] = {"whole": slice(0, d_sae)}
    return {**whole, "H": slice(0, block_size), "L": slice(block_size, d_sae)} if block_size else whole


def temporal_figures(
    sums: TemporalSums,
    found: Iterable[Figure],
    *,
    block_size: int,
    n_documents: int,
    n_bootstrap: int,
    seed: int,
    print_: str,
) -> tuple[SuiteResult, pa.Table]:
    """Averages with intervals over documents, and the table of features.

    Parameters
    ----------
    sums
        of one SAE, without empty units
    found
        its figures, of `figures` or some of them
    block_size
        features of block H, 0: none
    n_documents
        that the sums rest on
    n_bootstrap, seed
        resamples of the documents; the same for two SAEs makes them comparable in pairs
    print_
        fingerprint that the result carries
    """
    firings = sums.once("firings").sum(axis=0)
    is_live = firings >= MIN_FIRINGS
    spans = _spans(sums.d_sae, block_size)
    members = {part: np.flatnonzero(is_live[span]) + span.start for part, span in spans.items()}
    deciles = {
        part: np.array_split(of[np.argsort(firings[of], kind="stable")], N_DECILES)
        for part, of in members.items()
    }
    every_tenth = [tenth for tenths in deciles.values() for tenth in tenths]
    weights = energy(sums)
    metrics: list[Metric] = []
    columns: list[Array] = []
    table: dict[str, Array] = {}
    by_decile: dict[str, list[float | None]] = {}
    for figure in found:
        table[figure.column] = figure.values[0]
        chosen = (
            members if not block_size else members | {"best": _best(figure, members["whole"], block_size)}
        )
        for weighting in WEIGHTINGS:
            means = _means(figure.values, weights if weighting else None, list(chosen.values()))
            for part, mean in zip(chosen, means, strict=True):
                name = metric_name(part, figure.lag, figure.metric.name, weighting)
                metrics.append(
                    Metric(name, figure.metric.unit, _reason(figure, members.get(part, members["whole"])))
                )
                columns.append(mean)
        of_deciles = iter(_means(figure.values[:1], None, every_tenth)[:, 0].tolist())
        for part in deciles:
            name = metric_name(part, figure.lag, figure.metric.name)
            ten = itertools.islice(of_deciles, N_DECILES)
            by_decile[name] = [mean if math.isfinite(mean) else None for mean in ten]
    for part, span in enumerate(PARTS[: len(spans)] if sums.published.any() else ()):
        above, below = (samples(sums.published[:, part, which]) for which in (0, 1))
        metrics.append(Metric(f"tsae_smoothness_{span}", "1", "no feature of this part is on in any context"))
        with np.errstate(divide="ignore", invalid="ignore"):
            columns.append(np.where(below > 0, above / below, np.nan))
    stacked = np.stack(columns, axis=1)
    counts = resample_counts(sums.n_units, n_bootstrap, seed)
    boot = linear_bootstrap(stacked[0], stacked[1:], counts)
    estimates, draws = estimates_of(metrics, boot, n_documents)
    n = int(sums.n.sum())
    facts: dict[str, Any] = {
        "lags": list(sums.lags),
        "skipped_positions": SKIPPED_POSITIONS,
        "min_firings": MIN_FIRINGS,
        "n_tokens": n,
        "n_pairs": {
            kind: dict(zip(map(str, sums.lags), pairs.tolist(), strict=True))
            for kind, pairs in zip(KINDS, sums.n_pairs.sum(axis=0), strict=True)
        },
        "n_resampled_units": sums.n_units,
        "l0": float(firings.sum() / n) if n else None,
        "n_live": {part: len(of) for part, of in members.items()},
        "n_features": {part: span.stop - span.start for part, span in spans.items()},
        "density_by_decile": {
            part: [float(firings[tenth].mean() / n) if len(tenth) else None for tenth in tenths]
            for part, tenths in deciles.items()
        },
        "by_decile": by_decile,
    }
    return SuiteResult(print_, estimates, draws, facts), feature_table(sums, block_size, table)


def _best(figure: Figure, live: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` live features with the best values, fewer if fewer are defined."""
    values = figure.values[0, live]
    order = np.argsort(-values if figure.metric.is_better_high else values, kind="stable")  # NaN comes last
    return live[order[: min(size, int(np.isfinite(values).sum()))]]


def _means(
    values: Float[np.ndarray, "sample feature"], weights: Array | None, groups: Sequence[np.ndarray]
) -> Float[np.ndarray, "group sample"]:
    """Mean over those features of each group for which the figure is defined, NaN where there are none."""
    is_member = np.zeros((values.shape[1], len(groups)))
    for group, features in enumerate(groups):
        is_member[features, group] = 1.0
    defined = np.isfinite(values)
    weight = defined * (1.0 if weights is None else weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((np.where(defined, values, 0.0) * weight @ is_member / (weight @ is_member)).T)


def _reason(figure: Figure, live: np.ndarray) -> str:
    if not len(live):
        return f"no feature of this part fires on {MIN_FIRINGS} counted tokens"
    return figure.metric.undefined


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
    lowest = np.min([control.value, control.draws.min(), control.leave_one_out.min()])
    if not lowest > 0:
        what = "is undefined" if np.isnan(lowest) else "reaches zero"
        reason = f"undefined, because the control {what} in a resample"
        return Estimate.count(names[0], "1", None, n_documents, reason), difference
    times = interval(
        treated.value / control.value,
        treated.draws / control.draws,
        treated.leave_one_out / control.leave_one_out,
    )
    return Estimate.of(names[0], "1", times, n_documents), difference
