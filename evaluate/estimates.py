"""Measured figures and the files that keep them.

A suite's result for one SAE is two files: ``<suite>/<sae>.json``, in the envelope that SAEBench uses for all
its evaluations, with our own part in ``eval_result_unstructured.tcsae``; and ``draws/<suite>/<sae>.parquet``,
every metric's bootstrap draws, from which SAEs are compared in pairs without measuring again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from tcsae.evaluate.intervals import Bootstrap, Interval, interval
from tcsae.evaluate.saved_tables import read_table, write_table
from tcsae.store.atomic import write_atomically
from tcsae.store.errors import RunError

RESULT_VERSION = 1
"""Raised whenever a figure changes its meaning; results of another version are measured again."""


@dataclass(frozen=True, slots=True)
class Draws:
    """One metric's bootstrap, kept for paired comparisons."""

    value: float
    """on the sample"""
    draws: Float[np.ndarray, " resample"]
    """on each resample"""
    leave_one_out: Float[np.ndarray, " unit"]
    """without one unit"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure of one SAE."""

    metric: str
    """such as ``explained_variance``"""
    unit: str
    """such as ``nats``; "1" for a pure number"""
    value: float | None
    """None where undefined"""
    low: float | None
    """lower end of the interval over documents, None where there is none"""
    high: float | None
    """upper end"""
    n_documents: int
    """documents the figure rests on"""
    method: str | None
    """how the interval was found, None where there is none"""
    reason: str | None
    """why the value or its interval is missing, None if neither is"""

    @classmethod
    def of(cls, metric: str, unit: str, found: Interval, n_documents: int) -> Estimate:
        """The estimate that ``found`` is the interval of."""
        return cls(metric, unit, found.value, found.low, found.high, n_documents, found.method, found.reason)

    @classmethod
    def count(cls, metric: str, unit: str, value: float | None, n_documents: int, reason: str) -> Estimate:
        """A figure without an interval, and why it has none."""
        return cls(metric, unit, value, None, None, n_documents, None, reason)


@dataclass(frozen=True, slots=True)
class Metric:
    """What a column of a `Bootstrap` is."""

    name: str
    """as in the result files"""
    unit: str
    """as in the result files"""
    undefined: str
    """why the value is undefined when it is"""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """One suite's figures for one SAE."""

    fingerprint: str
    """hash over everything that decides the figures"""
    estimates: dict[str, Estimate]
    """by metric, in the order of the tables"""
    draws: dict[str, Draws]
    """of the metrics that have an interval"""
    facts: dict[str, Any]
    """counts, definitions and conditions, in JSON's types"""


def estimates_of(
    metrics: Sequence[Metric], found: Bootstrap, n_documents: int, unit: str = "document"
) -> tuple[dict[str, Estimate], dict[str, Draws]]:
    """Intervals of every column of ``found`` that is finite, reasons for those that are not; ``unit`` was resampled."""
    estimates, draws = {}, {}
    for at, metric in enumerate(metrics):
        one = Draws(float(found.value[at]), found.draws[:, at], found.leave_one_out[:, at])
        ends = interval(one.value, one.draws, one.leave_one_out, undefined=metric.undefined, unit=unit)
        estimates[metric.name] = Estimate.of(metric.name, metric.unit, ends, n_documents)
        if ends.value is not None:
            draws[metric.name] = one
    return estimates, draws


def fingerprint(**decides: Any) -> str:
    """SHA-256 over ``decides`` in canonical JSON and the version of the results."""
    text = json.dumps({"version": RESULT_VERSION, **decides}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_result(json_path: Path, draws_path: Path, envelope: Mapping[str, Any], result: SuiteResult) -> None:
    """Write both files, the JSON last: where it is, the result is whole."""
    table = pa.table(
        {
            "metric": pa.array(list(result.draws), pa.string()),
            "value": pa.array([d.value for d in result.draws.values()], pa.float64()),
            "draws": pa.array([d.draws for d in result.draws.values()], pa.list_(pa.float64())),
            "leave_one_out": pa.array(
                [d.leave_one_out for d in result.draws.values()], pa.list_(pa.float64())
            ),
        }
    )
    table = table.replace_schema_metadata({"fingerprint": result.fingerprint})
    write_table(table, draws_path)
    ours = {
        "fingerprint": result.fingerprint,
        "estimates": {name: asdict(estimate) for name, estimate in result.estimates.items()},
        **result.facts,
    }
    body = {**envelope, "eval_result_unstructured": {"tcsae": ours}}
    write_atomically(json_path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())


def read_result(json_path: Path, draws_path: Path, wanted: str) -> SuiteResult | None:
    """The finished result with fingerprint ``wanted``; None if there is none, or one with other settings.

    Raises
    ------
    RunError
        there is a file, but it cannot be read
    """
    found = read_any_result(json_path, draws_path)
    return found if found is not None and found.fingerprint == wanted else None


def read_any_result(json_path: Path, draws_path: Path) -> SuiteResult | None:
    """The finished result, whatever its settings; None if there is none, or if the two files do not belong together.

    Raises
    ------
    RunError
        there is a file, but it cannot be read
    """
    if not json_path.is_file() or not draws_path.is_file():
        return None
    try:
        ours = json.loads(json_path.read_bytes())["eval_result_unstructured"]["tcsae"]
        table = read_table(draws_path)
        written = (table.schema.metadata or {}).get(b"fingerprint", b"").decode()
        if ours["fingerprint"] != written:
            return None
        estimates = {name: Estimate(**fields) for name, fields in ours.pop("estimates").items()}
        columns = [table[name].to_pylist() for name in ("metric", "value", "draws", "leave_one_out")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{json_path}: not a result that tcsae wrote ({error}); delete it to measure again"
        ) from error
    draws = {
        metric: Draws(value, np.array(resamples), np.array(left_out))
        for metric, value, resamples, left_out in zip(*columns, strict=True)
    }
    return SuiteResult(ours.pop("fingerprint"), estimates, draws, ours)
