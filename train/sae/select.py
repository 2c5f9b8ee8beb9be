"""BatchTopK by threshold: the n largest entries of a block of a batch, without sorting the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


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
        candidates and only they are ranked; where they are too few, all positive entries are. The result
        does not depend on it.

    >>> pre = torch.tensor([[3.0, -1.0, 0.5], [2.0, 1.0, 4.0]])
    >>> kept = keep_largest(pre, (Block(0, 1, 1), Block(1, 3, 1)), 2, (2.5, 0.0))
    >>> kept.token.tolist(), kept.feature.tolist(), kept.values.tolist(), kept.thresholds
    ([0, 1, 1, 1], [0, 0, 1, 2], [3.0, 2.0, 1.0, 4.0], (2.0, 1.0))
    """
    token, feature, values = _above(pre, blocks, guess)
    bounds, enough = _thresholds(feature, values, blocks, n_tokens)
    if not enough and any(guess):
        token, feature, values = _above(pre, blocks, (0.0,) * len(blocks))
        bounds, _ = _thresholds(feature, values, blocks, n_tokens)
    kept = values >= _per_feature(bounds, blocks, values)[feature]
    return Selected(token[kept], feature[kept], values[kept], bounds)


def _above(pre: Tensor, blocks: tuple[Block, ...], low: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Entries strictly above their block's bound: tokens, features, values."""
    token, feature = (pre > _per_feature(low, blocks, pre)).nonzero(as_tuple=True)
    return token, feature, pre[token, feature]


def _thresholds(
    feature: Tensor, values: Tensor, blocks: tuple[Block, ...], n_tokens: int
) -> tuple[tuple[float, ...], bool]:
    """Each block's smallest kept value, and whether every block had as many candidates as its budget."""
    bounds, enough = [], True
    for block in blocks:
        inside: Bool[Tensor, " active"] = (feature >= block.start) & (feature < block.stop)
        candidates = values[inside] if len(blocks) > 1 else values
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
