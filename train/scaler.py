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

    def normalise(
        self, x: Float[Tensor, "token d_model"], out: Tensor | None = None
    ) -> Float32[Tensor, "token d_model"]:
        """Normalised float32 copy of raw activations; into ``out`` where given."""
        mean = self.mean.to(x.device)
        shifted = x.float() - mean if out is None else out.copy_(x).sub_(mean)
        return shifted.mul_(self.scale)
