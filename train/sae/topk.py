"""The TopK SAE (Gao et al. 2024, arXiv 2406.04093) with a block split."""

from __future__ import annotations

from torch import Tensor

from tcsae.train.sae.base import Parts
from tcsae.train.sae.batch_topk import BatchTopK
from tcsae.train.sae.per_token import keep_largest_of_each
from tcsae.train.sae.select import Selected

GUESS = 0.7
"""share of the mean token's threshold above which entries are candidates: few tokens have too few of them"""


class TopK(BatchTopK):
    """A sparse autoencoder that keeps, in each block, the largest entries of each token.

        z = a where a is among the k_b largest of its block b in its token, else 0

    and the rest as in BatchTopK. Without a block it is saved as a top-k SAE, exactly. With one it is saved as
    a JumpReLU SAE with BatchTopK's thresholds, an approximation: no top-k over all features keeps k_H and
    k_L, and a threshold keeps them on average, more in one token and fewer in another.
    """

    def _select(self, pre: Tensor, n_valid: int) -> Selected:
        guess = tuple(GUESS * bound for bound in self.thresholds.tolist())
        kept = keep_largest_of_each(pre, self.selections, guess)
        sums = [bounds.sum().item() for bounds in kept.thresholds]
        *totals, n_tokens = self.world.totals(*sums, n_valid)
        return Selected(
            kept.token, kept.feature, kept.values, tuple(total / max(n_tokens, 1) for total in totals)
        )

    def parts(self) -> Parts:
        """A top-k SAE, or one with thresholds."""
        if self.block_size:
            return super().parts()
        return Parts("topk", self.W_enc, self.b_enc, self.W_dec, self.b_dec, k=self.config.k)
