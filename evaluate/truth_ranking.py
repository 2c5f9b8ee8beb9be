"""Whether a temporal metric ranks SAEs, and an SAE's features, as the truth does.

*SAEs.* The truth's figure of a part of an SAE (whole, H, L) is the mean true run length of what its features stand for
(`truth_matching.purity`), energy-weighted for energy-weighted metrics. A metric that measures how long features last
puts the SAEs in the same order: Spearman's rho and Kendall's tau over SAEs. Its interval resamples documents, the
same for all SAEs, with the SAEs and the truth's figure held fixed: it says how sure the order is on these SAEs, not on
others.

*Features.* Over the matched pairs of one SAE: Spearman's rho of the metric on the SAE's feature with the mean run
length of its true feature; the interval is Bonett and Wright's (2000), z +- 1.96 sqrt((1 + rho^2 / 2) / (n - 3)).

*Oracle.* The same metrics of the true codes themselves: their means over slow, medium and fast features (a metric that
works falls from one to the next), and their rho over true features, the most that any SAE's features could reach.

Metrics that fall with persistence are taken with the opposite sign, so 1 is perfect agreement for every metric.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int64

from tcsae.evaluate.estimates import SuiteResult
from tcsae.evaluate.intervals import Array, percentile_ends
from tcsae.evaluate.truth_matching import MIN_FIRINGS
from tcsae.evaluate.truth_oracle import means_by_kind
from tcsae.harvest.synthetic import SyntheticSource
from tcsae.store.atomic import write_atomically
from tcsae.store.truth import Truth

FILE = Path("truth") / "ranking.json"
"""in the evaluation folder"""

FALLING = ("smoothness", "tsae_smoothness", "total_variation")
"""metrics that are smaller for what lasts longer"""

LEAST_SAES = 3
"""ranks of two agree or do not, whatever is measured"""

LEAST_PAIRS = 10
"""matched features below which no correlation over features is given"""

NAME = re.compile(
    r"(?P<weighting>energy_weighted_)?(?P<metric>\w+?)_(?P<part>whole|H|L)(?:_lag(?P<lag>\d+))?"
)
"""of a temporal figure, such as ``energy_weighted_autocorrelation_H_lag8``"""

COLUMN = re.compile(r"(?P<metric>\w+?)(?:_lag(?P<lag>\d+))?")
"""of a temporal metric in the table of features"""

NOT_TEMPORAL = ("feature", "block", "firings", "density", "mean_active")
"""columns of that table that measure something else"""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one temporal figure orders things as the truth does; 1: alike, -1: the other way round."""

    metric: str
    """the figure, as in the summary or in the table of features"""
    n: int
    """SAEs, or matched features, that have it"""
    spearman: float | None
    """of ranks; None where undefined"""
    kendall: float | None
    """likewise; only over SAEs"""
    low: float | None
    """lower end of Spearman's 95 % interval, as the module says"""
    high: float | None
    """upper end"""
    reason: str | None
    """why something is missing, None if nothing is"""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Every temporal figure against the truth."""

    saes: dict[str, dict[str, float | None]]
    """the truth's figures, by SAE"""
    over_saes: tuple[Agreement, ...]
    """one a temporal figure"""
    over_features: dict[str, tuple[Agreement, ...]]
    """one a column of the table of features, by SAE"""
    oracle: dict[str, dict[str, float | None]]
    """mean of each metric over all, slow, medium and fast true features' own codes"""
    over_true_features: tuple[Agreement, ...]
    """one a metric, over the true features' own codes"""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the content of ``truth/ranking.json``."""
        return {
            "truth": "mean run length in tokens of the true features that an SAE's features stand for",
            "saes": self.saes,
            "over_saes": [asdict(one) for one in self.over_saes],
            "over_features": {
                sae: [asdict(one) for one in found] for sae, found in self.over_features.items()
            },
            "oracle": self.oracle,
            "over_true_features": [asdict(one) for one in self.over_true_features],
        }


def rank(
    temporal: Mapping[str, SuiteResult],
    truth_suite: Mapping[str, SuiteResult],
    source: SyntheticSource,
    out: Path,
    oracle: pa.Table,
) -> Ranking:
    """Rank agreement of every temporal figure of the SAEs, from finished results.

    Parameters
    ----------
    temporal, truth_suite
        results of the two suites, by SAE; of the same SAEs
    source
        what the store was made from
    out
        evaluation folder, for the tables of features
    oracle
        the true features' own table, as `truth_oracle.oracle_table` gives it
    """
    truth = source.truth
    figures = [
        name for found in truth_suite.values() for name in found.estimates if "true_run_length" in name
    ]
    true = {
        sae: {
            name: found.estimates[name].value if name in found.estimates else None
            for name in dict.fromkeys(figures)
        }
        for sae, found in truth_suite.items()
    }
    names = [name for found in temporal.values() for name in found.estimates]
    over_saes = []
    for name in dict.fromkeys(names):
        parsed = NAME.fullmatch(name)
        if parsed is not None:
            figure = f"{parsed['weighting'] or ''}true_run_length_{parsed['part']}"
            over_saes.append(_over_saes(name, _sign(parsed["metric"]), figure, temporal, true))
    over_features = {
        sae: _over_features(found, truth, out / "features" / f"{sae}.parquet")
        for sae, found in truth_suite.items()
    }
    live = np.flatnonzero(oracle["firings"].to_numpy() >= MIN_FIRINGS)
    return Ranking(
        true,
        tuple(over_saes),
        over_features,
        means_by_kind(oracle, source, MIN_FIRINGS),
        _correlated(oracle, live, truth.run_length[live]),
    )


def write_ranking(ranking: Ranking, out: Path) -> None:
    """Write ``truth/ranking.json`` into the evaluation folder, whole or not at all."""
    text = json.dumps(ranking.to_dict(), indent=1, allow_nan=False) + "\n"
    write_atomically(out / FILE, text.encode())


def spearman(x: Float[np.ndarray, "*sample n"], y: Float[np.ndarray, " n"]) -> Float[np.ndarray, "*sample"]:
    """Correlation of ranks, ties at their mean rank; NaN where one of the two is constant.

    Figures that differ by less than a billionth of the largest tie: SAEs of the same features in another order
    differ in the rounding of a mean alone.

    >>> spearman(np.array([[1.0, 2.0, 9.0], [3.0, 2.0, 1.0]]), np.array([4.0, 5.0, 6.0])).tolist()
    [1.0, -1.0]
    """
    from scipy.stats import rankdata

    largest = np.abs(x).max(axis=-1, keepdims=True)
    a, b = rankdata(np.round(x / np.where(largest > 0, largest, 1.0), 9), axis=-1), rankdata(y)
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean()
    size = np.sqrt(np.square(a).sum(axis=-1) * np.square(b).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Float[np.ndarray, "*sample"] = np.where(size > 0, (a * b).sum(axis=-1) / size, np.nan)
    return found


def _sign(metric: str) -> int:
    return -1 if metric in FALLING else 1


def _over_saes(
    name: str,
    sign: int,
    figure: str,
    temporal: Mapping[str, SuiteResult],
    true: Mapping[str, Mapping[str, float | None]],
) -> Agreement:
    """Agreement of one temporal figure over the SAEs that have it and the truth's ``figure``."""
    pairs: list[tuple[str, float, float]] = []
    for sae, found in temporal.items():
        estimate, wanted = found.estimates.get(name), true[sae].get(figure)
        if estimate is not None and estimate.value is not None and wanted is not None:
            pairs.append((sae, sign * estimate.value, wanted))
    if len(pairs) < LEAST_SAES:
        return _undefined(name, len(pairs), f"fewer than {LEAST_SAES} SAEs have it and {figure}")
    values, wanted_values = (np.array([pair[at] for pair in pairs]) for at in (1, 2))
    rho = float(spearman(values, wanted_values))
    if not np.isfinite(rho):
        return _undefined(name, len(pairs), "all SAEs have the same figure")
    from scipy.stats import kendalltau

    tau = float(kendalltau(values, wanted_values).statistic)
    kept = [temporal[sae].draws.get(name) for sae, _, _ in pairs]
    draws = [one.draws for one in kept if one is not None]
    if len(draws) < len(pairs) or len({len(one) for one in draws}) > 1:
        return Agreement(
            name, len(pairs), rho, tau, None, None, "no interval, because a figure has no resamples"
        )
    resampled = spearman(sign * np.stack(draws, axis=1), wanted_values)
    resampled = resampled[np.isfinite(resampled)]
    low, high = percentile_ends(resampled) if len(resampled) else (rho, rho)
    return Agreement(name, len(pairs), rho, tau, low, high, None)


