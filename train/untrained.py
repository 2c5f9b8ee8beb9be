"""An arm before its first step: the initial weights of a trained SAE, as a reference to hold it against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.store.spec import HookStatistics
from tcsae.train.config import ArmConfig
from tcsae.train.median import geometric_median
from tcsae.train.precision import float32_linear
from tcsae.train.sae.build import build
from tcsae.train.sae.inference import SAE
from tcsae.train.scaler import Scaler
from tcsae.train.settings import from_values

CALIBRATION_ROWS = 2048
"""rows of a batch that thresholds are calibrated on together"""


@torch.no_grad()
def untrained_sae(
    recipe: Mapping[str, Any],
    seed: int,
    sample: Float[Tensor, "token d_model"],
    statistics: HookStatistics,
    *,
    name: str,
    where: str,
) -> SAE:
    """The SAE of ``recipe`` and ``seed`` with the weights that its training began with.

    Parameters
    ----------
    recipe
        the arm's settings, as an SAE's metadata has them; ``where`` names it in messages
    sample
        raw activations of train tokens, on which thresholds are calibrated as they are after training
    statistics
        of the hook: the scale that the arm was trained in

    Raises
    ------
    ConfigError
        the recipe has a field that this version does not know, or a value that cannot work
    """
    config = from_values(ArmConfig, recipe, where)
    sae = build(sample.shape[1], config, seed)
    scaler = Scaler.of(statistics)
    x = scaler.normalise(sample)
    if config.decoder_bias == "geometric_median":
        sae.b_dec.copy_(geometric_median(x))
    sae.calibrate(torch.split(x, CALIBRATION_ROWS), float32_linear)
    return sae.to_inference(scaler, name=name, metadata={})
