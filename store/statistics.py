"""Mean, scale and norms of a hook's activations, in float64 and in a fixed order.

Two passes over the train split. The first fills a histogram of log-norms, whose quantiles give the median
and so the bound on outliers; the second sums what lies below that bound. Both add in row order, so the
figures are the same bits however often the harvest was interrupted, and take memory that does not grow with
the store.

Deep layers of some models have a few positions whose norm is more than a hundred times the median (mostly
the first tokens of a context). One such row weighs as much as ten thousand others in a mean square, so they
are stored and counted but kept out of the mean and the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.store.chunks import read_chunk
from tcsae.store.spec import OUTLIER_FACTOR, QUANTILES, HookStatistics, Layout, Provenance

BINS_PER_OCTAVE = 256
"""a bin is 0.27 % wide"""

LOWEST_OCTAVE, HIGHEST_OCTAVE = -40, 66
"""norms from 2^-40 to 2^66; float32 activations that are finite when squared lie below"""

PIECE_ROWS = 512
"""rows that are summed at once: in float64 they stay in the processor's cache, where a chunk's would be fresh pages"""

Blocks = Callable[[], Iterator[Float[Tensor, "row d_model"]]]


def statistics(blocks: Blocks, d_model: int) -> HookStatistics:
    """Statistics of the rows that ``blocks()`` yields, in any float dtype; it is called twice.

    >>> import torch
    >>> rows = torch.tensor([[3.0, 0.0], [5.0, 0.0], [4.0, 0.0], [4.0, 0.0], [900.0, 0.0]])
    >>> result = statistics(lambda: iter([rows]), 2)
    >>> result.mean.tolist(), result.mean_square_norm, result.n_outliers
    ([4.0, 0.0], 0.5, 1)
    """
    histogram = np.zeros((HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE, dtype=np.int64)
    for piece in _pieces(blocks()):
        histogram += np.bincount(_bins(_norms(piece)), minlength=histogram.size)
    quantiles = {str(q): _quantile(histogram, q) for q in QUANTILES}
    outlier_norm = OUTLIER_FACTOR * quantiles["0.5"]

    n_rows, n_kept, total_square = 0, 0, 0.0
    total = np.zeros(d_model)
    for piece in _pieces(blocks()):
        norms = _norms(piece)
        kept = norms <= outlier_norm
        n_rows += len(norms)
        n_kept += int(kept.sum())
        total += (piece if kept.all() else piece[kept]).sum(axis=0)
        total_square += float(np.square(norms[kept]).sum())
    mean = total / max(n_kept, 1)
    mean_square_norm = total_square / max(n_kept, 1) - float(np.square(mean).sum())
    return HookStatistics(
        mean=mean,
        mean_square_norm=max(mean_square_norm, 0.0),
        norm_quantiles=quantiles,
        outlier_norm=outlier_norm,
        n_outliers=n_rows - n_kept,
        n_rows=n_rows,
    )


def train_statistics(store: Path, made: Provenance, layout: Layout, hook: str) -> HookStatistics:
    """Statistics of ``hook`` over the rows of the train split, from the chunk files of ``store``.

    Raises `StoreCorrupt` if a chunk is missing or damaged.
    """
    is_train = np.array([split == "train" for split in layout.documents["split"].to_pylist()])
    train = torch.from_numpy(np.repeat(is_train, np.diff(layout.document_offsets)))
    size = made.rows_per_chunk

    def blocks() -> Iterator[Float[Tensor, "row d_model"]]:
        for chunk, start in enumerate(range(0, layout.n_rows, size)):
            kept = train[start : start + size]
            rows = read_chunk(store, made, hook, chunk)
            yield rows[: len(kept)][kept]

    return statistics(blocks, made.d_model)


def _pieces(blocks: Iterator[Float[Tensor, "row d_model"]]) -> Iterator[npt.NDArray[np.float64]]:
    for block in blocks:
        for piece in block.split(PIECE_ROWS):
            yield piece.double().numpy()


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
