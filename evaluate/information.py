"""Normalised mutual information of a feature with itself some tokens later, beyond what two nulls explain.

A feature's value becomes one of four states b: off, or the lower, middle or upper third of its positive
values. For lag d, over pairs of counted tokens (t, t + d) of one context (as in
`tcsae.evaluate.autocorrelation`):

    NMI(d) = I(b_t; b_{t+d}) / H(b),    excess(d) = NMI(d) - NMI_permuted(d) - NMI_matched(d)

with H the mean of both ends' entropies, all of them Miller-Madow corrected (each entropy plus
(occupied cells - 1) / 2n). The nulls are computed by the same formula from as many pairs as there are:

permuted
    the counted tokens of a document in random order: what remains is that they share the document
matched
    the second token comes from the same position of a context of another document: what remains is that
    both depend on the position

For a sequence without memory all three are 0 but for noise, hence the excess too (METHOD.md, section 5).

Legend: U units, F features. Only active entries are touched, so cost grows with L0, not with F.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor

from tcsae.evaluate.autocorrelation import LAGS, Codes
from tcsae.evaluate.intervals import Array

KINDS = ("observed", "permuted", "matched")

STATES = 4
CELLS = STATES * STATES

BINS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES = 16, -24, 48
"""of the histogram that the thirds are read from: values are told apart to 4 %"""


class Thirds(NamedTuple):
    """Bounds between the lower, middle and upper third of each feature's positive values."""

    lower: Float[Tensor, " feature"]
    upper: Float[Tensor, " feature"]

    def states(self, f: Float[Tensor, "row feature"]) -> UInt8[Tensor, "row feature"]:
        """0: off, 1 to 3: which third.

        >>> Thirds(torch.tensor([1.0]), torch.tensor([2.0])).states(torch.tensor([[0.0], [1.0], [1.5], [9.0]])).T
        tensor([[0, 1, 2, 3]], dtype=torch.uint8)
        """
        return (f > 0).to(torch.uint8) + ((f > 0) & (f > self.lower)) + ((f > 0) & (f > self.upper))


def thirds_of(codes: Iterable[Codes], d_sae: int) -> Thirds:
    """From all counted tokens of ``codes``, in one pass, to the resolution of a logarithmic histogram."""
    n_bins = BINS_PER_OCTAVE * OCTAVES
    counts = torch.zeros(d_sae * n_bins, dtype=torch.int64)
    for one in codes:
        row, feature = (one.f > 0).logical_and_(one.counted[:, None].to(one.f.device)).nonzero(as_tuple=True)
        octave = one.f[row, feature].log2() - LOWEST_OCTAVE
        place = (octave * BINS_PER_OCTAVE).long().clamp_(0, n_bins - 1)
        counts += torch.bincount((feature * n_bins + place).cpu(), minlength=len(counts))
    shares = counts.view(d_sae, n_bins).cumsum(dim=1)
    total = shares[:, -1:]
    edges = torch.arange(1, n_bins + 1) / BINS_PER_OCTAVE + LOWEST_OCTAVE
    lower, upper = (torch.exp2(edges[(shares * 3 < total * third).sum(dim=1)]) for third in (1, 2))
    return Thirds(lower, upper)


@dataclass(frozen=True, slots=True)
class InformationSums:
    """Joint counts of states, from which every figure of a resample follows."""

    lags: tuple[int, ...]
    n: Int64[np.ndarray, "kind lag unit"]
    """pairs, kinds as in `KINDS`"""
    cells: Int32[np.ndarray, "kind lag unit feature cell"]
    """pairs by 4 x first state + second state; that of off and off is left 0, it follows from ``n``"""


def bytes_per_unit(d_sae: int, n_lags: int = len(LAGS)) -> int:
    """Memory that one more unit costs."""
    return 4 * len(KINDS) * n_lags * d_sae * CELLS


def information_sums(
    codes: Iterable[Codes],
    thirds: Thirds,
    n_units: int,
    d_sae: int,
    *,
    lags: tuple[int, ...] = LAGS,
    seed: int = 0,
) -> InformationSums:
    """Count all pairs of ``codes``, whose blocks hold whole contexts, in one pass.

    A document is a run of rows of one unit; the nulls look no further than a block, and where a block holds
    one document there are no matched pairs in it. ``seed`` draws the permutations and the matches.
    """
    stream = np.random.default_rng(seed)
    n = np.zeros((len(KINDS), len(lags), n_units), dtype=np.int64)
    cells = np.zeros((len(KINDS), len(lags), n_units, d_sae, CELLS), dtype=np.int32)
    for one in codes:
        states = _Sparse.of(thirds.states(one.f.cpu()))
        # Only the few units of the block: to add a table of all of them costs more than to count.
        present, place = np.unique(one.unit.numpy(), return_inverse=True)
        for at, lag in enumerate(lags):
            for kind, (first, second) in enumerate(_pairs(one, lag, stream)):
                n[kind, at, present] += np.bincount(place[first], minlength=len(present))
                cells[kind, at, present] += states.joint(first, second, place, len(present))
    return InformationSums(tuple(lags), n, cells)


