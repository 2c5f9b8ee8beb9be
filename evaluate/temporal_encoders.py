"""What a temporal pass measures: features of a block of whole contexts, an SAE's or what stands beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.heldout import Block
from tcsae.train.sae.inference import SAE

AVERAGE_TOKENS = 8.0
"""Of the moving average: a value falls to 1/e in that many."""


@runtime_checkable
class Encoder(Protocol):
    """Features of a block of whole contexts."""

    @property
    def name(self) -> str:
        """for messages"""

    @property
    def d_sae(self) -> int:
        """features"""

    @property
    def block_size(self) -> int:
        """of them in block H"""

    def __call__(self, block: Block) -> Float[Tensor, "row feature"]:
        """Activations, none below 0."""


@dataclass(frozen=True)
class SAEEncoder:
    """The features of an SAE."""

    sae: SAE

    @property
    def name(self) -> str:
        """for messages"""
        return self.sae.name

    @property
    def d_sae(self) -> int:
        """features"""
        return self.sae.d_sae

    @property
    def block_size(self) -> int:
        """of them in block H"""
        return self.sae.block_size

    def __call__(self, block: Block) -> Float[Tensor, "row feature"]:
        """Activations, none below 0."""
        return self.sae.encode(block.x.to(self.sae.device))


@dataclass(frozen=True)
class AveragedEncoder(SAEEncoder):
    """The moving average of an SAE's code, 0 where it does not pass the threshold."""

    threshold: float = 0.0

    @property
    def name(self) -> str:
        """for messages"""
        return f"{self.sae.name}, averaged"

    def __call__(self, block: Block) -> Float[Tensor, "row feature"]:
        """Activations, none below 0."""
        f = moving_average(super().__call__(block).cpu(), block.position.numpy(), AVERAGE_TOKENS)
        return f * (f > self.threshold)


def moving_average(
    f: Float[Tensor, "row feature"], position: np.ndarray, n_tokens: float
) -> Float[Tensor, "row feature"]:
    """g_t = a g_{t-1} + (1 - a) f_t with a = e^(-1 / ``n_tokens``), from 0 at the start of each context.

    >>> moving_average(torch.tensor([[1.0], [0.0], [1.0]]), np.array([0, 1, 0]), 1 / np.log(2)).T
    tensor([[0.5000, 0.2500, 0.5000]])
    """
    kept = float(np.exp(-1 / n_tokens))
    g = f * (1 - kept)
    for at in range(1, int(position.max()) + 1):
        here = torch.from_numpy(np.flatnonzero(position == at))  # one row a context
        g[here] += kept * g[here - 1]
    return g


def random_directions(d_in: int, d_sae: int, seed: int) -> Float[Tensor, "d_model feature"]:
    """Independent directions, of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(d_in, d_sae, generator=generator), dim=0)


def random_encoder(
    directions: Float[Tensor, "d_model feature"],
    mean: Float[Tensor, " d_model"],
    threshold: float,
    block_size: int,
) -> SAE:
    """An SAE with ``directions`` for its encoder and one threshold for all features."""
    d_sae = directions.shape[1]
    return SAE(
        architecture="jumprelu",
        W_enc=directions,
        b_enc=torch.zeros(d_sae),
        W_dec=directions.T.contiguous(),
        b_dec=mean,
        threshold=torch.full((d_sae,), threshold),
        block_size=block_size,
        name="random encoder",
    )
