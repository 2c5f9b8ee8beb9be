"""The trainable BatchTopK SAE with a block split, in normalised units.

Legend: B tokens, D d_model, F features, H features of the contrastive block, N active entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from tcsae.store.spec import HookStatistics
from tcsae.train.precision import Linear, float32_linear
from tcsae.train.sae.inference import SAE
from tcsae.train.sae.select import Block, keep_largest
from tcsae.train.sae.sparse import Active, active_entries, decode_active, encode_active

THRESHOLD_RATE = 0.05
"""weight of the newest batch in the running thresholds"""

GUESS = 0.85
"""share of the running threshold above which an entry is ranked: some 1.5 candidates for each kept one"""


class Scaler(NamedTuple):
    """Normalised units: (x - mean) * scale, with E||.||^2 = d_model over the train split."""

    mean: Float32[Tensor, " d_model"]
    scale: float
    """dimensionless; multiplies activations"""

    @classmethod
    def of(cls, statistics: HookStatistics) -> Scaler:
        """The scaler of a hook. A hook whose activations never vary keeps scale 1."""
        variance = statistics.mean_square_norm / len(statistics.mean)
        return cls(torch.from_numpy(statistics.mean).float(), variance**-0.5 if variance > 0 else 1.0)

    def normalise(self, x: Float[Tensor, "token d_model"]) -> Float32[Tensor, "token d_model"]:
        """Normalised float32 copy of raw activations."""
        return (x.float() - self.mean.to(x.device)).mul_(self.scale)


class Coded(NamedTuple):
    """One batch through the SAE."""

    reconstruction: Float[Tensor, "token d_model"]
    """normalised units"""
    values: Float[Tensor, " active"]
    """the active entries' values"""
    active: Active
    """where they are"""
    thresholds: tuple[float, ...]
    """smallest active entry of each block"""


