"""Mean, scale and norms of a hook's activations, in float64 and in a fixed order.

Two passes over the train split. The first fills a histogram of log-norms, whose quantiles give the median
and so the bound on outliers; the second sums what lies below that bound. Each chunk is summed by itself, perhaps
by a worker, and the sums are added in the chunks' order, so the figures are the same bits however often the harvest
was interrupted and whoever summed, and take memory that does not grow with the store.

Deep layers of some models have a few positions whose norm is more than a hundred times the median (mostly
the first tokens of a context). One such row weighs as much as ten thousand others in a mean square, so they
are stored and counted but kept out of the mean and the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tcsae.store.chunks import chunk_path, read_chunk
from tcsae.store.layout import Layout
from tcsae.store.parallel import Pool
from tcsae.store.spec import OUTLIER_FACTOR, QUANTILES, HookStatistics, Provenance

BINS_PER_OCTAVE = 256
"""a bin is 0.27 % wide"""

LOWEST_OCTAVE, HIGHEST_OCTAVE = -40, 66
"""norms from 2^-40 to 2^66; float32 activations that are finite when squared lie below"""

PIECE_ROWS = 512
"""rows that are summed at once: in float64 they stay in the processor's cache, where a chunk's would be fresh pages"""

Blocks = Callable[[], Iterator[Float[Tensor, "row d_model"]]]


class NormCounts(NamedTuple):
    """How many rows have a norm in which bin of the histogram; bins without any are left out."""

    bins: npt.NDArray[np.int64]
    """numbers of the bins, ascending"""
    counts: npt.NDArray[np.int64]
    """rows in each"""


class Sums(NamedTuple):
    """What a block of rows adds to the mean and the scale."""

    n_rows: int
    """rows, outliers included"""
    n_kept: int
    """rows that are none"""
    total: npt.NDArray[np.float64]
    """sum of the rows that are none, [d_model]"""
    total_square: float
    """sum of their squared norms"""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRows:
    """The rows of a chunk that count, as a task for whoever reads it."""

    store: Path
    """folder of the store"""
    made: Provenance
    """how its chunks are to be read"""
    hook: str
    """whose chunk"""
    chunk: int
    """its number"""
    is_train: Bool[np.ndarray, " row"]
    """which rows are of the train split; padding has no entry"""

    def __str__(self) -> str:
        return str(chunk_path(self.store, self.hook, self.chunk))


def statistics(blocks: Blocks, d_model: int) -> HookStatistics:
    """Statistics of the rows that ``blocks()`` yields, in any float dtype; it is called twice.

    >>> import torch
    >>> rows = torch.tensor([[3.0, 0.0], [5.0, 0.0], [4.0, 0.0], [4.0, 0.0], [900.0, 0.0]])
    >>> result = statistics(lambda: iter([rows]), 2)
    >>> result.mean.tolist(), result.mean_square_norm, result.n_outliers
    ([4.0, 0.0], 0.5, 1)
    """
    quantiles = quantiles_of(map(count_norms, blocks()))
    bound = _outlier_norm(quantiles)
    return _combined(quantiles, (_sum(block, bound) for block in blocks()), d_model)


def train_statistics(
    chunks: list[ChunkRows],
    quantiles: dict[str, float],
    d_model: int,
    *,
    pool: Pool,
    on_chunk: Callable[[], Any] = lambda: None,
) -> HookStatistics:
    """Statistics of a hook over the rows of the train split, from its chunks, all of them and in order.

    Parameters
    ----------
    chunks
        the hook's, as `chunk_rows` gives them
    quantiles
        of the norms of the same rows (`quantiles_of`)
    d_model
        of the store
    pool
        where chunks are read
    on_chunk
        called after each

    Raises `StoreCorrupt` if a chunk is missing or damaged.
    """
    bound = _outlier_norm(quantiles)

    def sums() -> Iterator[Sums]:
        for found in pool.map_in_order(_sum_chunk, [_Bounded(chunk, bound) for chunk in chunks]):
            on_chunk()
            yield found

    return _combined(quantiles, sums(), d_model)


def chunk_rows(store: Path, made: Provenance, layout: Layout, hook: str) -> list[ChunkRows]:
    """The chunks of a hook, in order, with which of their rows are of the train split."""
    of_document = np.array([split == "train" for split in layout.documents["split"].to_pylist()])
    is_train = np.repeat(of_document, np.diff(layout.document_offsets))
    size = made.rows_per_chunk
    return [
        ChunkRows(store, made, hook, chunk, is_train[start : start + size])
        for chunk, start in enumerate(range(0, layout.n_rows, size))
    ]


def count_norms(
    block: Float[Tensor, "row d_model"], counts: Bool[np.ndarray, " row_or_fewer"] | None = None
) -> NormCounts:
    """The norms of a block's rows, by bins of the histogram; with ``counts``, of those for which it is true."""
    numbers = [_bins(_norms(piece)) for piece in _pieces(block, counts)]
    together = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64)
    return NormCounts(*np.unique(together, return_counts=True))


