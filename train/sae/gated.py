"""The Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tcsae.train.config import ArmConfig
from tcsae.train.precision import Linear, float32_linear
from tcsae.train.sae.base import Parts, TrainableSAE
from tcsae.train.sae.code import Coded
from tcsae.train.sae.entries import entries_of


class Gated(TrainableSAE):
    """A sparse autoencoder that decides whether a feature is active apart from how strongly.

        gate      = W_enc (x - b_dec) + b_enc
        magnitude = exp(r_mag) W_enc (x - b_dec) + b_mag
        z         = ReLU(magnitude) where gate > 0, else 0
        x_hat     = z W_dec + b_dec
        sparsity  = mean over tokens of sum_j ReLU(gate_j) ||W_dec,j|| / sqrt(D)
        fit       = FVU of x_hat + FVU of ReLU(gate) W_dec + b_dec, in which W_dec and b_dec are fixed

    The penalty shrinks the gate's values and not the magnitudes; the second reconstruction gives the gate,
    a step without gradient, something to be right about (equation 8 of the paper). As in
    `tcsae.train.sae.standard.Standard` the penalty is weighted by the decoder's norms.
    """

    def __init__(self, d_in: int, config: ArmConfig, generator: torch.Generator) -> None:
        super().__init__(d_in, config, generator)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    def forward(
        self,
        x: Float[Tensor, "token d_model"],
        valid: Bool[Tensor, " token"],
        linear: Linear = float32_linear,
        out: Tensor | None = None,
    ) -> Coded:
        """Code and reconstruct a batch; the gate's own reconstruction is ``further``."""
        pre = self.preactivations(x, linear, out)
        entries = entries_of(pre, pre > 0, valid, x, *self.encoder_of(slice(None)))
        gate = entries.only(entries.values)
        gain = self.r_mag.exp()
        # gain (gate - b_enc) + b_mag
        magnitude = entries.values * entries.spread(gain) + entries.spread(self.b_mag - gain * self.b_enc)
        values = entries.only(magnitude.relu())
        norm = torch.linalg.vector_norm(self.W_dec, dim=1)
        sparsity = entries.sums(gate) @ norm / (valid.sum() * math.sqrt(x.shape[1]))
        return Coded(
            entries.decode(values, self.W_dec) + self.b_dec,
            entries.code(values),
            further=(entries.decode(gate, self.W_dec.detach()) + self.b_dec.detach(),),
            sparsity=sparsity,
        )

    def fit(self, whole: Float[Tensor, ""], further: list[Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The sum of both reconstructions' FVU."""
        return whole + further[0]

    def parts(self) -> Parts:
        """A JumpReLU SAE of the magnitudes, exactly.

        gate > 0 if and only if exp(r_mag) W_enc (x - b_dec) > -exp(r_mag) b_enc, that is if
        magnitude > b_mag - exp(r_mag) b_enc; below 0 ReLU decides.
        """
        gain = self.r_mag.exp()
        threshold = (self.b_mag - gain * self.b_enc).relu()
        return Parts("jumprelu", gain[:, None] * self.W_enc, self.b_mag, self.W_dec, self.b_dec, threshold)
