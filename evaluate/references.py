"""SAEs whose figures are known beforehand: what the measurements are held against."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.train.sae.inference import SAE


def identity_sae(d_model: int) -> SAE:
    """The SAE that returns its input: explained variance 1, loss recovered 1, KL 0."""
    return SAE.identity(d_model)


def zero_sae(d_model: int) -> SAE:
    """The SAE that returns zeros: where it is spliced it *is* the zero ablation, so loss recovered 0."""
    return SAE.zero(d_model)


def mean_sae(mean: Float[Tensor, " d_model"]) -> SAE:
    """The SAE without live features that returns ``mean``: explained variance 0, the mean ablation."""
    sae = SAE.zero(mean.shape[0])
    return SAE(
        architecture="standard",
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=mean.to(torch.float32),
        name="mean",
    )
