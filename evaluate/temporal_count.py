"""From blocks of codes, one after the other, to `TemporalSums`.

Only active entries are touched, so a pass costs as many operations as there are activations, not as there are
features. Sums of values are taken per document first, since the within-document part of the autocorrelation needs a
document's own mean; a document may span several blocks of codes that follow one another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.evaluate.information import CELLS, STATES, Thirds
from tcsae.evaluate.temporal_codes import KINDS, Codes, Pairing, neighbours, pairings, pairs_at
from tcsae.evaluate.temporal_sums import ONCE, TemporalSums, column_of


class _Entries(NamedTuple):
    """The active entries of counted tokens, and where they go."""

    row: Int64[Tensor, " entry"]
    feature: Int64[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    state: Int64[Tensor, " entry"]
    slot: Int64[Tensor, " entry"]
    """document of the block"""
    inside: Int64[Tensor, " entry"]
    """place among the counts of pairs of a unit, kind and lag: that of off and the entry's state"""
    start: Int64[Tensor, " row"]
    """first entry of each row, and the number of entries"""

    def of_rows(self, rows: Int64[Tensor, " few"]) -> Int64[Tensor, " entry"]:
        """Numbers of the entries of ``rows``."""
        start = self.start.take(rows)
        lengths = self.start.take(rows + 1) - start
        before = lengths.cumsum(0) - lengths
        return torch.repeat_interleave(start - before, lengths) + torch.arange(int(lengths.sum()))


class _Open(NamedTuple):
    """A document that may go on in the next block."""

    table: Float[Tensor, "column feature"]
    n: int
    n_pairs: Int64[np.ndarray, " lag"]


class _Documents:
    """The documents that are not complete: one of a block goes on if it is in the next block too."""

    def __init__(self, sums: TemporalSums, unit_of_document: Int64[Tensor, " document"]) -> None:
        self.sums = sums
        self._unit_of_document = unit_of_document
        self._open: dict[int, _Open] = {}

    def add(
        self,
        documents: Int64[np.ndarray, " slot"],
        table: Float[Tensor, "slot column feature"],
        n: Int64[np.ndarray, " slot"],
        n_pairs: Int64[np.ndarray, "slot lag"],
    ) -> None:
        """A block's sums for each of its documents; those of the block before that are not in it are complete."""
        self.close(set(self._open) - set(documents.tolist()))
        for slot, document in enumerate(documents.tolist()):
            one = _Open(table[slot], int(n[slot]), n_pairs[slot])
            before = self._open.get(document)
            if before is not None:
                one = _Open(before.table + one.table, before.n + one.n, before.n_pairs + one.n_pairs)
            self._open[document] = one

    def close(self, documents: Iterable[int]) -> None:
        """Add the documents to their units: what is about a document's own mean follows from its sums."""
        values = torch.from_numpy(self.sums.values)
        for document in sorted(documents):
            table, n, n_pairs = self._open.pop(document)
            if not n:
                continue
            unit = int(self._unit_of_document[document])
            total = table[ONCE.index("total")]
            mean = total / n
            table[ONCE.index("within_square")] = table[ONCE.index("square")] - mean * total
            for lag, pairs in enumerate(n_pairs.tolist()):
                about = mean * (pairs * mean - table[column_of("ends", lag)])
                table[column_of("within_product", lag)] = table[column_of("product", lag)] + about
            values[unit] += table
            self.sums.n[unit] += n

    def finish(self) -> None:
        """Say that no block follows."""
        self.close(list(self._open))


