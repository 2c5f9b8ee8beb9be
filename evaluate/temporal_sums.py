"""What one pass over the codes keeps, per unit of resampling: sums from which every temporal figure follows.

A unit is a document, or a group of them where there are many (see `HeldOut.units`). `tcsae.evaluate.temporal_count`
adds to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int16, Int32, Int64

from tcsae.evaluate.information import CELLS, STATES
from tcsae.evaluate.temporal_codes import KINDS

ONCE = (
    "total",
    "square",
    "within_square",
    "minima",
    "runs",
    "firings",
    "in_middle",
    "in_upper",
    "steepest",
    "n_steepest",
)
"""Sums that do not depend on the lag: of f, of f^2, of (f - m)^2 with m the document's mean, of min(f_t, f_{t+1}) over
neighbours, number of on-runs, of tokens that are on, of those of them in the middle and in the upper third, and over
contexts in which the feature is on the sum of max_t |f_{t+1} - f_t| / ||x_{t+1} - x_t|| and their number."""

BY_LAG = ("ends", "product", "within_product")
"""Sums over pairs: of f_t + f_{t+d}, of f_t f_{t+d}, of (f_t - m)(f_{t+d} - m) with m the document's mean."""

PARTS = ("whole", "H", "L")


def n_columns(n_lags: int) -> int:
    """Sums of one feature and unit."""
    return len(ONCE) + n_lags * len(BY_LAG)


def bytes_per_unit(d_sae: int, n_lags: int) -> int:
    """Memory that one more unit costs at most."""
    return d_sae * (8 * n_columns(n_lags) + 4 * len(KINDS) * n_lags * CELLS)


def count_dtype(most_tokens: int) -> type[np.int16 | np.int32]:
    """What counts of tokens of a unit fit in: most of a pass's memory is counts, and getting it takes time.

    >>> count_dtype(32_767).__name__, count_dtype(32_768).__name__
    ('int16', 'int32')
    """
    return np.int16 if most_tokens <= np.iinfo(np.int16).max else np.int32


@dataclass(frozen=True, slots=True)
class TemporalSums:
    """Sums by unit; they add up over parts of the text whose documents are whole."""

    lags: tuple[int, ...]
    """in tokens"""
    n: Int64[np.ndarray, " unit"]
    """counted tokens"""
    n_pairs: Int64[np.ndarray, "unit kind lag"]
    """pairs, kinds as in `KINDS`"""
    values: Float[np.ndarray, "unit column feature"]
    """see `ONCE` and `BY_LAG`"""
    cells: Int16[np.ndarray, "unit kind lag feature cell"] | Int32[np.ndarray, "unit kind lag feature cell"]
    """pairs by 4 x state of the first + state of the second, where both are on. Where one end is off, what is kept is
    what is few: tokens in a state that are the first of no pair (second state 0) or the second of none (first state
    0), but for matched pairs those that are. Cell 0 holds nothing. See `joint`."""
    published: Float[np.ndarray, "unit part 2"]
    """of T-SAE's smoothness: sum over contexts of the mean over features that are on, and number of contexts, for
    the parts of `PARTS`"""

    @classmethod
    def zeros(
        cls,
        n_units: int,
        d_sae: int,
        lags: tuple[int, ...],
        cells: np.ndarray | None = None,
        *,
        most_tokens: int = 2**31 - 1,
    ) -> TemporalSums:
        """Nothing counted yet; with ``cells``, counts of pairs go there, on top of what is in it. No unit has more
        than ``most_tokens``."""
        n_lags = len(lags)
        shape = (n_units, len(KINDS), n_lags, d_sae, CELLS)
        return cls(
            lags=tuple(lags),
            n=np.zeros(n_units, dtype=np.int64),
            n_pairs=np.zeros((n_units, len(KINDS), n_lags), dtype=np.int64),
            values=np.zeros((n_units, n_columns(n_lags), d_sae)),
            cells=np.zeros(shape, dtype=count_dtype(most_tokens)) if cells is None else cells,
            published=np.zeros((n_units, len(PARTS), 2)),
        )

    @property
    def n_units(self) -> int:
        """units"""
        return len(self.n)

    @property
    def d_sae(self) -> int:
        """features"""
        return int(self.values.shape[2])

    def once(self, name: str) -> Float[np.ndarray, "unit feature"]:
        """One of `ONCE`."""
        return self.values[:, ONCE.index(name)]

    def by_lag(self, name: str, lag: int) -> Float[np.ndarray, "unit feature"]:
        """One of `BY_LAG`, ``lag`` being a place in ``lags``."""
        return self.values[:, column_of(name, lag)]

    def joint(
        self, kind: int, lag: int, features: slice = slice(None)
    ) -> Float[np.ndarray, "first second unit feature"]:
        """Pairs of one kind and lag by the states of both ends."""
        joint = np.moveaxis(self.cells[:, kind, lag, features], -1, 0).astype(np.float64, order="C")
        joint = joint.reshape(STATES, STATES, *joint.shape[1:])
        ends = joint[1:, 0], joint[0, 1:]
        if kind != KINDS.index("matched"):
            firings, middle, upper = (
                self.once(name)[:, features] for name in ("firings", "in_middle", "in_upper")
            )
            for state, tokens in enumerate((firings - middle - upper, middle, upper)):
                for end in ends:
                    np.subtract(tokens, end[state], out=end[state])
        for axis, end in zip((1, 0), ends, strict=True):
            end -= joint[1:, 1:].sum(axis=axis)
        joint[0, 0] = self.n_pairs[:, kind, lag, None] - joint.sum(axis=(0, 1))
        return joint

    def add(self, other: TemporalSums) -> None:
        """Add the sums of another part of the text, in place; ``cells`` that are shared stay as they are."""
        here = other.n > 0
        for mine, theirs in (
            (self.n, other.n),
            (self.n_pairs, other.n_pairs),
            (self.values, other.values),
            (self.published, other.published),
            *(() if other.cells is self.cells else ((self.cells, other.cells),)),
        ):
            for unit in np.flatnonzero(here):
                mine[unit] += theirs[unit]

    def without_empty_units(self) -> TemporalSums:
        """Without the units that have no counted token (documents of at most 8 tokens): drawing one of them would
        only make a resample smaller. They are the same for every SAE."""
        kept = self.n > 0
        if kept.all():
            return self
        return TemporalSums(
            self.lags,
            *(part[kept] for part in (self.n, self.n_pairs, self.values, self.cells, self.published)),
        )


def column_of(name: str, lag: int) -> int:
    """Place of one of `BY_LAG` among a unit's sums, ``lag`` being a place in ``lags``."""
    return len(ONCE) + lag * len(BY_LAG) + BY_LAG.index(name)
