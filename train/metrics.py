"""metrics.parquet: one line per logged step, arm and seed.

Nothing in it depends on the clock, so a resumed run writes the same bytes as an uninterrupted one. Tokens per
second and memory are in ``machine.parquet``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tcsae.store.atomic import write_atomically

METRICS_FILE = "metrics.parquet"
MACHINE_FILE = "machine.parquet"

_INTEGERS = (
    *("step", "tokens", "epoch", "seed", "n_pairs", "dead_h", "dead_l", "outliers", "ring_filled"),
    "resampled",  # features that have begun anew so far
)

_FLOATS = (
    "loss",  # everything that is minimised, weights included
    "fvu",  # on the batch
    "fit",  # what is minimised of it; more than fvu for matryoshka and gated
    "l2",  # mean ||x - x_hat||^2, raw units
    "auxiliary",  # AuxK, unweighted, summed over blocks
    "sparsity",  # penalty of standard, gated and jumprelu, unweighted
    "sparsity_weight",  # at this step
    "l2_penalty",  # sum of the weights' squares, unweighted; nan where it has no weight
    "contrast",  # the temporal term, unweighted (InfoNCE in nats); measured where none learns from it, too
    "alpha",  # weight of the contrast at this step
    "l1",  # mean sum of the code, raw units
    "l0",  # active features per token
    "l0_h",
    "l0_l",
    "energy_h",  # share of the code's square sum in block H
    "dead_share",
    "threshold_h",  # running, normalised units
    "threshold_l",
    "accuracy",  # InfoNCE top-1
    "accuracy_within_source",
    "masked_share",  # of (query, key) pairs
    "empty_share",  # of pairs
    "gradient_norm",  # of everything but the temporal term
    "gradient_ratio",  # contrast's gradient norm relative to that
    "learning_rate",
    "batch_variance",  # mean ||x||^2 / D in normalised units: 1 but for the batch's draw
)

METRICS = pa.schema(
    [(name, pa.int64()) for name in ("step", "tokens", "epoch")]
    + [("arm", pa.string())]
    + [(name, pa.int64()) for name in _INTEGERS[3:]]
    + [(name, pa.float64()) for name in _FLOATS]
)
"""Columns of metrics.parquet; nan where a term does not apply to an arm."""

MACHINE = pa.schema([("step", pa.int64()), ("tokens_per_second", pa.float64()), ("memory_bytes", pa.int64())])
"""Columns of machine.parquet: throughput since the line before, and the process's peak memory."""


class Log:
    """Lines of one table, in memory until they are written."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._lines: list[dict[str, Any]] = []

    def add(self, **line: Any) -> None:
        """Append a line that has exactly the schema's columns."""
        if line.keys() != set(self.schema.names):
            raise KeyError(f"columns {sorted(line.keys() ^ set(self.schema.names))} are missing or unknown")
        self._lines.append(line)

    def last(self, n: int) -> list[dict[str, Any]]:
        """The newest ``n`` lines, oldest first."""
        return self._lines[-n:]

    def to_bytes(self) -> bytes:
        """The lines so far as a parquet file."""
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._lines, schema=self.schema), sink, compression="zstd")
        return sink.getvalue()

    def restore(self, content: bytes) -> None:
        """Replace the lines by those of a file that `to_bytes` made."""
        self._lines = pq.read_table(io.BytesIO(content)).to_pylist()

    def write(self, path: Path) -> None:
        """Write the lines so far, whole or not at all."""
        write_atomically(path, self.to_bytes())
