"""Anchors and their positives: two tokens of one window, hence of one context and one document."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int64, Integer


class Pairs(NamedTuple):
    """Indices into the batch."""

    anchor: Int64[np.ndarray, " pair"]
    positive: Int64[np.ndarray, " pair"]


def sample_pairs(
    token: Integer[np.ndarray, " token"],
    eligible: Bool[np.ndarray, " token"],
    window: int,
    n_anchors: int,
    stream: np.random.Generator,
) -> Pairs:
    """``n_anchors`` different anchors and for each a positive drawn uniformly from the rest of its window.

    Both are eligible and differ in token id, since the loss takes each as the other's positive. Fewer pairs
    come back where fewer tokens have a possible positive.

    Parameters
    ----------
    token
        token ids of a batch whose rows are windows one after the other
    eligible
        which may be in a pair: no early position, no special token, no outlier
    window
        tokens of a window; divides the batch
    n_anchors
        pairs asked for
    stream
        draws them

    In the first window only tokens 5 and 6 can be a pair; in the second all three differ from 7 alone.

    >>> token = np.array([5, 5, 6, 7, 7, 7])
    >>> eligible = np.array([False, True, True, True, True, True])
    >>> pairs = sample_pairs(token, eligible, 3, 4, np.random.default_rng(0))
    >>> sorted(zip(pairs.anchor.tolist(), pairs.positive.tolist()))
    [(1, 2), (2, 1)]
    """
    ids = token.reshape(-1, window)
    allowed = eligible.reshape(-1, window)
    # possible[v, i, j]: token j of window v may be the positive of token i; that ids differ rules out i == j.
    possible: npt.NDArray[np.bool_] = (
        (ids[:, :, None] != ids[:, None, :]) & allowed[:, :, None] & allowed[:, None, :]
    )
    possible = possible.reshape(-1, window)
    able = np.flatnonzero(possible.any(axis=1))
    anchor = stream.permutation(able)[:n_anchors]
    keys = np.where(possible[anchor], stream.random((len(anchor), window)), -1.0)
    positive = anchor // window * window + keys.argmax(axis=1)
    return Pairs(anchor, positive)
