"""From blocks of codes, one after the other, to `TemporalSums`.

Only active entries are touched, so a pass costs as many operations as there are activations, not as there are
features. Sums of values are taken per document first, since the within-document part of the autocorrelation needs a
document's own mean; a document may span several blocks of codes that follow one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.evaluate.information import CELLS, Thirds
from tcsae.evaluate.temporal_codes import KINDS, Codes, Pairing, neighbours, pairings, pairs_at
from tcsae.evaluate.temporal_pairs import Entries, Places, add_to_column, count_pairs
from tcsae.evaluate.temporal_sums import ONCE, TemporalSums, column_of


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
        self._table, self._table_before = torch.zeros(0), torch.zeros(0)
        self._places = Places()

    def add(self, codes: Codes) -> None:
        """Count a block; a document of the block before that is not in this one is complete."""
        sums = self.sums
        documents, slots = np.unique(codes.document.numpy(), return_inverse=True)
        slot_of_row = torch.from_numpy(slots)
        unit_of_slot = self._unit_of_document[torch.from_numpy(documents)]
        counted = codes.counted
        kept = counted.index_select(0, codes.row)
        row, feature, value = codes.row[kept], codes.feature[kept], codes.value[kept]
        state = self._thirds.states(value, feature)
        unit_of_row = unit_of_slot.index_select(0, slot_of_row)
        unit = unit_of_row * (len(KINDS) * len(sums.lags) * sums.d_sae * CELLS)
        table = self._new_table(len(documents))
        inside = feature * CELLS + state
        entries = Entries(
            row=row.numpy(),
            feature=feature.numpy(),
            value=value.double().numpy(),
            state=state.numpy(),
            in_table=((slot_of_row * table[0].numel()).index_select(0, row) + feature).numpy(),
            inside=inside.numpy(),
            in_unit=(unit.index_select(0, row) + inside).numpy(),
            unit=unit.numpy(),
            start=torch.searchsorted(row, torch.arange(codes.n_rows + 1)).numpy(),
        )
        self._places.fill(entries, codes.n_rows, sums.d_sae)
        self._count_values(codes, entries, table, slot_of_row, unit_of_slot)
        n_pairs = np.zeros((len(documents), len(sums.lags)), dtype=np.int64)

        def count(pairs: tuple[int, int, Pairing]) -> None:
            count_pairs(sums, table, entries, self._places, *pairs)

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            counting = []
            for pairs in pairings(codes, sums.lags, self._stream):
                counting.append(threads.submit(count, pairs))
                kind, lag, pairing = pairs
                is_first = (pairing.second < codes.n_rows).numpy()
                sums.n_pairs[:, kind, lag] += np.bincount(
                    unit_of_row.numpy()[is_first], minlength=sums.n_units
                )
                if kind == KINDS.index("observed"):
                    n_pairs[:, lag] = np.bincount(slots[is_first], minlength=len(documents))
            for counting_pairs in counting:
                counting_pairs.result()  # an error in a thread is raised here
        n = np.bincount(slots[counted.numpy()], minlength=len(documents))
        self._documents.add(documents, table, n, n_pairs)

    def finish(self) -> None:
        """Say that no block follows."""
        self._documents.finish()

    def _new_table(self, n_documents: int) -> Float[Tensor, "slot column feature"]:
        """Zeros for a block's documents. Two arrays take turns: `_Documents` has done with those of a block when it has
        seen the next one, and fresh memory for every block costs more than what is counted in it."""
        shape = n_documents, self.sums.values.shape[1], self.sums.d_sae
        self._table, self._table_before = self._table_before, self._table
        if len(self._table) < math.prod(shape):
            self._table = torch.empty(math.prod(shape), dtype=torch.float64)
        return self._table[: math.prod(shape)].view(shape).zero_()

    def _count_values(
        self, codes: Codes, entries: Entries, table: Tensor, slot_of_row: Tensor, unit_of_slot: Tensor
    ) -> None:
        """Everything that does not depend on a lag."""
        d_sae = self.sums.d_sae
        row, feature, value = entries.row, entries.feature, entries.value
        pairing = neighbours(codes)
        after, before = pairing.second.numpy()[row], pairing.first.numpy()[row]
        f_after = self._places.value[after * d_sae + feature]
        f_before = self._places.value[before * d_sae + feature]
        for name, what in (
            ("total", value),
            ("square", np.square(value)),
            ("firings", np.ones_like(value)),
            ("in_middle", (entries.state == 2).astype(np.float64)),
            ("in_upper", (entries.state == 3).astype(np.float64)),
            ("runs", (f_before == 0).astype(np.float64)),
            ("minima", np.minimum(value, f_after)),
        ):
            add_to_column(table, ONCE.index(name), entries, what)

        step = np.append(codes.step.double().numpy(), 0.0)  # the row after the last one has none
        to_after, to_before = step[after], np.where(before < codes.n_rows, step[row], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            forth = np.where(to_after > 0, np.abs(value - f_after) / to_after, -1.0)
            back = np.where(to_before > 0, np.abs(value - f_before) / to_before, -1.0)
        starts = np.flatnonzero(np.r_[True, np.diff(codes.context.numpy()) != 0])
        context = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, codes.n_rows]))
        steepest = torch.full((len(starts) * d_sae,), -1.0, dtype=torch.float64)
        at, steeper = (
            torch.from_numpy(one) for one in (context[row] * d_sae + feature, np.maximum(forth, back))
        )
        steepest = steepest.scatter_reduce_(0, at, steeper, "amax").view(-1, d_sae)
        is_on = steepest >= 0
        steepest.clamp_(min=0)
        slot = slot_of_row[torch.from_numpy(starts)]
        table[:, ONCE.index("steepest")].index_add_(0, slot, steepest)
        table[:, ONCE.index("n_steepest")].index_add_(0, slot, is_on.double())
        units = unit_of_slot.index_select(0, slot).numpy()
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