def quantiles_of(parts: Iterable[NormCounts]) -> dict[str, float]:
    """`QUANTILES` of the norms that ``parts`` count together, exact to half a bin."""
    histogram = np.zeros((HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE, dtype=np.int64)
    for bins, counts in parts:
        histogram[bins] += counts
    return {str(q): _quantile(histogram, q) for q in QUANTILES}


class _Bounded(NamedTuple):
    chunk: ChunkRows
    outlier_norm: float

    def __str__(self) -> str:
        return str(self.chunk)


def _sum_chunk(task: _Bounded) -> Sums:
    of = task.chunk
    if not of.is_train.any():
        return Sums(0, 0, np.zeros(of.made.d_model), 0.0)
    return _sum(read_chunk(of.store, of.made, of.hook, of.chunk), task.outlier_norm, of.is_train)


def _sum(
    block: Float[Tensor, "row d_model"],
    outlier_norm: float,
    counts: Bool[np.ndarray, " row_or_fewer"] | None = None,
) -> Sums:
    n_rows, n_kept, total_square = 0, 0, 0.0
    total = np.zeros(block.shape[1])
    for piece in _pieces(block, counts):
        norms = _norms(piece)
        kept = norms <= outlier_norm
        n_rows += len(piece)
        n_kept += int(kept.sum())
        total += (piece if kept.all() else piece[kept]).sum(axis=0)
        total_square += float(np.square(norms[kept]).sum())
    return Sums(n_rows, n_kept, total, total_square)


def _combined(quantiles: dict[str, float], parts: Iterable[Sums], d_model: int) -> HookStatistics:
    n_rows, n_kept, total_square = 0, 0, 0.0
    total = np.zeros(d_model)
    for part in parts:
        n_rows += part.n_rows
        n_kept += part.n_kept
        total += part.total
        total_square += part.total_square
    mean = total / max(n_kept, 1)
    mean_square_norm = total_square / max(n_kept, 1) - float(np.square(mean).sum())
    return HookStatistics(
        mean=mean,
        mean_square_norm=max(mean_square_norm, 0.0),
        norm_quantiles=quantiles,
        outlier_norm=_outlier_norm(quantiles),
        n_outliers=n_rows - n_kept,
        n_rows=n_rows,
    )


def _outlier_norm(quantiles: dict[str, float]) -> float:
    return OUTLIER_FACTOR * quantiles["0.5"]


def _pieces(
    block: Float[Tensor, "row d_model"], counts: Bool[np.ndarray, " row_or_fewer"] | None
) -> Iterator[npt.NDArray[np.float64]]:
    """Rows that count, `PIECE_ROWS` at a time, in float64 and all in one place: the next overwrite the last ones."""
    rows = torch.from_numpy(np.arange(len(block)) if counts is None else np.flatnonzero(counts))
    place = torch.empty(min(PIECE_ROWS, len(rows)), block.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), PIECE_ROWS):
        which = rows[start : start + PIECE_ROWS]
        first, stop = int(which[0]), int(which[-1]) + 1
        piece = block[first:stop] if stop - first == len(which) else block.index_select(0, which)
        yield place[: len(which)].copy_(piece).numpy()


def _norms(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms


def _bins(norms: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    octaves = np.log2(np.maximum(norms, 2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
    bins: npt.NDArray[np.int64] = (octaves * BINS_PER_OCTAVE).astype(np.int64)
    return bins.clip(0, (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE - 1)


def _quantile(histogram: npt.NDArray[np.int64], q: float) -> float:
    """The middle (in logarithm) of the bin that holds quantile ``q``; 0 for an empty histogram."""
    total = int(histogram.sum())
    if not total:
        return 0.0
    rank = min(max(int(np.ceil(q * total)), 1), total)
    at = int(np.searchsorted(np.cumsum(histogram), rank))
    return float(2.0 ** (LOWEST_OCTAVE + (at + 0.5) / BINS_PER_OCTAVE))