def _over_features(found: SuiteResult, truth: Truth, table_path: Path) -> tuple[Agreement, ...]:
    """Agreement of every column of a table of features, none if the temporal suite wrote no table."""
    if not table_path.is_file():
        return ()
    matches = found.facts["matches"]
    run_length = truth.run_length[np.array(matches["true"], dtype=np.int64)]
    features = np.array(matches["feature"], dtype=np.int64)
    return _correlated(pq.read_table(table_path, memory_map=False), features, run_length)


def _correlated(
    table: pa.Table, features: Int64[np.ndarray, " pair"], run_length: Float[np.ndarray, " pair"]
) -> tuple[Agreement, ...]:
    """Agreement of every metric of ``table``, in the rows ``features``, with the true run lengths."""
    agreements = []
    for column in table.column_names:
        parsed = COLUMN.fullmatch(column)
        kind = table.schema.field(column).type
        if column in NOT_TEMPORAL or parsed is None or not pa.types.is_floating(kind):
            continue
        values: Array = table[column].to_numpy().astype(np.float64)[features]
        defined = np.isfinite(values)
        n = int(defined.sum())
        if n < LEAST_PAIRS:
            agreements.append(_undefined(column, n, f"fewer than {LEAST_PAIRS} features have it"))
            continue
        rho = float(spearman(_sign(parsed["metric"]) * values[defined], run_length[defined]))
        if not np.isfinite(rho):
            agreements.append(_undefined(column, n, "all features have the same value"))
            continue
        low, high = bonett_wright(rho, n)
        agreements.append(Agreement(column, n, rho, None, low, high, None))
    return tuple(agreements)