class BatchTopK(nn.Module):
    """A sparse autoencoder that keeps, in each block, the largest entries of a whole batch.

        a     = ReLU(W_enc (x - b_dec) + b_enc)
        z     = a where a is among the k_b * B largest of its block b in the batch, else 0
        x_hat = z W_dec + b_dec                                      rows of W_dec have unit norm

    Two blocks, H (features 0 .. block_size - 1) and L (the rest), with k_H + k_L = k, or one. At inference
    an entry is active if it exceeds its block's threshold (`calibrate`, `to_inference`). Only the encoder's
    forward product is dense (`tcsae.train.sae.sparse`).

    Parameters
    ----------
    d_in, d_sae
        widths D and F
    block_size, block_k
        features of block H and its share of ``k``; both 0: one block
    k
        active features per token
    generator
        draws the initial decoder, uniform on the sphere; the encoder begins as its transpose
    """

    def __init__(
        self, d_in: int, d_sae: int, *, k: int, block_size: int, block_k: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        rows = normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.block_size = block_size
        split = (Block(0, block_size, block_k), Block(block_size, d_sae, k - block_k))
        self.blocks: tuple[Block, ...] = split if block_size else (Block(0, d_sae, k),)
        self.thresholds: Tensor
        self.silent: Tensor
        # float64: what is read from it must survive a checkpoint exactly as Python floats.
        self.register_buffer("thresholds", torch.zeros(len(self.blocks), dtype=torch.float64))
        self.register_buffer("silent", torch.zeros(d_sae, dtype=torch.int64))

    @property
    def block_names(self) -> tuple[str, ...]:
        """What the terms of each of `blocks` end in."""
        return ("h", "l") if self.block_size else ("l",)

    @property
    def bias(self) -> Float[Tensor, " feature"]:
        """b_enc - W_enc b_dec: the encoder is x W_enc^T + bias."""
        return self.b_enc - self.W_enc @ self.b_dec

    def preactivations(
        self, x: Float[Tensor, "token d_model"], linear: Linear, out: Tensor | None = None
    ) -> Float[Tensor, "token feature"]:
        """W_enc (x - b_dec) + b_enc for every feature, without gradient; into ``out`` where given."""
        with torch.no_grad():
            return linear(x, self.W_enc, self.bias, out)

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
        guess = tuple(GUESS * bound for bound in self.thresholds.tolist())
        kept = keep_largest(pre, self.blocks, n_valid, guess)
        active = active_entries(kept.token, kept.feature, *pre.shape)
        values = encode_active(kept.values, x, self.W_enc, self.bias, active)
        reconstruction = decode_active(values, self.W_dec, active) + self.b_dec
        return Coded(reconstruction, values, active, kept.thresholds)

    def block_encoder(self) -> tuple[Float[Tensor, "block d_model"], Float[Tensor, " block"]]:
        """Weight and bias, with gradient, of the block's code before top-k, ReLU(x W^T + bias)."""
        W, b = self.W_enc[: self.block_size], self.b_enc[: self.block_size]
        return W, b - W @ self.b_dec

    def dead(self, dead_after: int) -> list[Int64[Tensor, " feature"]]:
        """For each block, its features that have not fired for ``dead_after`` tokens."""
        silent = self.silent >= dead_after
        return [silent[b.start : b.stop].nonzero().flatten() + b.start for b in self.blocks]

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from W_dec's gradient the part along each row, which only the norm would feel."""
        grad = self.W_dec.grad
        if grad is not None:
            grad.addcmul_((grad * self.W_dec).sum(dim=1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def after_step(self, coded: Coded, n_tokens: int) -> None:
        """Give W_dec's rows unit norm again; update the dead counters and running thresholds."""
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))
        self.silent += n_tokens
        self.silent[coded.active.feature] = 0
        for i, newest in enumerate(coded.thresholds):
            old = float(self.thresholds[i])
            self.thresholds[i] = old + THRESHOLD_RATE * (newest - old) if old > 0 else newest

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "token d_model"]], linear: Linear) -> None:
        """Set each block's threshold so that over all of ``batches`` it keeps k_b entries per token.

        That is one quantile over them together. The running thresholds follow weights that still change,
        and the mean of the batches' own thresholds is not the threshold of their union.
        """
        found: list[list[Tensor]] = [[] for _ in self.blocks]
        n_tokens = 0
        for x in batches:
            pre = self.preactivations(x, linear)
            n_tokens += len(x)
            for block, values in zip(self.blocks, found, strict=True):
                part = pre[:, block.start : block.stop].flatten()
                # Twice the budget of each batch: the union's threshold is hardly below that of a batch.
                values.append(part.topk(min(len(part), 2 * block.k * len(x)), sorted=False).values)
        for i, (block, values) in enumerate(zip(self.blocks, found, strict=True)):
            every = torch.cat(values)
            budget = block.k * n_tokens
            self.thresholds[i] = max(
                every.topk(min(budget, len(every)), sorted=False).values.min().item(), 0.0
            )

    def to_inference(self, scaler: Scaler, *, name: str, metadata: dict[str, Any]) -> SAE:
        """The same function of raw activations, as a JumpReLU SAE with the scaler folded in.

        With y = (x - mean) s the code of y is z; the folded SAE's code of x is z / s, so decoding needs no
        scale: x_hat = (z W_dec + b_dec) / s + mean.
        """
        per_feature = [
            torch.full((b.stop - b.start,), bound)
            for b, bound in zip(self.blocks, self.thresholds.tolist(), strict=True)
        ]
        return SAE(
            architecture="jumprelu",
            W_enc=self.W_enc.detach().cpu().T.contiguous(),
            b_enc=self.b_enc.detach().cpu() / scaler.scale,
            W_dec=self.W_dec.detach().cpu().clone(),
            b_dec=scaler.mean + self.b_dec.detach().cpu() / scaler.scale,
            threshold=torch.cat(per_feature) / scaler.scale,
            block_size=self.block_size,
            name=name,
            metadata=metadata,
        )
