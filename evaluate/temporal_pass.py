"""One pass over the held-out text: from activations to `TemporalSums`, here or on Dask workers.

The text is cut into parts of whole documents, about `PART_TOKENS` long. A part's documents are dealt into two halves,
and each block that is encoded holds contexts of either half, so that there are contexts of another document to match
with even where one document fills many blocks. Parts are counted for themselves and added up in order; who counts
them changes no bit of the result.

The thirds of a feature's positive values are needed before its states can be counted. Where the text is short, it is
encoded once and its codes, which are few, are kept; otherwise they come from a sample of contexts, evenly spaced over
the text, which is encoded twice (docs/decisions/011-temporal-suite.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tcsae.evaluate.heldout import BLOCK_ROWS, Block, HeldOut, Indices
from tcsae.evaluate.information import Thirds, thirds_of
from tcsae.evaluate.temporal_codes import LAGS, SKIPPED_POSITIONS, Codes
from tcsae.evaluate.temporal_count import Accumulator
from tcsae.evaluate.temporal_encoders import Encoder
from tcsae.evaluate.temporal_sums import TemporalSums, bytes_per_unit
from tcsae.store.errors import TrainingCollapsed

PART_TOKENS = 2**15
"""Tokens of a part, at the least; one task where Dask is asked."""

SAMPLE_TOKENS = 2**15
"""Tokens of the sample that the thirds are read from; text of twice as many is encoded once and kept."""

MAX_KEPT = 2**23
"""Active entries that are kept, 170 MB; an encoder that has more is run twice."""

MAX_UNITS = 128
"""Documents beyond it are dealt out into groups, see `HeldOut.units`."""

MAX_BYTES = 768 * 2**20
"""Bound on the sums of one SAE; where it is reached there are fewer units."""

Advance = Callable[[int], object]
"""Told of tokens that are done."""


def untold(_: int) -> None:
    """For an `Advance` that nobody listens to."""


def units_of(held_out: HeldOut, d_sae: int, lags: tuple[int, ...] = LAGS) -> Int64[Tensor, " document"]:
    """Unit of resampling of each document."""
    return held_out.units(max(2, min(MAX_UNITS, MAX_BYTES // bytes_per_unit(d_sae, len(lags)))))


def nothing_counted(
    held_out: HeldOut,
    unit_of_document: Int64[Tensor, " document"],
    d_sae: int,
    lags: tuple[int, ...] = LAGS,
) -> TemporalSums:
    """Sums of the units of ``held_out``, all 0."""
    units = unit_of_document.numpy()[held_out.document_of_context]
    most = int(np.bincount(units, held_out.length).max())
    return TemporalSums.zeros(int(unit_of_document.max()) + 1, d_sae, lags, most_tokens=most)


def temporal_sums(
    encoder: Encoder,
    held_out: HeldOut,
    *,
    seed: int,
    lags: tuple[int, ...] = LAGS,
    advance: Advance = untold,
) -> TemporalSums:
    """Sums over all documents of ``held_out``, in this process.

    Parameters
    ----------
    encoder
        what is measured
    held_out
        the documents
    seed
        of the permutations
    lags
        in tokens
    advance
        told of each token that is done, sample included: `n_tokens_read` in all
    """
    parts = parts_of_text(held_out)
    unit_of_document = units_of(held_out, encoder.d_sae, lags)
    thirds, kept = calibrated(encoder, held_out, advance)
    total = nothing_counted(held_out, unit_of_document, encoder.d_sae, lags)
    again = untold if is_short(held_out) else advance
    for number, blocks in enumerate(parts):
        codes = iter(kept[number]) if kept is not None else _advancing(encoder, held_out, blocks, again)
        # before the first part there is nothing that it could be added to
        part = TemporalSums.zeros(total.n_units, encoder.d_sae, lags, total.cells) if number else total
        accumulate(part, codes, thirds, unit_of_document, encoder.block_size, [seed, number])
        if part is not total:
            total.add(part)
    return total


def accumulate(
    sums: TemporalSums,
    codes: Iterable[Codes],
    thirds: Thirds,
    unit_of_document: Int64[Tensor, " document"],
    block_size: int,
    seed: list[int],
) -> None:
    """Add the blocks of one part to ``sums``."""
    accumulator = Accumulator(sums, thirds, unit_of_document, block_size, np.random.default_rng(seed))
    for one in codes:
        accumulator.add(one)
    accumulator.finish()


def calibrated(
    encoder: Encoder, held_out: HeldOut, advance: Advance
) -> tuple[Thirds, list[list[Codes]] | None]:
    """The thirds, and the codes of every part where they were read from the whole text."""
    if is_short(held_out):
        kept: list[list[Codes]] = []
        return thirds_of(_keeping(encoder, held_out, kept, advance), encoder.d_sae), kept or None
    sample = sample_blocks(held_out, SAMPLE_TOKENS)
    return thirds_of(_advancing(encoder, held_out, sample, advance), encoder.d_sae), None


def n_tokens_read(held_out: HeldOut) -> int:
    """Tokens that a pass encodes: those of the text, and those of the sample."""
    if is_short(held_out):
        return held_out.n_tokens
    sample = np.concatenate(sample_blocks(held_out, SAMPLE_TOKENS))
    return held_out.n_tokens + int(held_out.length[sample].sum())


def parts_of_text(held_out: HeldOut) -> list[list[Indices]]:
    """The parts, each as blocks of contexts numbered within the split."""
    documents = held_out.document_of_context
    firsts = np.flatnonzero(np.diff(documents, prepend=-1))
    before = np.r_[0, np.cumsum(held_out.length)]
    parts, start = [], 0
    for stop in [*firsts[1:].tolist(), len(documents)]:
        if before[stop] - before[start] >= PART_TOKENS or stop == len(documents):
            parts.append(_blocks_of_part(start, stop, held_out, before))
            start = stop
    return parts


def codes_of(encoder: Encoder, block: Block) -> Codes:
    """The active entries of a block.

    Raises
    ------
    TrainingCollapsed
        an activation is NaN or infinite
    """
    step = torch.linalg.vector_norm(block.x.diff(dim=0, prepend=block.x[:1]), dim=1)
    codes = Codes.of(
        encoder(block),
        counted=block.kept & (block.position >= SKIPPED_POSITIONS),
        context=block.context,
        document=block.document,
        step=step,
    )
    is_bad = ~torch.isfinite(codes.value)
    if is_bad.any():
        context = int(block.context[codes.row[is_bad][0]])
        raise TrainingCollapsed(
            f"{encoder.name}: {int(is_bad.sum())} of {len(is_bad)} activations of features are NaN or infinite, the "
            f"first in context {context}, where the stored activations are finite; train it again"
        )
    return codes


def _advancing(
    encoder: Encoder, held_out: HeldOut, blocks: Iterable[Indices], advance: Advance
) -> Iterator[Codes]:
    for contexts in blocks:
        one = codes_of(encoder, held_out.block(contexts))
        yield one
        advance(one.n_rows)


def _keeping(
    encoder: Encoder, held_out: HeldOut, kept: list[list[Codes]], advance: Advance
) -> Iterator[Codes]:
    """The codes of the text, which are put into ``kept`` part by part, or not where they are too many."""
    n_kept, is_too_much = 0, False
    for blocks in parts_of_text(held_out):
        kept.append([])
        for one in _advancing(encoder, held_out, blocks, advance):
            n_kept += len(one.value)
            is_too_much = is_too_much or n_kept > MAX_KEPT
            if is_too_much:
                kept.clear()
            else:
                kept[-1].append(one)
            yield one
    if is_too_much:
        kept.clear()


def is_short(held_out: HeldOut) -> bool:
    """Whether the whole text is the sample."""
    return held_out.n_tokens <= 2 * SAMPLE_TOKENS


def sample_blocks(held_out: HeldOut, n_tokens: int) -> list[Indices]:
    """About ``n_tokens`` tokens as blocks of contexts, evenly spaced over the text; all of it where it is shorter."""
    n = len(held_out.length)
    n_drawn = min(n, max(1, round(n * n_tokens / held_out.n_tokens)))
    contexts = np.unique(np.linspace(0, n - 1, n_drawn).round().astype(np.int64))
    ends = np.cumsum(held_out.length[contexts])
    return [piece for piece in _cut(contexts, ends, max(1, round(int(ends[-1]) / BLOCK_ROWS))) if len(piece)]


def _cut(contexts: Indices, ends: np.ndarray, n_pieces: int) -> list[Indices]:
    """``contexts`` in pieces of about equal tokens; pieces may be empty."""
    places = np.searchsorted(ends, np.arange(1, n_pieces) * ends[-1] / n_pieces, side="left") + 1
    return np.split(contexts, np.minimum(places, len(contexts)))


def _blocks_of_part(start: int, stop: int, held_out: HeldOut, before: np.ndarray) -> list[Indices]:
    """Blocks of about `BLOCK_ROWS` tokens of contexts start .. stop - 1, half of each from either half of the part.

    The halves meet between two documents, as near to the middle as there is such a place.
    """
    n_tokens = int(before[stop] - before[start])
    n_blocks = max(1, round(n_tokens / BLOCK_ROWS))
    documents = held_out.document_of_context[start:stop]
    borders = start + np.flatnonzero(np.diff(documents)) + 1
    if not len(borders):
        pieces = _cut(np.arange(start, stop), before[start + 1 : stop + 1] - before[start], n_blocks)
        return [piece for piece in pieces if len(piece)]
    half = int(borders[np.abs(before[borders] - (before[start] + n_tokens / 2)).argmin()])
    halves = [
        _cut(np.arange(a, b), before[a + 1 : b + 1] - before[a], n_blocks)
        for a, b in ((start, half), (half, stop))
    ]
    # a context may be longer than a block; what is left of a half then comes without gaps, see `Accumulator.add`
    pairs = zip_longest(*([piece for piece in half if len(piece)] for half in halves), fillvalue=borders[:0])
    return [np.concatenate(pair) for pair in pairs]
