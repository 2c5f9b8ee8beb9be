"""What is done to the selected features: clamped to a negative value wherever they fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.unlearning.select import NUMBERS, THRESHOLDS, Activity, matched_controls, select

MULTIPLES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""m: a feature is clamped to -m times its own mean active value."""

Kind = Literal["selected", "control"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Setting:
    """One intervention."""

    kind: Kind
    """picked by SAEBench's rule, or random ones that fire as often"""
    threshold: float
    """of the density on the retain documents"""
    n_wanted: int
    """features asked for; ``features`` may be fewer"""
    multiple: float
    """m"""
    features: tuple[int, ...]
    """which are clamped"""


def settings_of(activity: Activity, seed: int, multiples: Sequence[float] = MULTIPLES) -> list[Setting]:
    """All settings: thresholds x numbers x multiples, of the selected features and then of the controls."""
    of_kind: dict[Kind, list[Setting]] = {"selected": [], "control": []}
    for threshold in THRESHOLDS:
        most = select(activity, threshold, max(NUMBERS))
        chosen: dict[Kind, tuple[int, ...]] = {
            "selected": most,
            "control": matched_controls(activity, most, seed),
        }
        for kind, features in chosen.items():
            of_kind[kind] += [
                Setting(kind, threshold, number, multiple, features[:number])
                for number in NUMBERS
                for multiple in multiples
            ]
    return of_kind["selected"] + of_kind["control"]


def clamp_change(
    f: Float[Tensor, "*rows clamped"],
    to: Float[Tensor, " clamped"],
    directions: Float[Tensor, "clamped d_model"],
) -> Float[Tensor, "*rows d_model"]:
    """What clamping adds to the activations: decode(f') - decode(f) with f' = ``to`` where f > 0.

    Added to x this is decode(f') + (x - decode(f)): the reconstruction's error stays. Exactly 0 in rows
    where nothing fires, which the sum of the two decodings is not.

    >>> f, to = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([-1.0, -5.0])
    >>> clamp_change(f, to, torch.eye(2))
    tensor([[-3.,  0.],
            [ 0.,  0.]])
    """
    return torch.where(f > 0, to - f, 0.0) @ directions
