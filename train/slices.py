"""One process's slice of a batch: its addends of the terms of the whole batch.

Each function returns what it was given where there is one process. Gradients of the addends, summed over
ranks, are the gradient of the whole batch's terms (docs/decisions/007-data-parallel.md).

Legend: B tokens of the whole batch, N processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.train.batches import Rows
from tcsae.train.config import ArmConfig
from tcsae.train.losses import Contrast
from tcsae.train.pairs import Pairs
from tcsae.train.sae.base import Losses
from tcsae.train.sae.code import Code, Coded, Sizes
from tcsae.train.world import World

TemporalTerm = Callable[[Coded, Rows, Pairs], Contrast]


def losses_addend(
    losses: Losses,
    x: Float[Tensor, "token d_model"],
    coded: Coded,
    weight: Float[Tensor, " token"],
    world: World,
) -> Losses:
    """An architecture's terms, each a mean over its slice, times the slice's share of the denominator."""
    if world.size == 1:
        return losses
    energy, tokens = _shares(world, _energy(x, weight), weight.sum().item())
    if tokens == 0:  # the terms of no token are nan, and gradients have to be there for the sum over ranks
        nothing = coded.reconstruction.sum() * 0
        return Losses(nothing, nothing, losses.sparsity * 0 if losses.sparsity.isfinite() else nothing)
    return Losses(losses.fvu * energy, losses.fit * energy, losses.sparsity * tokens)


def auxiliary_addend(
    term: Float[Tensor, ""],
    error: Float[Tensor, "token d_model"],
    weight: Float[Tensor, " token"],
    world: World,
) -> Float[Tensor, ""]:
    """AuxK, whose denominator is the energy of ``error``, the same for every block."""
    if world.size == 1 or not term.requires_grad:  # no feature is dead, on any rank
        return term
    (share,) = _shares(world, _energy(error, weight))
    return term * share if share > 0 else term.new_zeros(())


def temporal_addend(
    config: ArmConfig, term: TemporalTerm, coded: Coded, batch: Rows, pairs: Pairs, world: World
) -> Contrast:
    """The temporal term of ``config`` over ``pairs`` of the whole batch.

    Everything but ``loss``, the addend, is of the whole batch. Where each pair of a window counts alone, a
    rank computes those of its own windows. Where pairs are compared with each other or come from anywhere, it
    gets the whole batch from the others, computes the whole term and adds an N-th of it.
    """
    if world.size == 1:
        return term(coded, batch, pairs)
    if config.objective == "in_batch" or config.positives == "other_document":
        code = whole_code(coded.code, len(batch.x), world)
        found = term(coded._replace(code=code), _whole(batch, world), pairs)
        return found._replace(loss=found.loss / world.size)
    mine = world.slice(len(batch.x) * world.size)
    own = (pairs.anchor >= mine.start) & (pairs.anchor < mine.stop)
    found = term(coded, batch, Pairs(pairs.anchor[own] - mine.start, pairs.positive[own] - mine.start))
    return _combined(found, int(own.sum()), world)


def _combined(found: Contrast, n_given: int, world: World) -> Contrast:
    """Means over a rank's pairs as means over all pairs; a mean of nothing, nan, does not count."""
    (n_pairs,) = world.totals(found.n_pairs)
    figures = [
        (found.accuracy, found.n_pairs),
        (found.accuracy_within_source, found.n_pairs),
        (found.masked_share, found.n_pairs),
        (found.empty_share, n_given),
    ]
    counted = [(0.0, 0) if math.isnan(value) else (value, n) for value, n in figures]
    sums = world.totals(*(value * n for value, n in counted), *(n for _, n in counted))
    means = [total / n if n else math.nan for total, n in zip(sums[:4], sums[4:], strict=True)]
    accuracy, within_source, masked, empty = means
    loss = found.loss * (found.n_pairs / max(n_pairs, 1))
    return Contrast(loss, accuracy, within_source, masked, empty, int(n_pairs))


def _shares(world: World, *addends: float | int) -> list[float]:
    return [
        addend / total if total else 0.0
        for addend, total in zip(addends, world.totals(*addends), strict=True)
    ]


def _energy(x: Tensor, weight: Tensor) -> float:
    """sum_i w_i ||x_i||^2, the denominator of `tcsae.train.losses.fvu`."""
    return (weight @ x.detach().square().sum(dim=1)).item()


def _whole(batch: Rows, world: World) -> Rows:
    """The batch of which every rank has a slice."""

    def gathered(values: np.ndarray) -> np.ndarray:
        return world.gather(torch.from_numpy(values)).numpy()

    return Rows(
        raw=world.gather(batch.raw),
        x=world.gather(batch.x),
        valid=world.gather(batch.valid),
        document=gathered(batch.document),
        source=gathered(batch.source),
        position=gathered(batch.position),
        token=gathered(batch.token),
        eligible=gathered(batch.eligible),
    )


def whole_code(code: Code, n_tokens: int, world: World) -> Code:
    """The code of the whole batch, of which every rank has ``n_tokens`` tokens."""
    return code if world.size == 1 else _WholeCode(code, n_tokens, world)


@dataclass(frozen=True, slots=True)
class _WholeCode:
    mine: Code
    n_tokens: int
    world: World

    def count(self, start: int, stop: int) -> int:
        """Active entries of features ``start`` to ``stop`` (exclusive)."""
        return int(self.world.totals(self.mine.count(start, stop))[0])

    def energy(self, start: int, stop: int, size: Sizes = None) -> float:
        """Sum of those features' squares, each entry times its feature's ``size``."""
        return self.world.totals(self.mine.energy(start, stop, size))[0]

    def total(self, size: Sizes = None) -> float:
        """Sum of all entries, each times its feature's ``size``."""
        return self.world.totals(self.mine.total(size))[0]

    def fired(self) -> Bool[Tensor, " feature"]:
        """Which features are active for some token."""
        return self.world.any(self.mine.fired())

    def rows(self, tokens: Int64[Tensor, " row"], stop: int) -> Float[Tensor, "row block"]:
        """The first ``stop`` features of some tokens as a dense matrix, with gradient."""
        first = self.world.rank * self.n_tokens
        own = (tokens >= first) & (tokens < first + self.n_tokens)
        rows = self.mine.rows(tokens[own] - first, stop)
        spread = rows.new_zeros(len(tokens), stop).index_put((own.nonzero().flatten(),), rows)
        return self.world.sum(spread)
