"""What every trainable SAE shares: weights, blocks, dead counters, and the folding into inference form.

Legend: B tokens, D d_model, F features, H features of the contrastive block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from tcsae.train.config import ArmConfig
from tcsae.train.losses import fvu
from tcsae.train.precision import Linear, float32_linear
from tcsae.train.sae.code import Coded, Sizes
from tcsae.train.sae.inference import SAE, Architecture
from tcsae.train.sae.initial import initial_weights
from tcsae.train.sae.select import Block
from tcsae.train.scaler import Scaler
from tcsae.train.world import ALONE, World


class Losses(NamedTuple):
    """An architecture's own terms of the objective."""

    fvu: Float[Tensor, ""]
    """fraction of variance unexplained of the whole reconstruction: what is logged"""
    fit: Float[Tensor, ""]
    """what is minimised of it: the same, or with an architecture's further reconstructions"""
    sparsity: Float[Tensor, ""]
    """unweighted; 0 where the architecture fixes how many features are active"""


class Parts(NamedTuple):
    """The trained function in normalised units, in the form of `tcsae.train.sae.inference.SAE`.

    pre = (x - b_dec) @ W_enc.T + b_enc;  x_hat = f @ W_dec + b_dec
    """

    architecture: Architecture
    W_enc: Float[Tensor, "feature d_model"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_model"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " feature"] | None = None
    k: int | None = None


class TrainableSAE(nn.Module, ABC):
    """A sparse autoencoder that is being trained, in normalised units.

    Features 0 .. block_size - 1 are block H, the rest block L; without a block all are one.

    Parameters
    ----------
    d_in
        width D of the activations
    config
        the arm; `ArmConfig.check_sizes` has accepted ``d_in``
    generator
        draws the initial weights: the same for every arm of one initialisation
    """

    def __init__(self, d_in: int, config: ArmConfig, generator: torch.Generator) -> None:
        super().__init__()
        d_sae, block_size, block_k = config.features(d_in), config.block_size(d_in), config.block_k
        W_enc, W_dec = initial_weights(config, d_in, generator)
        self.W_enc = nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.config = config
        self.world: World = ALONE
        """the processes that each give `forward` a slice of one batch"""
        self.block_size = block_size
        split = (Block(0, block_size, block_k), Block(block_size, d_sae, config.k - block_k))
        whole = (Block(0, d_sae, config.k),)
        self.blocks: tuple[Block, ...] = split if block_size else whole
        self.selections: tuple[Block, ...] = self.blocks if block_k else whole
        """what features compete for: each block has a budget of its own, or all share one"""
        self.silent: Tensor
        self.register_buffer("silent", torch.zeros(d_sae, dtype=torch.int64))

    @property
    def block_names(self) -> tuple[str, ...]:
        """What the terms of each of `blocks` end in."""
        return ("h", "l") if self.block_size else ("l",)

    @property
    def running_thresholds(self) -> Sequence[float]:
        """One for each block, for the log; empty where the architecture has none."""
        return ()

    @property
    def bias(self) -> Float[Tensor, " feature"]:
        """b_enc - W_enc b_dec: the encoder is x W_enc^T + bias."""
        return self.b_enc - self.W_enc @ self.b_dec

    def preactivations(
        self, x: Float[Tensor, "token d_model"], linear: Linear, out: Tensor | None = None
    ) -> Float[Tensor, "token feature"]:
        """W_enc (x - b_dec) + b_enc for every feature, without gradient; into ``out`` where given."""
        with torch.no_grad():
            return linear(x, *self.encoder_of(slice(None)), out)

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "token d_model"],
        valid: Bool[Tensor, " token"],
        linear: Linear = float32_linear,
        out: Tensor | None = None,
    ) -> Coded:
        """Code and reconstruct a batch; tokens that are not ``valid`` get no active entry.

        ``out`` is memory of [token, feature] that may be overwritten.
        """

    def losses(
        self,
        x: Float[Tensor, "token d_model"],
        coded: Coded,
        weight: Float[Tensor, " token"],
    ) -> Losses:
        """The terms that this architecture minimises; tokens are weighted by ``weight``, 0 or 1.

        Where `world` has several processes each gives the terms of its own slice. `fvu` and `fit` count by
        the slice's share of weight @ ||x||^2, `sparsity` by that of the tokens; what is not such a mean asks
        `world` for sums over the whole batch.
        """
        whole = fvu(x, coded.reconstruction, weight)
        sparsity = whole.new_zeros(()) if coded.sparsity is None else coded.sparsity
        return Losses(whole, self.fit(whole, [fvu(x, other, weight) for other in coded.further]), sparsity)

    def fit(self, whole: Float[Tensor, ""], further: list[Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """What is minimised of the FVU of the whole reconstruction and of ``Coded.further``."""
        del further
        return whole

    def encoder_of(
        self, features: slice | Int64[Tensor, " some"]
    ) -> tuple[Float[Tensor, "some d_model"], Float[Tensor, " some"]]:
        """Weight and bias, with gradient, of some features' code before selection, ReLU(x W^T + bias)."""
        W, b = self.W_enc[features], self.b_enc[features]
        return W, b - W @ self.b_dec

    def decoder_of(self, features: slice | Int64[Tensor, " some"]) -> Float[Tensor, "some d_model"]:
        """What one unit of some features adds to the reconstruction, with gradient."""
        return self.W_dec[features]

    @torch.no_grad()
    def sizes(self) -> Sizes:
        """How many times as large as in training each feature's code is in the saved SAE; None: not at all.

        The norms of the decoder's rows, which `to_inference` makes unit rows.
        """
        if self.config.unit_norm_decoder and not self.config.batch_norm:
            return None
        return _sizes(self.decoder_of(slice(None)))

    def dead(self, dead_after: int) -> list[Int64[Tensor, " feature"]]:
        """For each block, its features that have not fired for ``dead_after`` tokens."""
        silent = self.silent >= dead_after
        return [silent[b.start : b.stop].nonzero().flatten() + b.start for b in self.blocks]

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from W_dec's gradient the part along each row, which only the norm would feel."""
        grad = self.W_dec.grad
        if grad is not None and self.config.unit_norm_decoder:
            grad.addcmul_((grad * self.W_dec).sum(dim=1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def after_step(self, coded: Coded, n_tokens: int) -> None:
        """Give W_dec's rows unit norm again where that is asked for; update the dead counters.

        ``n_tokens`` are those of the whole batch, ``coded`` is this process's slice of it.
        """
        if self.config.unit_norm_decoder:
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))
        self.silent += n_tokens
        self.silent[self.world.any(coded.code.fired())] = 0

    def calibrate(self, batches: Iterable[Float[Tensor, "_ d_model"]], linear: Linear) -> None:
        """Fix what inference needs beside the weights, from train tokens; most architectures need nothing."""

    @abstractmethod
    def parts(self) -> Parts:
        """The trained function in normalised units."""

    @torch.no_grad()
    def to_inference(self, scaler: Scaler, *, name: str, metadata: dict[str, Any]) -> SAE:
        """The same function of raw activations, with the scaler and the decoder's norms folded in.

        With y = (x - mean) s the code of y is z; the folded SAE's code of x is z / s, so decoding needs no
        scale: x_hat = (z W_dec + b_dec) / s + mean. A row of W_dec of norm n becomes a unit row, and its
        feature's code n times as large. A feature whose row is 0 reconstructs nothing and keeps its code.
        """
        architecture, W_enc, b_enc, W_dec, b_dec, threshold, k = self.parts()
        size = _sizes(W_dec)
        # A top-k ranks its codes as they are.
        if k is not None and (size != 1).any():
            raise ValueError("a top-k SAE is exported with decoder rows of unit norm only")
        factor = size / scaler.scale
        return SAE(
            architecture=architecture,
            W_enc=(W_enc * size[:, None]).cpu().T.contiguous(),
            b_enc=(b_enc * factor).cpu(),
            W_dec=(W_dec / size[:, None]).cpu(),
            b_dec=scaler.mean + b_dec.cpu() / scaler.scale,
            threshold=None if threshold is None else (threshold * factor).cpu(),
            k=k,
            block_size=self.block_size,
            name=name,
            metadata=metadata,
        )


def _sizes(W_dec: Tensor) -> Tensor:
    """Norms of the rows; 1 for those that stay as they are: rows of 0, and of unit norm but for rounding."""
    norm = torch.linalg.vector_norm(W_dec, dim=1)
    return torch.where((norm > 0) & ((norm - 1).abs() > 1e-5), norm, torch.ones_like(norm))
