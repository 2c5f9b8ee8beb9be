"""The Matryoshka-BatchTopK SAE (Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.train.config import ArmConfig
from tcsae.train.sae.batch_topk import BatchTopK
from tcsae.train.sae.sparse import Active, active_entries, decode_active


class Matryoshka(BatchTopK):
    """A BatchTopK SAE of which each prefix of the features has to reconstruct alone.

        x_hat_m = z[:m] W_dec[:m] + b_dec                            for the prefixes m, the last of which is F
        fit     = mean over m of the FVU of x_hat_m

    z is selected once, as in BatchTopK: over each block, or over all features where block H has no budget of
    its own, so a prefix keeps what it has among the largest. With the one prefix that is block H and one
    budget the fit is that of a T-SAE (Bhalla et al. 2025, arXiv 2511.05541).
    """

    def __init__(self, d_in: int, config: ArmConfig, generator: torch.Generator) -> None:
        super().__init__(d_in, config, generator)
        self.prefixes = config.prefixes(d_in)

    def _reconstruct(self, values: Tensor, active: Active) -> list[Tensor]:
        """Of each prefix; every entry is decoded once, into the sum that goes on from the prefix before."""
        n_tokens = len(active.token_offsets) - 1
        found = [self.b_dec.expand(n_tokens, -1)]
        for start, stop in itertools.pairwise((0, *self.prefixes)):
            inside = ((active.feature >= start) & (active.feature < stop)).nonzero().flatten()
            part = active_entries(
                active.token[inside], active.feature[inside] - start, n_tokens, stop - start
            )
            added = decode_active(values.index_select(0, inside), self.W_dec[start:stop], part)
            found.append(found[-1] + added)
        return found[1:]

    def fit(self, whole: Float[Tensor, ""], further: list[Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The mean over all prefixes' FVU."""
        return torch.stack([*further, whole]).mean()
