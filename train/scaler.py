"""Normalised units: what every SAE is trained in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tcsae.store.spec import HookStatistics


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
