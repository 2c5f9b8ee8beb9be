"""Reconstruction and sparsity on the stored activations of every held-out token; no model is run.

Repaired definitions (r = ||x - xh||^2, mean over kept tokens, all sums in float64):

    explained_variance   1 - sum r / sum ||x - m||^2, m the mean of the same tokens
    mse                  mean r;  mse_per_dimension: mean r / d_model
    cosine_similarity    mean of <x, xh> / (||x|| ||xh||) over tokens with xh != 0
    l2_ratio             mean of ||xh|| / ||x||
    relative_reconstruction_bias   sum ||xh||^2 / sum <x, xh>
    l0, l1               mean number of f != 0, mean of sum |f|
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tcsae.evaluate.estimates import Metric
from tcsae.evaluate.heldout import Block
from tcsae.evaluate.intervals import Array
from tcsae.train.sae.inference import SAE

COLUMNS = ("n", "r", "square", "cosine", "n_cosine", "ratio", "xh_square", "dot", "l0", "l0_H", "l1")
"""Per-unit sums that stand before the ``d_model`` sums of x minus the centre."""

NO_TOKEN = "no token of this text is kept"

METRICS = (
    Metric("explained_variance", "1", "the activations do not vary"),
    Metric("mse", "squared activation", NO_TOKEN),
    Metric("mse_per_dimension", "squared activation", NO_TOKEN),
    Metric("cosine_similarity", "1", "every reconstruction is zero"),
    Metric("l2_ratio", "1", NO_TOKEN),
    Metric("relative_reconstruction_bias", "1", "reconstructions are orthogonal to the activations"),
    Metric("l0", "features per token", NO_TOKEN),
    Metric("l0_H", "features per token", NO_TOKEN),
    Metric("l0_L", "features per token", NO_TOKEN),
    Metric("l1", "activation per token", NO_TOKEN),
)


class Gathered:
    """Sums over tokens for each unit of resampling, from which `figures` are computed.

    Parameters
    ----------
    sae
        what encodes and reconstructs
    n_units
        units of resampling
    centre
        any vector near the mean: squares are summed about it, so that no precision is lost where the mean is
        large beside the spread. The figures do not depend on it
    """

    def __init__(self, sae: SAE, n_units: int, centre: Float[Tensor, " d_model"]) -> None:
        self._block_size = sae.block_size
        self._centre = centre.to(sae.device)
        self.sums: Float[np.ndarray, "unit sum"] = np.zeros((n_units, len(COLUMNS) + len(centre)))
        """`COLUMNS`, then the sum of x minus the centre"""
        self.firings: Int64[np.ndarray, " feature"] = np.zeros(sae.d_sae, dtype=np.int64)
        """kept tokens at which each feature is not 0"""
        self.n_kept = 0
        """kept tokens"""
        self.n_outliers = 0
        """tokens left out as outliers"""

    def add(
        self,
        x: Float[Tensor, "kept d_model"],
        f: Float[Tensor, "kept feature"],
        xh: Float[Tensor, "kept d_model"],
        unit: Int64[np.ndarray, " kept"],
    ) -> None:
        """Add kept tokens; ``unit`` is each one's unit of resampling."""
        if not len(x):
            return
        rows = token_sums(x, f, xh, self._centre, self._block_size).cpu().numpy()
        # tokens of a unit mostly stand together: [3, 3, 5] begins at [0, 2]
        begins = np.flatnonzero(np.diff(unit, prepend=-1))
        np.add.at(self.sums, unit[begins], np.add.reduceat(rows, begins))
        self.firings += (f != 0).sum(dim=0).cpu().numpy()
        self.n_kept += len(x)

    def state(self) -> dict[str, np.ndarray]:
        """Everything gathered so far, for `restore`."""
        return {"unit_sums": self.sums, "nonzero": self.firings, "n_gathered": np.array(self.n_kept)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self.sums, self.firings, self.n_kept = (
            state["unit_sums"],
            state["nonzero"],
            int(state["n_gathered"]),
        )


def store_sums(
    sae: SAE,
    blocks: Iterable[Block],
    unit_of_document: Int64[Tensor, " document"],
    centre: Float[Tensor, " d_model"],
    advance: Callable[[int], None] | None = None,
) -> Gathered:
    """Sums over all kept tokens of ``blocks``; ``advance`` is told the rows of each block."""
    unit_of = unit_of_document.numpy()
    found = Gathered(sae, int(unit_of.max()) + 1, centre)
    for block in blocks:
        found.n_outliers += block.n_outliers
        x = block.x[block.kept].to(sae.device)
        f = sae.encode(x)
        found.add(x, f, sae.decode(f), unit_of[block.document[block.kept].numpy()])
        if advance is not None:
            advance(len(block.x))
    return found


def token_sums(
    x: Float[Tensor, "row d_model"],
    f: Float[Tensor, "row feature"],
    xh: Float[Tensor, "row d_model"],
    centre: Float[Tensor, " d_model"],
    block_size: int,
) -> Float[Tensor, "row sum"]:
    """What each token adds to the sums, in float64."""
    x, xh = x.double(), xh.double()
    centred = x - centre.double()
    norm_x, norm_xh, dot = x.norm(dim=-1), xh.norm(dim=-1), (x * xh).sum(dim=-1)
    has_direction = (norm_x > 0) & (norm_xh > 0)
    cosine = torch.where(has_direction, dot / (norm_x * norm_xh), 0.0)
    on = f != 0
    columns = {
        "n": torch.ones_like(dot),
        "r": (x - xh).square().sum(dim=-1),
        "square": centred.square().sum(dim=-1),
        "cosine": cosine,
        "n_cosine": has_direction.double(),
        "ratio": torch.where(norm_x > 0, norm_xh / norm_x, 0.0),
        "xh_square": norm_xh.square(),
        "dot": dot,
        "l0": on.sum(dim=-1).double(),
        "l0_H": on[:, :block_size].sum(dim=-1).double(),
        "l1": f.abs().sum(dim=-1, dtype=torch.float64),
    }
    return torch.cat([torch.stack([columns[name] for name in COLUMNS], dim=1), centred], dim=1)


def figures(sums: Array, d_model: int) -> Array:
    """`METRICS` of (weighted) sums [..., sum]; NaN where undefined."""
    of = {name: sums[..., at] for at, name in enumerate(COLUMNS)}
    mean_shift = np.square(sums[..., len(COLUMNS) :]).sum(axis=-1) / of["n"]
    total = of["square"] - mean_shift
    mse = of["r"] / of["n"]
    return np.stack(
        [
            # rounding leaves a trace of variance where there is none
            np.where(total > 1e-12 * of["square"], 1 - of["r"] / total, np.nan),
            mse,
            mse / d_model,
            of["cosine"] / of["n_cosine"],
            of["ratio"] / of["n"],
            np.where(of["dot"] != 0, of["xh_square"] / of["dot"], np.nan),
            of["l0"] / of["n"],
            of["l0_H"] / of["n"],
            (of["l0"] - of["l0_H"]) / of["n"],
            of["l1"] / of["n"],
        ],
        axis=-1,
    )
