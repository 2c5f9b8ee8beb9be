"""The JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435), trained towards a number of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tcsae.train.config import ArmConfig
from tcsae.train.precision import Linear, float32_linear
from tcsae.train.sae.base import Parts, TrainableSAE
from tcsae.train.sae.code import Coded
from tcsae.train.sae.entries import entries_of


class JumpReLU(TrainableSAE):
    """A sparse autoencoder with a learned threshold for each feature.

        pre      = W_enc (x - b_dec) + b_enc
        z        = pre where pre > threshold, else 0
        x_hat    = z W_dec + b_dec
        sparsity = sum over blocks b of (L0_b / k_b - 1)^2        L0_b: active features of a token, on average

    A step has no useful gradient, so the threshold t of a feature gets, with a bandwidth w, that of the
    expectation over a rectangle around it (equations 11 and 12 of the paper; the target is its appendix's):

        dz/dt = -t / w  and  d[pre > t]/dt = -1 / w   where |pre - t| < w / 2, else 0

    The sparsity reaches the thresholds alone.
    """

    def __init__(self, d_in: int, config: ArmConfig, generator: torch.Generator) -> None:
        super().__init__(d_in, config, generator)
        self.threshold = nn.Parameter(torch.full_like(self.b_enc, config.initial_threshold))

    @property
    def running_thresholds(self) -> Sequence[float]:
        """Mean threshold of each block."""
        return [self.threshold.detach()[b.start : b.stop].mean().item() for b in self.blocks]

    def forward(
        self,
        x: Float[Tensor, "token d_model"],
        valid: Bool[Tensor, " token"],
        linear: Linear = float32_linear,
        out: Tensor | None = None,
    ) -> Coded:
        """Code and reconstruct a batch."""
        width = self.config.bandwidth
        pre = self.preactivations(x, linear, out)
        # Entries just below their threshold are inactive, but tell it what lowering it would bring.
        listed = pre > self.threshold.detach() - width / 2
        entries = entries_of(pre, listed, valid, x, *self.encoder_of(slice(None)))
        threshold = entries.spread(self.threshold)
        fixed = threshold.detach()
        on = entries.values.detach() > fixed
        near = entries.only(((entries.values.detach() - fixed).abs() < width / 2).float())
        # 0, with the gradient of the threshold itself: carries the two straight-through estimates.
        slope = threshold - fixed
        values = entries.only(entries.values * on) - slope * (fixed * near / width)
        counts = entries.sums(entries.only(on.float()))
        slopes = (self.threshold - self.threshold.detach()) * entries.sums(near)
        firing = counts - slopes / width
        (n_tokens,) = self.world.totals(int(valid.sum()))
        l0 = self.world.sum(torch.stack([firing[b.start : b.stop].sum() for b in self.selections])) / n_tokens
        target = l0.new_tensor([b.k for b in self.selections])
        return Coded(
            entries.decode(values, self.W_dec) + self.b_dec,
            entries.code(values),
            sparsity=(l0 / target - 1).square().sum(),
        )

    @torch.no_grad()
    def after_step(self, coded: Coded, n_tokens: int) -> None:
        """Also keep the thresholds at 0 or above, where a code is one of ReLU's."""
        super().after_step(coded, n_tokens)
        self.threshold.clamp_(min=0)

    def parts(self) -> Parts:
        """The same with its own thresholds."""
        return Parts("jumprelu", self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold)
