"""All results of an evaluation in one place: ``summary.json`` and ``summary.parquet``."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tcsae.evaluate.estimates import Draws, Estimate
from tcsae.evaluate.truth_ranking import Ranking
from tcsae.store.atomic import write_atomically

SUMMARY_SCHEMA = pa.schema(
    [
        ("sae", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n_documents", pa.int64()),
        ("unit", pa.string()),
    ]
)
"""Long form: one line a figure; null where there is none, the reason is in ``summary.json``."""


@dataclass(frozen=True, slots=True)
class Row:
    """Every figure of one SAE."""

    sae: str
    """unique name"""
    arm: str
    """kind of SAE"""
    seed: int | None
    """of its training"""
    block_size: int
    """features of block H, 0: no block"""
    estimates: dict[str, Estimate]
    """by metric, over all suites"""
    draws: dict[str, Draws]
    """bootstrap draws of the metrics that have an interval"""
    origin: dict[str, Any] = field(default_factory=dict)
    """what it is and where it came from: `tcsae.evaluate.subjects.Subject.origin`"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One SAE against its control, resampled in pairs."""

    sae: str
    """name of the treated SAE"""
    control: str
    """name of its control"""
    estimates: dict[str, Estimate]
    """ratio and difference of each compared metric, by name"""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found, as written to the evaluation folder."""

    out: Path
    """the folder"""
    rows: tuple[Row, ...]
    """one an SAE, in the order given"""
    comparisons: tuple[Comparison, ...]
    """one for each SAE that has a control among them"""
    conditions: dict[str, Any]
    """store, model, split, tokens, documents and settings"""
    figure: Path | None
    """``final_metrics.png``, None if the core suite was not asked for"""
    ranking: Ranking | None = None
    """whether temporal metrics order as the truth does; None unless both suites were asked for"""
    unlearning_figure: Path | None = None
    """``unlearning.png``, None if the unlearning suite was not asked for"""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the content of ``summary.json``; without the draws."""
        return {
            "conditions": self.conditions,
            "saes": [
                {
                    "sae": row.sae,
                    "arm": row.arm,
                    "seed": row.seed,
                    "block_size": row.block_size,
                    "origin": row.origin,
                    "metrics": {name: _plain(one) for name, one in row.estimates.items()},
                }
                for row in self.rows
            ],
            "comparisons": [
                {
                    "sae": one.sae,
                    "control": one.control,
                    "metrics": {name: _plain(estimate) for name, estimate in one.estimates.items()},
                }
                for one in self.comparisons
            ],
            "figure": None if self.figure is None else self.figure.name,
        }


def replayed_documents(rows: Sequence[Row]) -> int | None:
    """Documents behind the figures of the model's replay, None where none was measured.

    The replay stops at ``max_tokens``, so these are fewer than the store's figures rest on.
    """
    found = [row.estimates["loss_recovered"].n_documents for row in rows if "loss_recovered" in row.estimates]
    return max(found, default=0) or None


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {name: value for name, value in asdict(estimate).items() if name != "metric"}


def long_form(rows: Sequence[Row]) -> pa.Table:
    """`SUMMARY_SCHEMA` of ``rows``."""
    lines = [
        {"sae": row.sae, "arm": row.arm, "seed": row.seed}
        | {name: getattr(one, name) for name in ("metric", "value", "low", "high", "n_documents", "unit")}
        for row in rows
        for one in row.estimates.values()
    ]
    return pa.Table.from_pylist(lines, schema=SUMMARY_SCHEMA)


def write_summary(evaluation: Evaluation) -> None:
    """Write ``summary.parquet`` and ``summary.json`` into the evaluation folder, each whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(long_form(evaluation.rows), buffer)
    write_atomically(evaluation.out / "summary.parquet", buffer.getvalue())
    text = json.dumps(evaluation.to_dict(), indent=1, allow_nan=False) + "\n"
    write_atomically(evaluation.out / "summary.json", text.encode())
