"""What one kind of pairs at one lag adds to `TemporalSums`, for the codes of a block.

A block has 18 such jobs (3 kinds, 6 lags), each of which adds to counts of its own, so they run in threads. They
compute with NumPy and with `torch.Tensor.scatter_add_`, which use one thread each: PyTorch's other operations would
start threads of their own in every one of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8

from tcsae.evaluate.information import CELLS, STATES
from tcsae.evaluate.temporal_codes import KINDS, Pairing
from tcsae.evaluate.temporal_sums import TemporalSums, column_of

NO_PARTNER = STATES
"""What stands for the state of the partner that a token has not: off, but told apart from it"""

Numbers = Int64[np.ndarray, " entry"]


class Entries(NamedTuple):
    """The active entries of counted tokens, and where they go."""

    row: Numbers
    """token of the block, ascending"""
    feature: Numbers
    """its feature that is on"""
    value: Float[np.ndarray, " entry"]
    """the activation, in float64"""
    state: Numbers
    """1 to 3, see `Thirds.states`"""
    in_table: Numbers
    """place in the first column of its document and feature"""
    inside: Numbers
    """place among the counts of pairs of a unit, kind and lag: that of off and the entry's state"""
    in_unit: Numbers
    """the same among the counts of all units, of the first kind and lag"""
    unit: Int64[np.ndarray, " row"]
    """where the counts of each row's unit begin"""
    start: Int64[np.ndarray, " row_and_end"]
    """first entry of each row, and the number of entries"""

    def of_rows(self, which: Bool[np.ndarray, " row"]) -> Numbers:
        """Numbers of the entries of rows."""
        rows = np.flatnonzero(which)
        start = self.start[rows]
        lengths = self.start[rows + 1] - start
        n = int(lengths.sum())
        return np.repeat(start - (np.cumsum(lengths) - lengths), lengths) + np.arange(n)


class Places:
    """Value and state at every place of a block, row x d_sae + feature, one more row included: that of no token.

    They are kept from block to block, since clearing them whole costs more than all that is counted.
    """

    def __init__(self) -> None:
        self.value: Float[np.ndarray, " place"] = np.zeros(0, dtype=np.float32)
        """0 where off"""
        self.state: UInt8[np.ndarray, " place"] = np.zeros(0, dtype=np.uint8)
        """0 where off; of no token `NO_PARTNER`"""
        self._filled: Numbers = np.zeros(0, dtype=np.int64)
        self._nowhere = slice(0, 0)

    def fill(self, entries: Entries, n_rows: int, d_sae: int) -> None:
        """Put a block's there instead of the one before."""
        self.value[self._filled], self.state[self._filled], self.state[self._nowhere] = 0.0, 0, 0
        self._filled = entries.row * d_sae + entries.feature
        self._nowhere = slice(n_rows * d_sae, (n_rows + 1) * d_sae)
        if len(self.value) < self._nowhere.stop:
            self.value = np.zeros(self._nowhere.stop, dtype=np.float32)
            self.state = np.zeros(self._nowhere.stop, dtype=np.uint8)
        self.value[self._filled] = entries.value
        self.state[self._filled] = entries.state
        self.state[self._nowhere] = NO_PARTNER


def count_pairs(
    sums: TemporalSums,
    table: Float[torch.Tensor, "slot column feature"],
    entries: Entries,
    places: Places,
    kind: int,
    lag: int,
    pairing: Pairing,
) -> None:
    """Add a block's pairs to what is counted of them.

    Parameters
    ----------
    sums
        to whose counts by states they are added
    table
        to whose columns of products, of a document each, observed pairs are added
    entries, places
        of the block
    kind, lag
        numbers in `KINDS` and ``sums.lags``
    pairing
        the pairs
    """
    second, first = pairing.second.numpy(), pairing.first.numpy()
    there = (second * sums.d_sae)[entries.row]
    there += entries.feature
    _count_states(sums, entries, places.state[there], kind, lag, second, first)
    if kind == KINDS.index("observed"):
        nowhere = len(second)
        ends = (second < nowhere).astype(np.float64) + (first < nowhere)
        add_to_column(table, column_of("product", lag), entries, entries.value * places.value[there])
        add_to_column(table, column_of("ends", lag), entries, entries.value * ends[entries.row])


def add_to_column(
    table: Float[torch.Tensor, "slot column feature"],
    column: int,
    entries: Entries,
    what: Float[np.ndarray, " entry"],
) -> None:
    """Add an entry's figure to the column of its document and feature."""
    at = entries.in_table + column * table.shape[2]
    table.view(-1).scatter_add_(0, torch.from_numpy(at), torch.from_numpy(what))


def _count_states(
    sums: TemporalSums,
    entries: Entries,
    there: UInt8[np.ndarray, " entry"],
    kind: int,
    lag: int,
    second: Int64[np.ndarray, " row"],
    first: Int64[np.ndarray, " row"],
) -> None:
    """``there``: state of each entry's feature at its token's partner.

    Counting an entry costs far more than looking at it, so as few as can be are counted: of the two ends' states,
    those of tokens without a partner (see `TemporalSums.cells`), and of the pairs those that are on at both ends.
    """
    n_rows = len(second)
    plane = (kind * len(sums.lags) + lag) * sums.d_sae * CELLS
    cells = torch.from_numpy(sums.cells.reshape(-1)[plane:])

    def count(at: Numbers) -> None:
        cells.scatter_add_(0, torch.from_numpy(at), torch.ones(len(at), dtype=cells.dtype))

    def as_first(which: Numbers) -> Numbers:
        found: Numbers = entries.in_unit[which] + entries.state[which] * (STATES - 1)
        return found

    if kind != KINDS.index("matched"):
        counted = np.flatnonzero(there != 0)
        count(as_first(counted) + there[counted] % STATES)  # without a partner, as if it were off there
        count(entries.in_unit[entries.of_rows(first == n_rows)])
        return
    both = np.flatnonzero((there != 0) & (there != NO_PARTNER))
    count(as_first(both) + there[both])
    count(as_first(entries.of_rows(second < n_rows)))
    # a pair belongs to the unit of its first token, here another one
    counted = entries.of_rows(first < n_rows)
    count(entries.unit[first[entries.row[counted]]] + entries.inside[counted])
