"""Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) of an SAE's pre-activations and output.

The normalisation of a linear map is again a linear map, so it is folded into the weights at every step:

    pre    = W x + c,  normalised over the batch:  gain (pre - E pre) / sqrt(Var pre + eps) + bias
    E pre  = W E x + c,  Var pre_j = W_j Cov(x) W_j^T
    folded = W' x + bias',  W'_j = W_j gain_j / sqrt(Var pre_j + eps),  bias' = bias - W' E x

The statistics that are kept are those of x, [D] and [D, D]. They do not depend on the weights, so those of
the pre-activations are never older than the weights.

Legend: B tokens, D d_model, F features.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tcsae.train.world import ALONE, World

RATE = 0.1
"""weight of the newest batch in the running statistics"""
EPS = 1e-5
"""added to variances, in squares of normalised units"""


class InputNorm(nn.Module):
    """Of the pre-activations; the bias is the SAE's own, whose part W_enc b_dec cancels."""

    def __init__(self, d_sae: int, d_in: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d_sae))
        self.mean: Tensor
        self.covariance: Tensor
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("covariance", torch.zeros(d_in, d_in))

    @torch.no_grad()
    def observe(self, x: Tensor, valid: Bool[Tensor, " token"], world: World) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the valid rows of the whole batch, which enter the running ones."""
        mean, covariance = _moments(x if valid.all() else x[valid], world)
        first = not self.covariance.any()
        _follow(self.mean, mean, first)
        _follow(self.covariance, covariance, first)
        return mean, covariance

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "token d_model"]) -> None:
        """Set the running statistics to those of ``x``."""
        mean, covariance = _moments(x, ALONE)
        self.mean.copy_(mean)
        self.covariance.copy_(covariance)

    @staticmethod
    def fold(
        W: Float[Tensor, "some d_model"],
        gain: Float[Tensor, " some"],
        bias: Float[Tensor, " some"],
        mean: Float[Tensor, " d_model"],
        covariance: Float[Tensor, "d_model d_model"],
    ) -> tuple[Float[Tensor, "some d_model"], Float[Tensor, " some"]]:
        """Weight and bias of the normalised pre-activations, with gradient through their variance.

        Cov(x) = diag(4, 9) and W = (3, 0): Var = 36, so W' = 2 (3, 0) / 6; E x = (5, 0): bias' = 7 - 5.

        >>> fold = InputNorm.fold(torch.tensor([[3.0, 0.0]]), torch.tensor([2.0]), torch.tensor([7.0]),
        ...                       torch.tensor([5.0, 0.0]), torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
        >>> [part.round(decimals=4).tolist() for part in fold]
        [[[1.0, 0.0]], [2.0]]
        """
        variance = ((W @ covariance) * W).sum(dim=1)
        folded = W * (gain * (variance + EPS).rsqrt())[:, None]
        return folded, bias - folded @ mean


class OutputNorm(nn.Module):
    """Of each dimension of z W_dec; the bias is the SAE's b_dec."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d_in))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("variance", torch.zeros(d_in))

    def observe(self, decoded: Tensor, valid: Bool[Tensor, " token"], world: World) -> tuple[Tensor, Tensor]:
        """Mean and variance of the valid rows of the whole batch, with gradient; they enter the running ones."""
        rows = decoded if valid.all() else decoded[valid]
        (n,) = world.totals(len(rows))
        mean = world.sum(rows.sum(dim=0)) / n
        variance = world.sum((rows - mean).square().sum(dim=0)) / n
        first = not self.variance.any()
        _follow(self.mean, mean.detach(), first)
        _follow(self.variance, variance.detach(), first)
        return mean, variance

    @torch.no_grad()
    def measure(self, decoded: Float[Tensor, "token d_model"]) -> None:
        """Set the running statistics to those of ``decoded``."""
        self.mean.copy_(decoded.mean(dim=0))
        self.variance.copy_(decoded.var(dim=0, correction=0))

    def scale(self, variance: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """What each dimension is multiplied by."""
        return self.gain * (variance + EPS).rsqrt()


def _moments(x: Tensor, world: World) -> tuple[Tensor, Tensor]:
    (n,) = world.totals(len(x))
    mean = world.sum(x.sum(dim=0)) / n
    return mean, world.sum(x.T @ x) / n - torch.outer(mean, mean)


def _follow(running: Tensor, newest: Tensor, first: bool) -> None:
    running.lerp_(newest, 1.0 if first else RATE)
