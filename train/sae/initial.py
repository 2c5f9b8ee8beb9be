"""Initial weights of an SAE."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.train.config import ArmConfig


def initial_weights(
    config: ArmConfig, d_in: int, generator: torch.Generator
) -> tuple[Float[Tensor, "feature d_model"], Float[Tensor, "feature d_model"]]:
    """W_enc and W_dec as ``config.initialisation`` asks.

    tied
        W_dec's rows are uniform on the sphere and W_enc equals them
    kaiming
        He et al. 2015 (arXiv 1502.01852), uniform, for the ReLU that follows: entries of W_enc have variance
        2 / D; W_dec is W_enc with rows of unit norm
    xavier
        Glorot and Bengio 2010, uniform: entries of both, drawn apart, have variance 2 / (D + F)

    Where the decoder has unit norm its rows are given it, whatever the initialisation.
    """
    d_sae = config.features(d_in)
    if config.initialisation == "tied":
        rows = normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        return rows.clone(), rows
    variance = 2 / d_in if config.initialisation == "kaiming" else 2 / (d_in + d_sae)
    bound = math.sqrt(3 * variance)
    W_enc = torch.empty(d_sae, d_in).uniform_(-bound, bound, generator=generator)
    if config.initialisation == "kaiming":
        return W_enc, normalize(W_enc, dim=1)
    W_dec = torch.empty(d_sae, d_in).uniform_(-bound, bound, generator=generator)
    return W_enc, normalize(W_dec, dim=1) if config.unit_norm_decoder else W_dec