class Accumulator:
    """Adds codes, block after block, to sums.

    Parameters
    ----------
    sums
        what is added to
    thirds
        bounds of the states
    unit_of_document
        unit of each document
    block_size
        features of block H
    stream
        draws the permutations
    """

    def __init__(
        self,
        sums: TemporalSums,
        thirds: Thirds,
        unit_of_document: Int64[Tensor, " document"],
        block_size: int,
        stream: np.random.Generator,
    ) -> None:
        self.sums = sums
        self._documents = _Documents(sums, unit_of_document)
        self._thirds = thirds
        self._unit_of_document = unit_of_document
        self._parts = (slice(0, sums.d_sae), slice(0, block_size), slice(block_size, sums.d_sae))
        self._stream = stream
        self._value = torch.zeros(0)
        self._state = torch.zeros(0, dtype=torch.uint8)

    def add(self, codes: Codes) -> None:
        """Count a block; a document of the block before that is not in this one is complete."""
        sums = self.sums
        documents, slots = np.unique(codes.document.numpy(), return_inverse=True)
        slot_of_row = torch.from_numpy(slots)
        unit_of_slot = self._unit_of_document[torch.from_numpy(documents)]
        counted = codes.counted
        kept = counted.take(codes.row)
        row, feature, value = codes.row[kept], codes.feature[kept], codes.value[kept]
        state = self._thirds.states(value, feature)
        start = torch.searchsorted(row, torch.arange(codes.n_rows + 1))
        entries = _Entries(row, feature, value, state, slot_of_row.take(row), feature * CELLS + state, start)
        place = row * sums.d_sae + feature
        self._fill(place, entries, (codes.n_rows + 1) * sums.d_sae)
        table = torch.zeros(len(documents), sums.values.shape[1], sums.d_sae, dtype=torch.float64)
        n_pairs = np.zeros((len(documents), len(sums.lags)), dtype=np.int64)
        self._count_values(codes, entries, table, slot_of_row, unit_of_slot)
        unit_of_row = unit_of_slot.take(slot_of_row)
        in_unit = unit_of_row.take(row) * (len(KINDS) * len(sums.lags) * sums.d_sae * CELLS) + entries.inside
        for kind, lag, pairing in pairings(codes, sums.lags, self._stream):
            is_first = (pairing.second < codes.n_rows).numpy()
            sums.n_pairs[:, kind, lag] += np.bincount(unit_of_row.numpy()[is_first], minlength=sums.n_units)
            self._count_states(entries, pairing, kind, lag, unit_of_row, in_unit)
            if kind == 0:
                self._count_products(entries, pairing, table, lag)
                n_pairs[:, lag] = np.bincount(slots[is_first], minlength=len(documents))
        self._value[place], self._state[place] = 0.0, 0
        n = np.bincount(slots[counted.numpy()], minlength=len(documents))
        self._documents.add(documents, table, n, n_pairs)

    def finish(self) -> None:
        """Say that no block follows."""
        self._documents.finish()

    def _fill(self, place: Tensor, entries: _Entries, size: int) -> None:
        """Put values and states at their places of arrays that are 0 elsewhere; the last row, that of no token, stays
        0. The arrays are kept from block to block, since clearing them whole costs more than all that is counted."""
        if len(self._value) < size:
            self._value = torch.zeros(size)
            self._state = torch.zeros(size, dtype=torch.uint8)
        self._value[place] = entries.value
        self._state[place] = entries.state.to(torch.uint8)

    def _count_states(
        self, entries: _Entries, pairing: Pairing, kind: int, lag: int, unit_of_row: Tensor, in_unit: Tensor
    ) -> None:
        """``in_unit``: place of each entry's `_Entries.inside` with its unit's counts before it.

        Counting an entry costs far more than looking at it, so as few as can be are counted: of the two ends' states,
        those of tokens without a partner (see `TemporalSums.cells`), and of the pairs those that are on at both ends.
        """
        d_sae, n_rows = self.sums.d_sae, len(unit_of_row)
        plane = d_sae * CELLS
        of_unit = len(KINDS) * len(self.sums.lags) * plane
        cells = torch.from_numpy(self.sums.cells).view(-1)[(kind * len(self.sums.lags) + lag) * plane :]
        row, feature = entries.row, entries.feature
        is_first = in_unit + entries.state * (STATES - 1)

        def count(places: Tensor) -> None:
            cells.scatter_add_(0, places, torch.ones(len(places), dtype=cells.dtype))

        # whatever a token needs is worked out once for it, and then taken for each of its entries
        there = self._state.take((pairing.second * d_sae).take(row) + feature)
        both = there.nonzero().squeeze(1)
        count(is_first.take(both) + there.take(both))
        is_matched = kind == KINDS.index("matched")
        counted = [entries.of_rows(((ends < n_rows) == is_matched).nonzero().squeeze(1)) for ends in pairing]
        count(is_first.take(counted[0]))
        if is_matched:  # a pair belongs to the unit of its first token, here another one
            unit_of_first = unit_of_row.take(pairing.first.clamp(max=n_rows - 1)) * of_unit
            in_unit = unit_of_first.take(row) + entries.inside
        count(in_unit.take(counted[1]))

    def _count_products(self, entries: _Entries, pairing: Pairing, table: Tensor, lag: int) -> None:
        nowhere = len(pairing.second)
        value = entries.value.double()
        there = self._value.take((pairing.second * self.sums.d_sae).take(entries.row) + entries.feature)
        _add(table, column_of("product", lag), entries, value * there)
        ends = (pairing.second < nowhere).double() + (pairing.first < nowhere)
        _add(table, column_of("ends", lag), entries, value * ends.take(entries.row))

    def _count_values(
        self, codes: Codes, entries: _Entries, table: Tensor, slot_of_row: Tensor, unit_of_slot: Tensor
    ) -> None:
        """Everything that does not depend on a lag."""
        d_sae = self.sums.d_sae
        row, feature, value = entries.row, entries.feature, entries.value.double()
        one = torch.ones_like(value)
        pairing = neighbours(codes)
        after, before = pairing.second.take(row), pairing.first.take(row)
        f_after = self._value.take(after * d_sae + feature)
        f_before = self._value.take(before * d_sae + feature)
        _add(table, ONCE.index("total"), entries, value)
        _add(table, ONCE.index("square"), entries, value.square())
        _add(table, ONCE.index("firings"), entries, one)
        for state, name in ((2, "in_middle"), (3, "in_upper")):
            _add(table, ONCE.index(name), entries, (entries.state == state).double())
        _add(table, ONCE.index("runs"), entries, (f_before == 0).double())
        _add(table, ONCE.index("minima"), entries, torch.minimum(value, f_after.double()))

        # the row after the last one has no step
        step = torch.cat([codes.step.double(), torch.zeros(1, dtype=torch.float64)])
        to_after, to_before = step.take(after), torch.where(before < codes.n_rows, step.take(row), 0.0)
        forth = torch.where(to_after > 0, (value - f_after).abs() / to_after, -1.0)
        back = torch.where(to_before > 0, (value - f_before).abs() / to_before, -1.0)
        starts = np.flatnonzero(np.r_[True, np.diff(codes.context.numpy()) != 0])
        lengths = torch.from_numpy(np.diff(np.r_[starts, codes.n_rows]))
        context = torch.repeat_interleave(torch.arange(len(starts)), lengths)
        steepest = torch.full((len(starts) * d_sae,), -1.0, dtype=torch.float64)
        at = context.take(row) * d_sae + feature
        steepest = steepest.scatter_reduce_(0, at, torch.maximum(forth, back), "amax").view(-1, d_sae)
        is_on = steepest >= 0
        steepest.clamp_(min=0)
        slot = slot_of_row[torch.from_numpy(starts)]
        table[:, ONCE.index("steepest")].index_add_(0, slot, steepest)
        table[:, ONCE.index("n_steepest")].index_add_(0, slot, is_on.double())
        units = unit_of_slot.take(slot).numpy()
        for part, span in enumerate(self._parts):
            n_on = is_on[:, span].sum(dim=1)
            mean = steepest[:, span].sum(dim=1) / n_on.clamp(min=1)
            for which, what in enumerate((mean, (n_on > 0).double())):
                of_units = np.bincount(units, what.numpy(), minlength=self.sums.n_units)
                self.sums.published[:, part, which] += of_units


