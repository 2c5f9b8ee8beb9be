"""Features of two SAEs that are the same feature: matched one to one by their decoder rows.

Features are not exchangeable between SAEs, so nothing about single features may be compared by their numbers. Rows of
the two decoders are assigned one to one so that the sum of cosines is largest (Kuhn 1955; `scipy.optimize`); a match is
an assigned pair with a cosine above `LEAST_COSINE`. Only features that fire in both SAEs take part: two SAEs of one
seed begin with the same rows, and a row that never learned would match itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tcsae.evaluate.compare.arms import Arm, Pair
from tcsae.evaluate.compare.bootstrap import Resampled, ends, seed_counts
from tcsae.evaluate.compare.contrast import Figure, described
from tcsae.evaluate.compare.folders import Evaluated
from tcsae.evaluate.saved_tables import read_table
from tcsae.evaluate.subjects import digest_of
from tcsae.store.errors import TcsaeError
from tcsae.train.saelens import load_sae

LEAST_COSINE = 0.7
"""Of two decoder rows that count as one feature."""

MOST_FEATURES = 8192
"""Of an SAE that is matched: the assignment takes time with the cube of it."""

DENSITY = "density"
"""Column of the tables of features that says how often each fires."""

COMPARED_COLUMNS = ("excess_information_lag8", "autocorrelation_lag8", "within_autocorrelation_lag8", DENSITY)
"""Columns of the tables of features whose change is reported."""

CAUTION = (
    "Only matched features; what an SAE has lost or found anew is not among them, so the changes say nothing of the "
    "whole dictionary. Features of one SAE are not independent: the interval over features is too narrow where they "
    "change together."
)


class MatchedRows(NamedTuple):
    """One to one pairs of decoder rows."""

    treated: Int64[np.ndarray, " match"]
    """feature of the first"""
    control: Int64[np.ndarray, " match"]
    """feature of the second"""
    cosine: Float[np.ndarray, " match"]
    """of their decoder rows"""


@dataclass(frozen=True, slots=True)
class FeatureChange:
    """One column of the feature tables over the matched features of a pair of arms."""

    column: str
    """of the tables"""
    part: str
    """whole, H or L: where the feature is in the control"""
    change: Figure
    """mean of treated minus control over matched features, then over seeds"""
    n_features: int
    """matched, in all seeds together"""


@dataclass(frozen=True, slots=True)
class MatchedFeatures:
    """The matched features of two arms."""

    treated: str
    """arm"""
    control: str
    """arm"""
    rates: dict[int | None, float]
    """share of the features alive in both that have a match, by seed"""
    moved: dict[str, int]
    """matched features by where they are in control and treated, such as ``"L to H"``, all seeds together"""
    changes: tuple[FeatureChange, ...]
    """of each column that both tables have"""
    reason: str | None
    """why there is nothing, None if there is"""


def match_rows(
    treated: Float[Tensor, "feature d_model"],
    control: Float[Tensor, "other d_model"],
    least: float = LEAST_COSINE,
) -> MatchedRows:
    """The one to one assignment with the largest sum of cosines, without the pairs of at most ``least``.

    >>> eye = torch.eye(3)
    >>> match_rows(eye[[2, 0]], eye).control.tolist()
    [2, 0]
    """
    a, b = (torch.nn.functional.normalize(rows, dim=1) for rows in (treated, control))
    cosine = (a @ b.T).double().numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    kept = cosine[rows, columns] > least
    return MatchedRows(rows[kept], columns[kept], cosine[rows, columns][kept])


def matched_features(pair: Pair, n_resamples: int) -> MatchedFeatures:
    """Matched features of the arms of ``pair`` that are nearest in k, over the seeds whose SAEs are still there."""
    treated, control = _same_k(pair)
    rates: dict[int | None, float] = {}
    moved: dict[str, int] = {}
    values: dict[tuple[str, str], list[np.ndarray]] = {}
    gone: list[str] = []
    for seed in [seed for seed in treated.saes if seed in control.saes]:
        both = treated.saes[seed], control.saes[seed]
        try:
            rows, alive = _matched(*both)
        except _Missing as missing:
            gone.append(str(missing))
            continue
        rates[seed] = len(rows.treated) / alive if alive else 0.0
        parts = [
            np.where(index < one.block_size, "H", "L") for one, index in zip(both, rows[:2], strict=True)
        ]
        for was, now in zip(parts[1].tolist(), parts[0].tolist(), strict=True):
            moved[f"{was} to {now}"] = moved.get(f"{was} to {now}", 0) + 1
        for (column, part), change in _changes(both, rows, parts[1]).items():
            values.setdefault((column, part), []).append(change)
    if not rates:
        reason = "; ".join(dict.fromkeys(gone)) or "no shared seed"
        return MatchedFeatures(treated.name, control.name, {}, {}, (), f"undefined, because {reason}")
    changes = tuple(
        FeatureChange(column, part, _over_features(found, n_resamples), sum(map(len, found)))
        for (column, part), found in values.items()
    )
    left_out = "; ".join(dict.fromkeys(gone)) or None
    if not changes and left_out is None:
        left_out = "no changes, because the evaluation has no table of features with a common column"
    return MatchedFeatures(treated.name, control.name, rates, dict(sorted(moved.items())), changes, left_out)


class _Missing(Exception):
    """Why two SAEs cannot be matched."""


def _same_k(pair: Pair) -> tuple[Arm, Arm]:
    """The arms of a pair with the nearest k, of several the one in the middle."""
    found = [
        (abs(np.log((a.k or 1) / (b.k or 1))), abs(i - (len(pair.treated.arms) - 1) / 2), i, j)
        for i, a in enumerate(pair.treated.arms)
        for j, b in enumerate(pair.control.arms)
    ]
    _, _, i, j = min(found)
    return pair.treated.arms[i], pair.control.arms[j]


def _matched(treated: Evaluated, control: Evaluated) -> tuple[MatchedRows, int]:
    """Matched features as numbers in their own SAEs, and how many could have been matched."""
    decoders, alive = [], []
    for one in (treated, control):
        if one.folder is None:
            raise _Missing(f"the SAE of {one.sae} is no longer at {one.origin['folder']}")
        if one.origin["d_sae"] > MOST_FEATURES:
            raise _Missing(
                f"{one.sae} has {one.origin['d_sae']} features, more than the {MOST_FEATURES} matched"
            )
        try:
            sae = load_sae(one.folder)
        except TcsaeError as error:
            raise _Missing(str(error)) from error
        if digest_of(sae) != one.origin["digest"]:
            raise _Missing(f"{one.folder} holds other weights than when {one.sae} was evaluated")
        decoders.append(sae.W_dec.detach().float())
        density = _column(one, DENSITY)
        alive.append(np.arange(len(decoders[-1])) if density is None else np.flatnonzero(density > 0))
    a, b = (rows[torch.from_numpy(index)] for rows, index in zip(decoders, alive, strict=True))
    found = match_rows(a, b)
    own = MatchedRows(alive[0][found.treated], alive[1][found.control], found.cosine)
    return own, min(map(len, alive))


def _column(one: Evaluated, name: str) -> np.ndarray | None:
    """A column of the SAE's table of features, NaN where undefined; None where there is none."""
    table = None if one.features is None else read_table(one.features, [name])
    if table is None or name not in table.column_names:
        return None
    return np.asarray(table[name].to_numpy(), dtype=np.float64)


