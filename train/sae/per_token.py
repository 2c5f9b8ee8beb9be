"""TopK by threshold: the k largest entries of a block of each token, without sorting all of them.

Legend: B tokens, C candidates of the token that has most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tcsae.train.sae.select import Block


class SelectedOfEach(NamedTuple):
    """The entries that TopK keeps, in order of token, then feature."""

    token: Int64[Tensor, " active"]
    feature: Int64[Tensor, " active"]
    values: Float[Tensor, " active"]
    """all above 0"""
    thresholds: tuple[Float[Tensor, " token"], ...]
    """for each block the smallest kept entry of each token; 0 where all positive ones are kept"""


def keep_largest_of_each(
    pre: Float[Tensor, "token feature"], blocks: tuple[Block, ...], guess: tuple[float, ...]
) -> SelectedOfEach:
    """In each block of each token the ``k`` largest positive entries of ``pre`` (all, if there are fewer).

    Entries that equal the smallest kept one are kept too.

    Parameters
    ----------
    pre
        pre-activations
    blocks
        disjoint, together all features, in order
    guess
        a bound for each block that most tokens' thresholds exceed, ≥ 0. Entries above it are candidates and
        only they are ranked; of a token with too few, all entries are. The result does not depend on it.

    >>> pre = torch.tensor([[3.0, -1.0, 0.5, 2.0], [2.0, 1.0, 4.0, 5.0]])
    >>> kept = keep_largest_of_each(pre, (Block(0, 1, 1), Block(1, 4, 2)), (2.5, 0.9))
    >>> kept.token.tolist(), kept.feature.tolist(), kept.values.tolist()
    ([0, 0, 0, 1, 1, 1], [0, 2, 3, 0, 2, 3], [3.0, 0.5, 2.0, 2.0, 4.0, 5.0])
    >>> [bounds.tolist() for bounds in kept.thresholds]
    [[3.0, 2.0], [0.5, 4.0]]
    """
    found = [_of_block(pre, block, low) for block, low in zip(blocks, guess, strict=True)]
    token = torch.cat([part.token for part in found])
    feature = torch.cat([part.feature for part in found])
    # Each block's are in order of token but for those of the tokens that had too few candidates.
    order = (token * pre.shape[1] + feature).argsort()
    values = torch.cat([part.values for part in found])
    thresholds = tuple(part.thresholds[0] for part in found)
    return SelectedOfEach(token[order], feature[order], values[order], thresholds)


def _of_block(pre: Tensor, block: Block, low: float) -> SelectedOfEach:
    part = pre[:, block.start : block.stop]
    token, feature = (part > low).nonzero(as_tuple=True)
    values = part[token, feature]
    counts = torch.bincount(token, minlength=len(pre))
    # The candidates of each token from the left of its row: for counts [2, 1] the places are 0, 1, 0.
    place = torch.arange(len(token), device=token.device) - (counts.cumsum(0) - counts)[token]
    width = max(int(counts.max()), block.k)
    rows = part.new_zeros(len(pre), width).index_put_((token, place), values)
    bounds = rows.topk(block.k, dim=1, sorted=False).values.amin(dim=1)
    few = (counts < block.k).nonzero().flatten()
    if low > 0 and len(few):
        rest = part[few]
        bounds[few] = rest.topk(block.k, dim=1, sorted=False).values.amin(dim=1).relu()
        row, column = ((rest >= bounds[few, None]) & (rest > 0)).nonzero(as_tuple=True)
        enough = (counts >= block.k)[token]
        token = torch.cat([token[enough], few[row]])
        feature = torch.cat([feature[enough], column])
        values = torch.cat([values[enough], rest[row, column]])
    kept = values >= bounds[token]
    return SelectedOfEach(token[kept], feature[kept] + block.start, values[kept], (bounds,))
