"""The BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410) with a block split, and its thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tcsae.train.config import ArmConfig
from tcsae.train.precision import Linear, float32_linear
from tcsae.train.sae.base import Parts, TrainableSAE
from tcsae.train.sae.code import Coded, SparseCode
from tcsae.train.sae.select import Selected, keep_largest
from tcsae.train.sae.sparse import Active, active_entries, decode_active, encode_active

THRESHOLD_RATE = 0.05
"""weight of the newest batch in the running thresholds"""

GUESS = 0.85
"""share of the running threshold above which an entry is ranked: some 1.5 candidates for each kept one"""


class BatchTopK(TrainableSAE):
    """A sparse autoencoder that keeps, in each block, the largest entries of a whole batch.

        a     = ReLU(W_enc (x - b_dec) + b_enc)
        z     = a where a is among the k_b * B largest of its block b in the batch, else 0
        x_hat = z W_dec + b_dec                                      rows of W_dec have unit norm

    Two blocks, H (features 0 .. block_size - 1) and L (the rest), with k_H + k_L = k, or one. At inference
    an entry is active if it exceeds its block's threshold (`calibrate`, `to_inference`). Only the encoder's
    forward product is dense (`tcsae.train.sae.sparse`).
    """

    def __init__(self, d_in: int, config: ArmConfig, generator: torch.Generator) -> None:
        super().__init__(d_in, config, generator)
        self.thresholds: Tensor
        # float64: what is read from it must survive a checkpoint exactly as Python floats.
        self.register_buffer("thresholds", torch.zeros(len(self.selections), dtype=torch.float64))

    @property
    def running_thresholds(self) -> Sequence[float]:
        """Smallest active entries of the last batches, of each block."""
        found: list[float] = self.thresholds.tolist()
        return found if len(found) == len(self.blocks) else found * len(self.blocks)

    def forward(
        self,
        x: Float[Tensor, "token d_model"],
        valid: Bool[Tensor, " token"],
        linear: Linear = float32_linear,
        out: Tensor | None = None,
    ) -> Coded:
        """Code and reconstruct a batch; tokens that are not ``valid`` get no active entry and no budget."""
        pre = self.preactivations(x, linear, out)
        n_valid = int(valid.sum())
        if n_valid < len(x):
            pre[~valid] = -torch.inf
        kept = self._select(pre, n_valid)
        active = active_entries(kept.token, kept.feature, *pre.shape)
        values = encode_active(kept.values, x, self.W_enc, self.bias, active)
        *further, whole = self._reconstruct(values, active)
        return Coded(whole, SparseCode(values, active), kept.thresholds, tuple(further))

    def _select(self, pre: Tensor, n_valid: int) -> Selected:
        """The entries of ``pre`` that are kept; tokens that are not valid are -inf."""
        guess = tuple(GUESS * bound for bound in self.thresholds.tolist())
        return keep_largest(pre, self.selections, n_valid, guess, self.world)

    def _reconstruct(self, values: Tensor, active: Active) -> list[Tensor]:
        """What is fitted, the whole reconstruction last."""
        return [decode_active(values, self.W_dec, active) + self.b_dec]

    @torch.no_grad()
    def after_step(self, coded: Coded, n_tokens: int) -> None:
        """Also update the running thresholds."""
        super().after_step(coded, n_tokens)
        for i, newest in enumerate(coded.thresholds):
            old = float(self.thresholds[i])
            self.thresholds[i] = old + THRESHOLD_RATE * (newest - old) if old > 0 else newest

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "_ d_model"]], linear: Linear) -> None:
        """Set each block's threshold so that over all of ``batches`` it keeps k_b entries per token.

        That is one quantile over them together. The running thresholds follow weights that still change,
        and the mean of the batches' own thresholds is not the threshold of their union.
        """
        found: list[list[Tensor]] = [[] for _ in self.selections]
        n_tokens = 0
        for x in batches:
            pre = self.preactivations(x, linear)
            n_tokens += len(x)
            for block, values in zip(self.selections, found, strict=True):
                part = pre[:, block.start : block.stop].flatten()
                # Twice the budget of each batch: the union's threshold is hardly below that of a batch.
                values.append(part.topk(min(len(part), 2 * block.k * len(x)), sorted=False).values)
        for i, (block, values) in enumerate(zip(self.selections, found, strict=True)):
            every = torch.cat(values)
            budget = block.k * n_tokens
            self.thresholds[i] = max(
                every.topk(min(budget, len(every)), sorted=False).values.min().item(), 0.0
            )

    def parts(self) -> Parts:
        """A JumpReLU SAE whose features share their block's threshold."""
        per_feature = [
            torch.full((b.stop - b.start,), bound, device=self.b_enc.device)
            for b, bound in zip(self.selections, self.thresholds.tolist(), strict=True)
        ]
        return Parts("jumprelu", self.W_enc, self.b_enc, self.W_dec, self.b_dec, torch.cat(per_feature))
