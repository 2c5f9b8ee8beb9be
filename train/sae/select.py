"""BatchTopK by threshold: the n largest entries of a block of a batch, without sorting the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tcsae.train.world import ALONE, World

PIECE = 2**19
"""entries compared at once on the CPU: a piece and what becomes of it stay in the cache"""

SAMPLED = 16
"""one token in so many tells where the threshold is when the guess does not"""

MARGIN = 0.85
"""share of the sample's threshold that the whole batch's is probably above"""


class Block(NamedTuple):
    """Features ``start`` to ``stop`` (exclusive), of which ``k`` per token are kept on average."""

    start: int
    stop: int
    k: int


class Selected(NamedTuple):
    """The entries that BatchTopK keeps, in order of token, then feature."""

    token: Int64[Tensor, " active"]
    feature: Int64[Tensor, " active"]
    values: Float[Tensor, " active"]
    """all above 0"""
    thresholds: tuple[float, ...]
    """smallest kept entry of each block; 0 where all positive ones are kept"""


def keep_largest(
    pre: Float[Tensor, "token feature"],
    blocks: tuple[Block, ...],
    n_tokens: int,
    guess: tuple[float, ...],
    world: World = ALONE,
) -> Selected:
    """In each block the ``k * n_tokens`` largest positive entries of ``pre`` (all, if there are fewer).

    Entries that equal the smallest kept one are kept too.

    Parameters
    ----------
    pre
        pre-activations
    blocks
        disjoint, together all features, in order
    n_tokens
        tokens that count, for the budget
    guess
        a bound for each block that the answer's threshold probably exceeds, ≥ 0. Entries above it are
        candidates and only they are ranked; where they are too few, those above a bound that a sample of the
        tokens suggests are, and in the end all positive ones, half of a batch. The result does not depend on it.
    world
        where it has several processes, ``pre`` and ``n_tokens`` are of one slice of a batch; the budget and
        the thresholds are those of the whole batch, the entries returned those of the slice

    >>> pre = torch.tensor([[3.0, -1.0, 0.5], [2.0, 1.0, 4.0]])
    >>> kept = keep_largest(pre, (Block(0, 1, 1), Block(1, 3, 1)), 2, (2.5, 0.0))
    >>> kept.token.tolist(), kept.feature.tolist(), kept.values.tolist(), kept.thresholds
    ([0, 1, 1, 1], [0, 0, 1, 2], [3.0, 2.0, 1.0, 4.0], (2.0, 1.0))
    """
    n_tokens = int(world.totals(n_tokens)[0])
    for low in _lower_and_lower(pre, blocks, n_tokens, guess, world):
        entry, values = _above(pre, blocks, low)
        bounds, enough = _thresholds(entry % pre.shape[1], values, blocks, n_tokens, world)
        if enough:
            break
    bound = _per_feature(bounds, blocks, values).index_select(0, entry % pre.shape[1])
    kept = (values >= bound).nonzero().flatten()
    entry = entry.index_select(0, kept)
    return Selected(entry // pre.shape[1], entry % pre.shape[1], values.index_select(0, kept), bounds)


def _lower_and_lower(
    pre: Tensor, blocks: tuple[Block, ...], n_tokens: int, guess: tuple[float, ...], world: World
) -> Iterator[tuple[float, ...]]:
    """Bounds for candidates, the same on every rank: the guess, what a sample suggests, 0."""
    none = (0.0,) * len(blocks)
    if any(guess):
        yield guess
    entry, values = _above(pre[::SAMPLED], blocks, none)
    sampled, _ = _thresholds(entry % pre.shape[1], values, blocks, max(n_tokens // SAMPLED, 1), world)
    if any(sampled):
        yield tuple(MARGIN * bound for bound in sampled)
    yield none


def _above(pre: Tensor, blocks: tuple[Block, ...], low: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Entries strictly above their block's bound: ascending indices into ``pre`` flattened, and values."""
    bound = _per_feature(low, blocks, pre)
    entry = _above_on_cpu(pre, bound) if pre.device.type == "cpu" else (pre > bound).flatten().nonzero()
    entry = entry.flatten()
    return entry, pre.flatten().index_select(0, entry)


def _above_on_cpu(pre: Tensor, bound: Tensor) -> Tensor:
    """Indices of the entries above their column's bound, of ``pre`` flattened.

    Per entry, on one core and out of memory: 3 ns for the plain ``(pre > bound).nonzero()`` of a whole batch,
    1 ns in this way. torch compares into float at the speed of memory but into bool at half of it, its
    nonzero takes three times NumPy's, and a mask of the batch would be new memory at every step.
    """
    n_rows, n_columns = pre.shape
    rows = max(1, min(n_rows, PIECE // n_columns))
    larger, mask = pre.new_empty(rows, n_columns), pre.new_empty(rows, n_columns, dtype=torch.bool)
    found = []
    for start in range(0, n_rows, rows):
        piece = pre[start : start + rows]
        here = mask[: len(piece)].copy_(torch.gt(piece, bound, out=larger[: len(piece)]))
        found.append(np.flatnonzero(here.numpy()) + start * n_columns)
    return torch.from_numpy(np.concatenate(found))


def _thresholds(
    feature: Tensor, values: Tensor, blocks: tuple[Block, ...], n_tokens: int, world: World
) -> tuple[tuple[float, ...], bool]:
    """Each block's smallest kept value, and whether every block had as many candidates as its budget."""
    bounds, enough = [], True
    for block in blocks:
        inside = (feature >= block.start) & (feature < block.stop)
        candidates = world.gather(values[inside] if len(blocks) > 1 else values)
        budget = block.k * n_tokens
        if len(candidates) < max(budget, 1):
            enough = False
            bounds.append(0.0)
        else:
            bounds.append(candidates.topk(budget, sorted=False).values.min().item())
    return tuple(bounds), enough


def _per_feature(bounds: tuple[float, ...], blocks: tuple[Block, ...], like: Tensor) -> Tensor:
    return torch.cat(
        [like.new_full((b.stop - b.start,), bound) for b, bound in zip(blocks, bounds, strict=True)]
    )
