"""Sequences with known answers as codes, and their sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tcsae.evaluate.information import Thirds, thirds_of
from tcsae.evaluate.temporal_codes import LAGS, Codes
from tcsae.evaluate.temporal_count import SignedAccumulator
from tcsae.evaluate.temporal_features import Figure, autocorrelation_figures, figures
from tcsae.evaluate.temporal_pass import accumulate
from tcsae.evaluate.temporal_sums import TemporalSums


def codes_of(
    documents: Sequence[np.ndarray],
    *,
    contexts_each: int = 1,
    counted: np.ndarray | None = None,
    step: np.ndarray | None = None,
) -> Codes:
    """Documents [row, feature] one after the other, each cut into equal contexts; every token counts by default."""
    lengths = torch.tensor([len(d) for d in documents])
    document = torch.repeat_interleave(torch.arange(len(documents)), lengths)
    within = torch.cat([torch.arange(int(n)) * contexts_each // int(n) for n in lengths])
    n = int(lengths.sum())
    return Codes.of(
        torch.from_numpy(np.concatenate(documents)).float(),
        counted=torch.ones(n, dtype=torch.bool) if counted is None else torch.from_numpy(counted),
        context=document * contexts_each + within,
        document=document,
        step=None if step is None else torch.from_numpy(step).float(),
    )


def sums_of(
    blocks: Codes | list[Codes],
    lags: tuple[int, ...] = LAGS,
    *,
    thirds: Thirds | None = None,
    block_size: int = 0,
    seed: int = 0,
) -> TemporalSums:
    """Sums with every document a unit."""
    codes = blocks if isinstance(blocks, list) else [blocks]
    n_units = max(int(one.document.max()) for one in codes) + 1
    sums = TemporalSums.zeros(n_units, codes[0].d_sae, lags)
    bounds = thirds_of(codes, codes[0].d_sae) if thirds is None else thirds
    accumulate(sums, codes, bounds, torch.arange(n_units), block_size, [seed])
    return sums


def signed_sums_of(sequences: list[np.ndarray], lags: tuple[int, ...] = LAGS) -> TemporalSums:
    """Sums of sequences that have a sign, each a document in one context."""
    document = torch.repeat_interleave(
        torch.arange(len(sequences)), torch.tensor([len(s) for s in sequences])
    )
    sums = TemporalSums.zeros(len(sequences), sequences[0].shape[1], lags)
    accumulator = SignedAccumulator(sums, torch.arange(len(sequences)))
    x = torch.from_numpy(np.concatenate(sequences)).float()
    accumulator.add(x, counted=torch.ones(len(x), dtype=torch.bool), context=document, document=document)
    accumulator.finish()
    return sums


def by_name(sums: TemporalSums) -> dict[str, np.ndarray]:
    """Every figure [sample, feature], under its name in the table of features."""
    return {figure.column: figure.values for figure in figures(sums)}


def rho(sums: TemporalSums, name: str = "autocorrelation") -> np.ndarray:
    """Autocorrelation on all units, [lag, feature]."""
    found: list[Figure] = [one for one in autocorrelation_figures(sums) if one.metric.name == name]
    return np.stack([one.values[0] for one in found])


def markov(n: int, generator: np.random.Generator, features: int, off: float, on: float) -> np.ndarray:
    """Two-state chains with P(on -> off) = ``off`` and P(off -> on) = ``on``, begun in equilibrium."""
    draws = generator.random((n, features))
    state = generator.random(features) < on / (on + off)
    chain = np.zeros((n, features))
    for t in range(n):
        chain[t] = state
        state = np.where(state, draws[t] >= off, draws[t] < on)
    return chain


def sparse(n: int, features: int, generator: np.random.Generator, density: float = 0.3) -> np.ndarray:
    """Independent values, most of them 0."""
    return generator.lognormal(size=(n, features)) * (generator.random((n, features)) < density)
