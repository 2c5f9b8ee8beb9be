"""Normalised mutual information of a feature with itself some tokens later, beyond what two nulls explain.

A feature's value becomes one of four states b: off, or the lower, middle or upper third of its positive values.
For lag d, over pairs of tokens (t, t + d) of one context:

    NMI(d) = I(b_t; b_{t+d}) / H(b),    excess(d) = NMI(d) - NMI_permuted(d) - NMI_matched(d)

with H the mean of both ends' entropies, all of them Miller-Madow corrected (each entropy plus
(occupied cells - 1) / 2n). The nulls are computed by the same formula from the permuted and the matched pairs of
`tcsae.evaluate.temporal_codes`. For a sequence without memory all three are 0 but for noise, hence the excess too
(METHOD.md, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tcsae.evaluate.intervals import Array
from tcsae.evaluate.temporal_codes import Codes

STATES = 4
CELLS = STATES * STATES

BINS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES = 16, -24, 48
"""of the histogram that the thirds are read from: values are told apart to 4 %"""


class Thirds(NamedTuple):
    """Bounds between the lower, middle and upper third of each feature's positive values."""

    lower: Float[Tensor, " feature"]
    upper: Float[Tensor, " feature"]

    def states(
        self, value: Float[Tensor, " entry"], feature: Int64[Tensor, " entry"]
    ) -> Int64[Tensor, " entry"]:
        """1 to 3: which third.

        >>> one = Thirds(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> one.states(torch.tensor([1.0, 1.5, 9.0]), torch.tensor([0, 0, 0]))
        tensor([1, 2, 3])
        """
        return (
            1
            + (value > self.lower.index_select(0, feature)).long()
            + (value > self.upper.index_select(0, feature))
        )


def thirds_of(codes: Iterable[Codes], d_sae: int) -> Thirds:
    """From all counted tokens of ``codes``, in one pass, to the resolution of a logarithmic histogram.

    A feature that does not fire in them has infinite bounds: all its values are in the lower third.
    """
    n_bins = BINS_PER_OCTAVE * OCTAVES
    counts = torch.zeros(d_sae * n_bins, dtype=torch.int64)
    for one in codes:
        kept = one.counted.index_select(0, one.row)
        octave = one.value[kept].log2() - LOWEST_OCTAVE
        place = (octave * BINS_PER_OCTAVE).long().clamp_(0, n_bins - 1)
        counts.scatter_add_(0, one.feature[kept] * n_bins + place, torch.ones_like(place))
    shares = counts.view(d_sae, n_bins).cumsum(dim=1)
    total = shares[:, -1:]
    edges = torch.arange(1, n_bins + 1) / BINS_PER_OCTAVE + LOWEST_OCTAVE
    lower, upper = (
        torch.exp2(edges[(shares * 3 < total * third).sum(dim=1)]).where(total[:, 0] > 0, torch.inf)
        for third in (1, 2)
    )
    return Thirds(lower, upper)


def normalised_information(joint: Float[np.ndarray, "first second *any"]) -> Array:
    """I / H from joint counts, Miller-Madow corrected; NaN where nothing varies.

    A state that decides the next one (here two, each followed by the other, 50 times) gives 1. Independent
    ones give 0, or a little below, since the correction takes their expected bias away:

    >>> float(normalised_information(np.array([[0.0, 50.0], [50.0, 0.0]])).round(3))
    1.0
    >>> float(normalised_information(np.array([[25.0, 25.0], [25.0, 25.0]])).round(3))
    -0.007
    """
    ends = joint.sum(axis=1), joint.sum(axis=0)
    n: Array = np.asarray(ends[0].sum(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (_entropy(end, n) for end in ends)
        both = _entropy(joint.reshape(-1, *joint.shape[2:]), n)
        mean = (first + second) / 2
        return np.where(mean > 0, (first + second - both) / mean, np.nan)


def _entropy(counts: Float[np.ndarray, " state *any"], n: Float[np.ndarray, "*any"]) -> Array:
    """log n - sum of c log c / n, in nats, Miller-Madow corrected; 0 where one state is occupied."""
    total, n_occupied = np.zeros(n.shape), np.zeros(n.shape)
    for count in counts:
        # A count is at least 1 or it is 0, which adds nothing. Not by torch: the caller has threads of its own, and
        # each would get more of torch's.
        term = np.asarray(np.maximum(count, 1.0))
        np.log(term, out=term)
        term *= count
        total += term
        n_occupied += count > 0
    found = np.log(n) - total / n + (n_occupied - 1) / (2 * n)
    return np.where(n_occupied == 1, 0.0, found)  # rounding would leave a little of it
