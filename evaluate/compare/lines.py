"""The comparison as lines of plain values, one a figure: for compare.json and Parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tcsae.evaluate.compare.arms import Arm, Family
from tcsae.evaluate.compare.contrast import Contrast, Figure
from tcsae.evaluate.compare.features import MatchedFeatures
from tcsae.evaluate.compare.front import Point
from tcsae.store.atomic import write_atomically


def arm_lines(
    families: Sequence[Family], figures: Mapping[str, Mapping[str, Figure]]
) -> list[dict[str, Any]]:
    """Every figure of every arm, one line each."""
    return [
        {
            "arm": arm.name,
            "family": family.name,
            "alpha": arm.alpha,
            "k": arm.k,
            "metric": metric,
            "unit": unit_of(arm, metric),
            **_plain(figure),
            "seeds": [seed for seed in arm.saes if seed is not None],
            "n_documents": max(
                (one.estimates[metric].n_documents for one in arm.saes.values() if metric in one.estimates),
                default=0,
            ),
            "n_tokens": arm.one.tokens.get(metric),
            "training_tokens": arm.training_tokens,
        }
        for family in families
        for arm in family.arms
        for metric, figure in figures[arm.name].items()
    ]


def unit_of(arm: Arm, metric: str) -> str:
    """Unit of a metric of an arm."""
    return next((one.estimates[metric].unit for one in arm.saes.values() if metric in one.estimates), "")


def _plain(figure: Figure, prefix: str = "") -> dict[str, Any]:
    names = ("value", "low", "high", "method", "n_seeds", "note", "reason")
    return {f"{prefix}{name}": getattr(figure, name) for name in names}


def contrast_lines(contrasts: Sequence[Contrast]) -> list[dict[str, Any]]:
    """Every comparison, one line each."""
    return [
        {
            "kind": one.kind,
            "treated": one.treated,
            "control": one.control,
            "why_this_control": one.why,
            "metric": one.metric,
            "control_metric": one.control_metric,
            "unit": one.unit,
            **_plain(one.difference, "difference_"),
            **_plain(one.treated_figure, "treated_"),
            **_plain(one.control_figure, "control_"),
            "p": one.p,
            "p_holm": one.p_holm,
            "margin": one.margin,
            "bound": one.bound,
            "holds": one.holds,
            "matching": one.matching,
            "is_equal_l0": one.is_equal_l0,
            "treated_l0": one.l0[0],
            "control_l0": one.l0[1],
            "treated_l0_block": one.l0_block[0],
            "control_l0_block": one.l0_block[1],
            "seeds": [seed for seed in one.seeds if seed is not None],
            "missing_seeds": one.missing_seeds,
            "n_documents": one.n_documents,
            "n_tokens": one.n_tokens,
            "treated_training_tokens": one.training_tokens[0],
            "control_training_tokens": one.training_tokens[1],
            "n_resamples": one.n_resamples,
        }
        for one in contrasts
    ]


def front_lines(points: Sequence[Point], metric: str) -> list[dict[str, Any]]:
    """Every point of the trade-off, one line each."""
    return [
        {
            "arm": one.arm,
            "trace": one.trace,
            "alpha": one.alpha,
            "k": one.k,
            "metric": metric,
            **_plain(one.consistency, "consistency_"),
            **{
                key: value
                for cost, figure in one.costs.items()
                for key, value in _plain(figure, f"{cost}_").items()
            },
            **{f"on_front_against_{cost}": known for cost, known in one.on_front.items()},
        }
        for one in points
    ]


def feature_lines(found: Sequence[MatchedFeatures]) -> list[dict[str, Any]]:
    """Every change over matched features, one line each."""
    return [
        {
            "treated": one.treated,
            "control": one.control,
            "column": change.column,
            "part": change.part,
            **_plain(change.change),
            "n_features": change.n_features,
            "match_rates": list(one.rates.values()),
        }
        for one in found
        for change in one.changes
    ]


def write_table(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """``lines`` as Parquet, whole or not at all; a table without lines is a file without columns."""
    buffer = io.BytesIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    full = [{name: line.get(name) for name in names} for line in lines]
    pq.write_table(pa.Table.from_pylist(full), buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())