def bonett_wright(rho: float, n: int) -> tuple[float, float]:
    """95 % interval of Spearman's rho over ``n`` pairs.

    >>> tuple(round(end, 3) for end in bonett_wright(0.5, 103))
    (0.329, 0.639)
    """
    centre = np.arctanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))


def _undefined(metric: str, n: int, why: str) -> Agreement:
    return Agreement(metric, n, None, None, None, None, f"undefined, because {why}")


def ranking_lines(agreements: Sequence[Agreement], lag: int) -> list[str]:
    """The figures at ``lag`` and those without a lag as one sentence, the best agreement first."""
    shown = [
        one
        for one in agreements
        if one.spearman is not None and not one.metric.startswith("energy_weighted_")
        and ("_lag" not in one.metric or one.metric.endswith(f"_lag{lag}"))
    ]  # fmt: skip
    if not shown:
        reasons = dict.fromkeys(one.reason for one in agreements if one.reason)
        return [
            f"Ranking of SAEs by the truth: {next(iter(reasons), 'undefined, because no temporal figure is there')}."
        ]
    shown.sort(key=lambda one: -(one.spearman or 0.0))
    parts = [
        f"{one.metric} {one.spearman:.2f}"
        + (f" [{one.low:.2f}, {one.high:.2f}]" if one.low is not None else "")
        for one in shown
    ]
    return [
        f"Rank agreement with the true run length of what SAEs represent (Spearman over SAEs, 1: as the truth ranks "
        f"them; intervals over documents): {'; '.join(parts)}."
    ]