def information(
    sums: InformationSums, weights: Float[np.ndarray, "*resample unit"], features: slice
) -> Array:
    """NMI of every kind and lag of some features on weighted units: [kind, lag, ..., feature].

    NaN where a feature is always in one state or there is no pair.
    """
    found = []
    for kind in range(len(KINDS)):
        for at in range(len(sums.lags)):
            part = sums.cells[kind, at, :, features]
            joint = weights @ part.reshape(len(part), -1).astype(np.float64)
            n = weights @ sums.n[kind, at].astype(np.float64)
            joint = joint.reshape(*joint.shape[:-1], part.shape[1], STATES, STATES)
            joint[..., 0, 0] = n[..., None] - joint.sum(axis=(-2, -1))
            found.append(normalised_information(joint))
    shape = (len(KINDS), len(sums.lags), *found[0].shape)
    return np.stack(found).reshape(shape)


def excess(nmi: Array) -> Array:
    """Observed minus both nulls, of what `information` returned: [lag, ..., feature]."""
    difference: Array = nmi[0] - nmi[1] - nmi[2]
    return difference


def normalised_information(joint: Float[np.ndarray, "*any first second"]) -> Array:
    """I / H from joint counts, Miller-Madow corrected; NaN where nothing varies.

    A state that decides the next one (here two, each followed by the other, 50 times) gives 1. Independent
    ones give 0, or a little below, since the correction takes their expected bias away:

    >>> float(normalised_information(np.array([[0.0, 50.0], [50.0, 0.0]])).round(3))
    1.0
    >>> float(normalised_information(np.array([[25.0, 25.0], [25.0, 25.0]])).round(3))
    -0.007
    """
    n: Array = np.asarray(joint.sum(axis=(-2, -1)))
    ends = [joint.sum(axis=-1), joint.sum(axis=-2)]
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (_entropy(end, n) for end in ends)
        both = _entropy(joint.reshape(*joint.shape[:-2], -1), n)
        mean = (first + second) / 2
        return np.where(mean > 0, (first + second - both) / mean, np.nan)


def _entropy(counts: Float[np.ndarray, "*any state"], n: Float[np.ndarray, "*any"]) -> Array:
    """In nats, Miller-Madow corrected; 0 where one state is occupied."""
    p = counts / n[..., None]
    plain = -np.where(counts > 0, p * np.log(np.where(counts > 0, p, 1.0)), 0.0).sum(axis=-1)
    return np.asarray(plain + ((counts > 0).sum(axis=-1) - 1) / (2 * n))


def _pairs(one: Codes, lag: int, stream: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """First and second rows of the pairs of each kind."""
    counted, context, unit = one.counted.numpy(), one.context.numpy(), one.unit.numpy()
    n = len(counted)
    rows = np.arange(n - lag) if lag < n else np.arange(0)
    rows = rows[counted[rows] & counted[rows + lag] & (context[rows] == context[rows + lag])]
    yield rows, rows + lag

    shuffled = np.arange(n)
    shuffled[counted] = _shuffled_within(unit, np.flatnonzero(counted), stream)
    yield shuffled[rows], shuffled[rows + lag]

    starts = np.flatnonzero(np.r_[True, context[1:] != context[:-1]])
    which = np.searchsorted(starts, rows, side="right") - 1
    other = stream.random((len(starts), len(starts)))
    other[unit[starts][:, None] == unit[starts][None, :]] = -1.0
    match = np.where((other >= 0).any(axis=1), other.argmax(axis=1), -1)[which]
    lengths = np.diff(np.r_[starts, n])
    offset = rows - starts[which] + lag
    fits = (match >= 0) & (offset < lengths[match])
    first, second = rows[fits], (starts[match] + offset)[fits]
    good = counted[second]
    yield first[good], second[good]


def _shuffled_within(unit: np.ndarray, rows: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """``rows``, ascending, with each run of one unit in random order."""
    run = np.cumsum(np.r_[0, unit[rows][1:] != unit[rows][:-1]]) if len(rows) else rows
    shuffled: np.ndarray = rows[np.lexsort((stream.random(len(rows)), run))]
    return shuffled


class _Sparse(NamedTuple):
    """States of a block with the places where they are not off, by row."""

    dense: Tensor
    feature: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, states: UInt8[Tensor, "row feature"]) -> _Sparse:
        row, feature = states.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(states))
        return cls(states, feature, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def joint(self, first: np.ndarray, second: np.ndarray, unit: np.ndarray, n_units: int) -> np.ndarray:
        """Counts by unit of ``first``, feature and cell, off with off left out: [unit, feature, cell]."""
        a, b, of_unit = torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(unit[first])
        pair, feature = self._entries(a)
        here, there = self.dense[a[pair], feature], self.dense[b[pair], feature]
        places = [(of_unit[pair], feature, here.long() * STATES + there)]
        pair, feature = self._entries(b)
        alone = self.dense[a[pair], feature] == 0
        pair, feature = pair[alone], feature[alone]
        places.append((of_unit[pair], feature, self.dense[b[pair], feature].long()))
        d_sae = self.dense.shape[1]
        at = torch.cat([(u * d_sae + f) * CELLS + cell for u, f, cell in places])
        return torch.bincount(at, minlength=n_units * d_sae * CELLS).view(n_units, d_sae, CELLS).int().numpy()

    def _entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For each entry of ``rows`` that is not off: which of ``rows``, and its feature."""
        counts = self.offsets.diff()[rows]
        which = torch.repeat_interleave(torch.arange(len(rows)), counts)
        within = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
        return which, self.feature[self.offsets[rows][which] + within]