def _changes(
    both: tuple[Evaluated, Evaluated], rows: MatchedRows, part: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    """Treated minus control of each matched feature with both values, by column and part."""
    found = {}
    for column in COMPARED_COLUMNS:
        treated, control = (_column(one, column) for one in both)
        if treated is None or control is None:
            continue
        change = treated[rows.treated] - control[rows.control]
        masks = {"whole": np.full(len(change), True), "H": part == "H", "L": part == "L"}
        for name, mask in masks.items():
            defined = change[mask & np.isfinite(change)]
            if len(defined) > 1 and (name == "whole" or both[1].block_size):
                found[column, name] = defined
    return found


def _over_features(found: Sequence[np.ndarray], n_resamples: int) -> Figure:
    """Mean change with its interval: seeds drawn with replacement, then features within each seed."""
    n_seeds = len(found)
    generator = np.random.default_rng(n_seeds)
    means = np.array([one.mean() for one in found])
    errors = np.array([one.std(ddof=1) / np.sqrt(len(one)) for one in found])
    draws = np.stack(
        [
            np.array([generator.choice(one, len(one)).mean() for _ in range(n_resamples // 10)])[
                np.arange(n_resamples) % (n_resamples // 10)
            ]
            for one in found
        ]
    )
    if n_seeds == 1:
        influence = (found[0] - means[0]) / len(found[0])
        variance, df = float(errors[0] ** 2), len(found[0]) - 1.0
        mixed = draws[0]
    else:
        influence = (means - means.mean()) / n_seeds
        # the seeds' means contain what their features vary by
        variance, df = float(means.var(ddof=1)) / n_seeds, n_seeds - 1.0
        mixed = np.einsum("rs,sr->r", seed_counts(n_seeds, n_resamples), draws) / n_seeds
    squares = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    resampled = Resampled(float(means.mean()), mixed, acceleration, variance, df, n_seeds)
    return described(resampled, ends(resampled))
