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

from collections.abc import Iterable
from typing import NamedTuple

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

NO_TOKEN = "no token of these documents is kept"

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


class StoreSums(NamedTuple):
    """One pass over the held-out rows."""

    sums: Float[np.ndarray, "unit sum"]
    """`COLUMNS`, then the sum of x minus the centre"""
    firings: Int64[np.ndarray, " feature"]
    """kept tokens at which each feature is not 0"""
    n_kept: int
    """kept tokens"""
    n_outliers: int
    """tokens left out as outliers"""


def store_sums(
    sae: SAE,
    blocks: Iterable[Block],
    unit_of_document: Int64[Tensor, " document"],
    centre: Float[Tensor, " d_model"],
) -> StoreSums:
    """Sums over ``blocks`` for each unit of resampling.

    ``centre`` is any vector near the mean: squares are summed about it, so that no precision is lost where
    the mean is large beside the spread. The figures do not depend on it.
    """
    n_units = int(unit_of_document.max()) + 1
    sums = np.zeros((n_units, len(COLUMNS) + len(centre)))
    firings = np.zeros(sae.d_sae, dtype=np.int64)
    n_kept = n_outliers = 0
    for block in blocks:
        n_outliers += block.n_outliers
        x, document = block.x[block.kept].to(sae.device), block.document[block.kept].numpy()
        if not len(x):
            continue
        f = sae.encode(x)
        rows = token_sums(x, f, sae.decode(f), centre.to(sae.device), sae.block_size).cpu().numpy()
        # rows of a document stand together: [3, 3, 5] begins its documents at [0, 2]
        begins = np.flatnonzero(np.diff(document, prepend=-1))
        np.add.at(sums, unit_of_document.numpy()[document[begins]], np.add.reduceat(rows, begins))
        firings += (f != 0).sum(dim=0).cpu().numpy()
        n_kept += len(x)
    return StoreSums(sums, firings, n_kept, n_outliers)


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
