"""Anchors and their positives: two tokens of one window, hence of one context and one document.

But for the placebo, whose positives are of other documents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int64, Integer

from tcsae.train.config import ArmConfig, Positives


class Pairs(NamedTuple):
    """Indices into the batch."""

    anchor: Int64[np.ndarray, " pair"]
    positive: Int64[np.ndarray, " pair"]


NO_PAIRS = Pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


class AskedPairs(NamedTuple):
    """What decides an arm's pairs; arms that ask for the same get the same."""

    window: int
    """tokens"""
    anchors: int
    """pairs"""
    positives: Positives = "window"


def asked_pairs(config: ArmConfig) -> AskedPairs:
    """The pairs that an arm asks for."""
    return AskedPairs(config.window, config.anchors, config.positives)


def sample_pairs(
    token: Integer[np.ndarray, " token"],
    document: Integer[np.ndarray, " token"],
    eligible: Bool[np.ndarray, " token"],
    asked: AskedPairs,
    stream: np.random.Generator,
) -> Pairs:
    """``asked.anchors`` different anchors and for each a positive, both eligible.

    The kinds of positive:

    - ``window``: drawn uniformly from the rest of the anchor's window, of another token id, since the loss
      takes each as the other's positive.
    - ``previous``: the token before, in the same window (T-SAE, Bhalla et al. 2025).
    - ``earlier``: drawn uniformly from the earlier tokens of the window (T-SAE as released).
    - ``other_document``: the placebo; the anchors that ``window`` would have with the same ``stream``, each
      with a token drawn uniformly from the batch's other documents, of another token id.

    As in T-SAE, ``previous`` and ``earlier`` may pair two tokens of one id. Unlike there, neither token is
    special or at an early position, and earlier means within the window, not the whole context; nothing here
    is padding.

    Fewer pairs come back where fewer tokens have a possible positive.

    Parameters
    ----------
    token
        token ids of a batch whose rows are windows one after the other
    document
        of each token
    eligible
        which may be in a pair: no early position, no special token, no outlier
    asked
        how many pairs, of which kind; its window divides the batch
    stream
        draws them

    In the first window only tokens 5 and 6 can be a pair; in the second all three differ from 7 alone.

    >>> token, document = np.array([5, 5, 6, 7, 7, 7]), np.array([0, 0, 0, 1, 1, 1])
    >>> eligible = np.array([False, True, True, True, True, True])
    >>> pairs = sample_pairs(token, document, eligible, AskedPairs(3, 4), np.random.default_rng(0))
    >>> sorted(zip(pairs.anchor.tolist(), pairs.positive.tolist()))
    [(1, 2), (2, 1)]

    Each token and the one before it, where that is eligible and in the same window:

    >>> asked = AskedPairs(3, 4, "previous")
    >>> pairs = sample_pairs(token, document, eligible, asked, np.random.default_rng(0))
    >>> sorted(zip(pairs.anchor.tolist(), pairs.positive.tolist()))
    [(2, 1), (4, 3), (5, 4)]
    """
    window, n_anchors, positives = asked
    ids = token.reshape(-1, window)
    allowed = eligible.reshape(-1, window)
    # possible[v, i, j]: token j of window v may be the positive of token i.
    possible: npt.NDArray[np.bool_] = allowed[:, :, None] & allowed[:, None, :]
    if positives == "previous":
        possible &= np.eye(window, k=-1, dtype=np.bool_)
    elif positives == "earlier":
        possible &= np.tri(window, k=-1, dtype=np.bool_)
    else:
        possible &= ids[:, :, None] != ids[:, None, :]  # which rules out i == j
    possible = possible.reshape(-1, window)
    able = np.flatnonzero(possible.any(axis=1))
    anchor = stream.permutation(able)[:n_anchors]
    if positives != "other_document":
        return Pairs(anchor, anchor // window * window + _one_of_each(possible[anchor], stream))
    everywhere = np.flatnonzero(eligible)
    possible = (document[everywhere] != document[anchor, None]) & (token[everywhere] != token[anchor, None])
    some = possible.any(axis=1)
    return Pairs(anchor[some], everywhere[_one_of_each(possible[some], stream)])


def _one_of_each(
    possible: Bool[np.ndarray, "row column"], stream: np.random.Generator
) -> Int64[np.ndarray, " row"]:
    """For each row, one of the columns that are true, all with the same probability."""
    keys: npt.NDArray[np.float64] = np.where(possible, stream.random(possible.shape), -1.0)
    column: npt.NDArray[np.int64] = keys.argmax(axis=1)
    return column
