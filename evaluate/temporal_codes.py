"""Feature activations of whole contexts as their active entries, and which of their tokens are paired.

A token counts if it is kept (neither special nor an outlier) and stands at position 8 or later in its context.
For lag d three kinds of pairs are made, each from the pairs (t, t + d) of counted tokens of one context:

observed
    the pair itself
permuted
    the same places after the counted tokens of a document were put in random order: what two tokens of a
    document have in common whatever their distance. A document longer than a block is shuffled within each block
matched
    t, and the token at the place of t + d in a context of another document, if there is one that counts: what two
    tokens have in common because of where they stand. Contexts of a block are matched two by two: those of its
    first half, longest first, with those of its second half, longest first

Each token is the first of at most one pair of a kind and lag, and the second of at most one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

LAGS = (1, 2, 4, 8, 16, 32)
"""In tokens."""

SKIPPED_POSITIONS = 8
"""First tokens of each context that do not count: their activations depend on the position itself."""

KINDS = ("observed", "permuted", "matched")


class Codes(NamedTuple):
    """Feature activations of some whole contexts, those of a document next to each other."""

    row: Int64[Tensor, " entry"]
    """token of each activation that is not 0, ascending"""
    feature: Int64[Tensor, " entry"]
    """its feature"""
    value: Float[Tensor, " entry"]
    """the activation, above 0"""
    d_sae: int
    """features in all"""
    counted: Bool[Tensor, " row"]
    """tokens that count, see the module"""
    context: Int64[Tensor, " row"]
    """a number that is the same within a context and differs between neighbouring ones"""
    document: Int64[Tensor, " row"]
    """number of the document"""
    step: Float[Tensor, " row"]
    """||x_t - x_{t-1}||, distance to the row before, whatever context that is in; 0 where unknown"""

    @classmethod
    def of(
        cls,
        f: Float[Tensor, "row feature"],
        *,
        counted: Bool[Tensor, " row"],
        context: Int64[Tensor, " row"],
        document: Int64[Tensor, " row"],
        step: Float[Tensor, " row"] | None = None,
    ) -> Codes:
        """From activations of every feature.

        >>> one = torch.tensor([0, 0])
        >>> Codes.of(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), counted=one == 0, context=one, document=one).value
        tensor([2., 3.])
        """
        row, feature = f.nonzero(as_tuple=True)
        value = f.reshape(-1).index_select(0, row * f.shape[1] + feature).float()
        unknown = torch.zeros(len(f)) if step is None else step
        return cls(row.cpu(), feature.cpu(), value.cpu(), f.shape[1], counted, context, document, unknown)

    @property
    def n_rows(self) -> int:
        """tokens"""
        return len(self.counted)

    def dense(self) -> Float[Tensor, "row feature"]:
        """Activations of every feature."""
        f = torch.zeros(self.n_rows, self.d_sae, dtype=self.value.dtype)
        f[self.row, self.feature] = self.value
        return f


class Pairing(NamedTuple):
    """Who is paired with whom; a token without partner has `Codes.n_rows` for one."""

    second: Int64[Tensor, " row"]
    """partner of each token as the first of a pair"""
    first: Int64[Tensor, " row"]
    """partner of each token as the second of a pair"""

    @classmethod
    def of(cls, n_rows: int, first: np.ndarray, second: np.ndarray) -> Pairing:
        """From the rows of both ends, none twice.

        >>> Pairing.of(3, np.array([0]), np.array([2])).second.tolist()
        [2, 3, 3]
        """
        partners = np.full((2, n_rows), n_rows)
        partners[0, first], partners[1, second] = second, first
        return cls(torch.from_numpy(partners[0]), torch.from_numpy(partners[1]))


def neighbours(codes: Codes) -> Pairing:
    """Each counted token with the next one of its context, if that counts."""
    rows = pairs_at(codes.counted.numpy(), codes.context.numpy(), 1)
    return Pairing.of(codes.n_rows, rows, rows + 1)


def pairings(
    codes: Codes, lags: tuple[int, ...], stream: np.random.Generator
) -> Iterator[tuple[int, int, Pairing]]:
    """Number of the kind, number of the lag and pairs, for each; ``stream`` draws the permutation."""
    counted, context, document = (part.numpy() for part in (codes.counted, codes.context, codes.document))
    n = len(counted)
    shuffled = np.arange(n)
    shuffled[counted] = _shuffled_within(document, np.flatnonzero(counted), stream)
    starts = np.flatnonzero(np.r_[True, context[1:] != context[:-1]])
    lengths = np.diff(np.r_[starts, n])
    match = _match(document[starts], lengths)
    which = np.repeat(np.arange(len(starts)), lengths)
    place = np.arange(n) - starts[which]
    for at, lag in enumerate(lags):
        rows = pairs_at(counted, context, lag)
        yield 0, at, Pairing.of(n, rows, rows + lag)
        yield 1, at, Pairing.of(n, shuffled[rows], shuffled[rows + lag])
        other = match[which[rows]]
        there = place[rows] + lag
        fits = (other >= 0) & (there < lengths[other])
        first, second = rows[fits], starts[other[fits]] + there[fits]
        good = counted[second]
        yield 2, at, Pairing.of(n, first[good], second[good])


def pairs_at(counted: np.ndarray, context: np.ndarray, lag: int) -> np.ndarray:
    """First tokens of the pairs at ``lag``."""
    n = len(counted) - lag
    if n <= 0:
        return np.arange(0)
    found: np.ndarray = np.flatnonzero(counted[:n] & counted[lag:] & (context[:n] == context[lag:]))
    return found


def _shuffled_within(document: np.ndarray, rows: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """``rows``, ascending, with each run of one document in random order."""
    run = np.cumsum(np.r_[0, document[rows][1:] != document[rows][:-1]]) if len(rows) else rows
    shuffled: np.ndarray = rows[np.lexsort((stream.random(len(rows)), run))]
    return shuffled


def _match(document: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Partner of each context, -1 where it has none.

    >>> _match(np.array([5, 5, 6, 7]), np.array([9, 3, 2, 9])).tolist()
    [3, 2, 1, 0]
    """
    half = len(document) // 2
    match = np.full(len(document), -1)
    first = np.argsort(-lengths[:half], kind="stable")
    second = half + np.argsort(-lengths[half:], kind="stable")[:half]
    apart = document[first] != document[second]
    match[first[apart]], match[second[apart]] = second[apart], first[apart]
    return match
