"""A batch's code, sparse or dense: what the losses, the counters and the log ask of it.

Legend: B tokens, F features, N active entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.train.sae.sparse import Active

Sizes = Float[Tensor, " feature"] | None
"""a factor for each feature, such as `tcsae.train.sae.base.TrainableSAE.sizes`; None: 1"""


@runtime_checkable
class Code(Protocol):
    """Feature activations of a batch, ≥ 0, with gradient, in normalised units."""

    def count(self, start: int, stop: int) -> int:
        """Active entries of features ``start`` to ``stop`` (exclusive)."""

    def energy(self, start: int, stop: int, size: Sizes = None) -> float:
        """Sum of those features' squares, each entry times its feature's ``size``."""

    def total(self, size: Sizes = None) -> float:
        """Sum of all entries, each times its feature's ``size``: the L1 norm."""

    def fired(self) -> Bool[Tensor, " feature"]:
        """Which features are active for some token."""

    def rows(self, tokens: Int64[Tensor, " row"], stop: int) -> Float[Tensor, "row block"]:
        """The first ``stop`` features of some tokens as a dense matrix, with gradient."""


@dataclass(frozen=True, slots=True)
class SparseCode:
    """The active entries alone."""

    values: Float[Tensor, " active"]
    active: Active
    """where they are"""

    def _inside(self, start: int, stop: int) -> Tensor:
        return (self.active.feature >= start) & (self.active.feature < stop)

    def count(self, start: int, stop: int) -> int:
        """Active entries of features ``start`` to ``stop`` (exclusive)."""
        return int(self._inside(start, stop).sum())

    def _sized(self, size: Sizes) -> Tensor:
        values = self.values.detach()
        return values if size is None else values * size[self.active.feature]

    def energy(self, start: int, stop: int, size: Sizes = None) -> float:
        """Sum of those features' squares, each entry times its feature's ``size``."""
        return float(self._sized(size)[self._inside(start, stop)].double().square().sum())

    def total(self, size: Sizes = None) -> float:
        """Sum of all entries, each times its feature's ``size``."""
        return float(self._sized(size).double().sum())

    def fired(self) -> Bool[Tensor, " feature"]:
        """Which features are active for some token."""
        return self.active.feature_offsets.diff() > 0

    def rows(self, tokens: Int64[Tensor, " row"], stop: int) -> Float[Tensor, "row block"]:
        """The first ``stop`` features of some tokens as a dense matrix, with gradient.

        >>> from tcsae.train.sae.sparse import active_entries
        >>> active = active_entries(torch.tensor([0, 0, 2]), torch.tensor([0, 3, 1]), 3, 4)
        >>> SparseCode(torch.tensor([5.0, 6.0, 7.0]), active).rows(torch.tensor([2, 0, 1, 2]), 2).tolist()
        [[0.0, 7.0], [5.0, 0.0], [0.0, 0.0], [0.0, 7.0]]
        """
        first, counts = self.active.token_offsets[tokens], self.active.token_offsets.diff()[tokens]
        row = torch.repeat_interleave(torch.arange(len(tokens), device=tokens.device), counts)
        within = torch.arange(len(row), device=tokens.device) - (counts.cumsum(0) - counts)[row]
        entry = first[row] + within
        feature = self.active.feature[entry]
        keep = feature < stop
        dense = self.values.new_zeros(len(tokens), stop)
        return dense.index_put((row[keep], feature[keep]), self.values[entry[keep]])


@dataclass(frozen=True, slots=True)
class DenseCode:
    """Every entry, zeros included."""

    values: Float[Tensor, "token feature"]

    def count(self, start: int, stop: int) -> int:
        """Active entries of features ``start`` to ``stop`` (exclusive)."""
        return int((self.values.detach()[:, start:stop] > 0).sum())

    def _sized(self, size: Sizes) -> Tensor:
        values = self.values.detach()
        return values if size is None else values * size

    def energy(self, start: int, stop: int, size: Sizes = None) -> float:
        """Sum of those features' squares, each entry times its feature's ``size``."""
        return float(self._sized(size)[:, start:stop].double().square().sum())

    def total(self, size: Sizes = None) -> float:
        """Sum of all entries, each times its feature's ``size``."""
        return float(self._sized(size).double().sum())

    def fired(self) -> Bool[Tensor, " feature"]:
        """Which features are active for some token."""
        return (self.values.detach() > 0).any(dim=0)

    def rows(self, tokens: Int64[Tensor, " row"], stop: int) -> Float[Tensor, "row block"]:
        """The first ``stop`` features of some tokens, with gradient."""
        return self.values[tokens, :stop]


class Coded(NamedTuple):
    """One batch through an SAE in training."""

    reconstruction: Float[Tensor, "token d_model"]
    """normalised units"""
    code: Code
    thresholds: tuple[float, ...] = ()
    """smallest active entry of each block, where the architecture selects by it"""
    further: tuple[Float[Tensor, "token d_model"], ...] = ()
    """other reconstructions that the architecture also fits"""
    sparsity: Float[Tensor, ""] | None = None
    """the unweighted penalty, with gradient, where the architecture has one"""