class SignedAccumulator:
    """Adds features that have a sign and are never off, block after block: what the autocorrelation needs."""

    def __init__(self, sums: TemporalSums, unit_of_document: Int64[Tensor, " document"]) -> None:
        self.sums = sums
        self._documents = _Documents(sums, unit_of_document)
        self._unit_of_document = unit_of_document

    def add(
        self,
        x: Float[Tensor, "row feature"],
        *,
        counted: Bool[Tensor, " row"],
        context: Int64[Tensor, " row"],
        document: Int64[Tensor, " row"],
    ) -> None:
        """Count a block; a document of the block before that is not in this one is complete."""
        documents, slots = np.unique(document.numpy(), return_inverse=True)
        slot_of_row = torch.from_numpy(slots)
        units = self._unit_of_document[torch.from_numpy(documents)].numpy()[slots]
        x = x.double()
        table = torch.zeros(len(documents), self.sums.values.shape[1], x.shape[1], dtype=torch.float64)
        kept = slot_of_row[counted]
        table[:, ONCE.index("total")].index_add_(0, kept, x[counted])
        table[:, ONCE.index("square")].index_add_(0, kept, x[counted].square())
        table[:, ONCE.index("firings")].index_add_(0, kept, torch.ones_like(x[counted]))
        n_pairs = np.zeros((len(documents), len(self.sums.lags)), dtype=np.int64)
        for lag, tokens in enumerate(self.sums.lags):
            rows = pairs_at(counted.numpy(), context.numpy(), tokens)
            here, there, slot = x[rows], x[rows + tokens], slot_of_row[rows]
            table[:, column_of("product", lag)].index_add_(0, slot, here * there)
            table[:, column_of("ends", lag)].index_add_(0, slot, here + there)
            n_pairs[:, lag] = np.bincount(slots[rows], minlength=len(documents))
            self.sums.n_pairs[:, 0, lag] += np.bincount(units[rows], minlength=self.sums.n_units)
        n = np.bincount(slots[counted.numpy()], minlength=len(documents))
        self._documents.add(documents, table, n, n_pairs)

    def finish(self) -> None:
        """Say that no block follows."""
        self._documents.finish()


def _add(table: Tensor, column: int, entries: _Entries, what: Tensor) -> None:
    """Add an entry's figure to the column of its document and feature."""
    n_columns, d_sae = table.shape[1:]
    at = (entries.slot * n_columns + column) * d_sae + entries.feature
    table.view(-1).scatter_add_(0, at, what)
