"""The geometric median of activations, where a decoder's bias may begin (Bricken et al. 2023)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

SAMPLE_TOKENS = 8192
"""train tokens that the median is taken of"""

_MOST_STEPS = 200
_TOLERANCE = 1e-7
"""largest last step, relative to the points' mean distance from the median"""


@torch.no_grad()
def geometric_median(x: Float[Tensor, "token d_model"]) -> Float32[Tensor, " d_model"]:
    """The point with the smallest sum of distances to the rows of ``x``, by Weiszfeld's iteration.

        y <- sum_i x_i / d_i  /  sum_i 1 / d_i        with d_i = ||x_i - y||, beginning at the mean

    Unlike the mean it is not drawn away by a few far rows: here by one of three.

    >>> geometric_median(torch.tensor([[0.0], [1.0], [100.0]])).round(decimals=4)
    tensor([1.])
    """
    points = x.double()
    y = points.mean(dim=0)
    for _ in range(_MOST_STEPS):
        distance = torch.linalg.vector_norm(points - y, dim=1)
        size = float(distance.mean())
        if size == 0:
            break
        # A row at y itself would have an infinite weight; this far from it the sum is the same to float32.
        weight = 1 / distance.clamp(min=1e-9 * size)
        before, y = y, weight @ points / weight.sum()
        if float(torch.linalg.vector_norm(y - before)) <= _TOLERANCE * size:
            break
    return y.float()
