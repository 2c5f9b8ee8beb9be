"""The temporal metrics of the true codes themselves: what a metric says of features that are known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.estimates import fingerprint
from tcsae.evaluate.heldout import Block, HeldOut
from tcsae.evaluate.saved_tables import read_table, write_table
from tcsae.evaluate.temporal_features import feature_table, figures
from tcsae.evaluate.temporal_pass import n_tokens_read, temporal_sums
from tcsae.evaluate.truth import TrueCodes
from tcsae.harvest.synthetic import SyntheticSource
from tcsae.store.progress import progress

FILE = Path("features") / "_truth.parquet"
"""in the evaluation folder: one row a true feature, as the tables of SAEs' features"""


@dataclass(frozen=True, slots=True)
class TruthEncoder:
    """The true codes in the place of an SAE's."""

    codes: TrueCodes

    @property
    def name(self) -> str:
        """for messages"""
        return "truth"

    @property
    def d_sae(self) -> int:
        """true features"""
        return self.codes.source.truth.n_features

    @property
    def block_size(self) -> int:
        """there is no block"""
        return 0

    def __call__(self, block: Block) -> Float[Tensor, "row feature"]:
        """True values of the block's rows."""
        return torch.from_numpy(self.codes.of(block).toarray())


def oracle_table(held_out: HeldOut, source: SyntheticSource, out: Path, *, seed: int) -> pa.Table:
    """Every temporal metric of every true feature, read from the evaluation folder ``out`` if it is there."""
    wanted = fingerprint(store=held_out.store.id, split=held_out.split, seed=seed, oracle=1).encode()
    path = out / FILE
    if path.is_file():
        found = read_table(path)
        if (found.schema.metadata or {}).get(b"fingerprint") == wanted:
            return found
    with progress(n_tokens_read(held_out), "token", "temporal: true codes") as bar:
        encoder = TruthEncoder(TrueCodes(held_out, source))
        sums = temporal_sums(encoder, held_out, seed=seed, advance=bar.update).without_empty_units()
    columns = {figure.column: figure.values[0] for figure in figures(sums)}
    table = feature_table(sums, 0, columns).replace_schema_metadata({b"fingerprint": wanted})
    write_table(table, path)
    return table


def means_by_kind(
    table: pa.Table, source: SyntheticSource, least_firings: int
) -> dict[str, dict[str, float | None]]:
    """Mean of each metric over the true features of a kind that fire often enough, by metric and kind.

    ``all`` is over all kinds. What no feature has is None.
    """
    truth = source.truth
    live = table["firings"].to_numpy() >= least_firings
    groups = {"all": live, **{kind: live & truth.of_kind(kind) for kind in ("slow", "medium", "fast")}}
    found: dict[str, dict[str, float | None]] = {}
    for column in table.column_names:
        if not pa.types.is_floating(table.schema.field(column).type):
            continue
        values = table[column].to_numpy().astype(np.float64)
        defined = np.isfinite(values)
        found[column] = {
            name: float(values[members & defined].mean()) if (members & defined).any() else None
            for name, members in groups.items()
        }
    return found
