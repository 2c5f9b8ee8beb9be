"""The ReLU SAE with an L1 penalty, with batch normalisation where asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.train.config import ArmConfig
from tcsae.train.precision import Linear, float32_linear
from tcsae.train.sae.base import Parts, TrainableSAE
from tcsae.train.sae.batch_norm import InputNorm, OutputNorm
from tcsae.train.sae.code import Coded
from tcsae.train.sae.entries import entries_of


class Standard(TrainableSAE):
    """A sparse autoencoder whose code is kept small by its L1 norm.

        z        = ReLU(W_enc (x - b_dec) + b_enc)
        x_hat    = z W_dec + b_dec
        sparsity = mean over tokens of sum_j z_j ||W_dec,j|| / sqrt(D)

    The weight by the decoder's norms (Conerly et al. 2024, Anthropic's April update) leaves nothing to gain
    from a small code and large rows; sqrt(D) makes it the L1 norm of activations with E||x||^2 = 1.

    With ``batch_norm`` (`tcsae.train.sae.batch_norm`) W_enc, b_enc and W_dec in these equations are those
    that normalisation makes of the parameters, so what is penalised is what is saved.
    """

    def __init__(self, d_in: int, config: ArmConfig, generator: torch.Generator) -> None:
        super().__init__(d_in, config, generator)
        self.input_norm = InputNorm(len(self.b_enc), d_in) if config.batch_norm else None
        self.output_norm = OutputNorm(d_in) if config.batch_norm else None

    def encoder_of(
        self, features: slice | Int64[Tensor, " some"]
    ) -> tuple[Float[Tensor, "some d_model"], Float[Tensor, " some"]]:
        """Weight and bias of some features' pre-activations; normalised by the running statistics."""
        if self.input_norm is None:
            return super().encoder_of(features)
        norm = self.input_norm
        return norm.fold(
            self.W_enc[features], norm.gain[features], self.b_enc[features], norm.mean, norm.covariance
        )

    def decoder_of(self, features: slice | Int64[Tensor, " some"]) -> Float[Tensor, "some d_model"]:
        """Rows of the decoder; normalised by the running statistics."""
        rows = self.W_dec[features]
        return rows if self.output_norm is None else rows * self.output_norm.scale(self.output_norm.variance)

    def forward(
        self,
        x: Float[Tensor, "token d_model"],
        valid: Bool[Tensor, " token"],
        linear: Linear = float32_linear,
        out: Tensor | None = None,
    ) -> Coded:
        """Code and reconstruct a batch; its own statistics normalise it and enter the running ones."""
        if self.input_norm is None:
            W, bias = self.encoder_of(slice(None))
        else:
            seen = self.input_norm.observe(x, valid, self.world)
            W, bias = self.input_norm.fold(self.W_enc, self.input_norm.gain, self.b_enc, *seen)
        with torch.no_grad():
            pre = linear(x, W, bias, out)
        entries = entries_of(pre, pre > 0, valid, x, W, bias)
        values = entries.only(entries.values)
        decoded = entries.decode(values, self.W_dec)
        W_dec: Tensor = self.W_dec
        if self.output_norm is not None:
            mean, variance = self.output_norm.observe(decoded, valid, self.world)
            scale = self.output_norm.scale(variance)
            decoded, W_dec = (decoded - mean) * scale, W_dec * scale
        norm = torch.linalg.vector_norm(W_dec, dim=1)
        sparsity = entries.sums(values) @ norm / (valid.sum() * math.sqrt(x.shape[1]))
        return Coded(decoded + self.b_dec, entries.code(values), sparsity=sparsity)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "_ d_model"]], linear: Linear) -> None:
        """Take the normalisation's statistics over all of ``batches`` together, with the final weights."""
        if self.input_norm is None or self.output_norm is None:
            return
        parts = list(batches)
        self.input_norm.measure(torch.cat(parts))
        self.output_norm.measure(
            torch.cat([self.preactivations(x, linear).relu_() @ self.W_dec for x in parts])
        )

    def parts(self) -> Parts:
        """A standard SAE, the normalisation folded into its weights."""
        if self.output_norm is None:
            return Parts("standard", self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        W_enc, bias = self.encoder_of(slice(None))
        W_dec = self.decoder_of(slice(None))
        b_dec = self.b_dec - self.output_norm.mean * self.output_norm.scale(self.output_norm.variance)
        return Parts("standard", W_enc, bias + W_enc @ b_dec, W_dec, b_dec)
