"""From an arm's configuration to its SAE."""

from __future__ import annotations

import torch

from tcsae.train.config import ArmConfig, TrainedArchitecture
from tcsae.train.sae.base import TrainableSAE
from tcsae.train.sae.batch_topk import BatchTopK
from tcsae.train.sae.gated import Gated
from tcsae.train.sae.jumprelu import JumpReLU
from tcsae.train.sae.matryoshka import Matryoshka
from tcsae.train.sae.standard import Standard
from tcsae.train.sae.topk import TopK

CLASSES: dict[TrainedArchitecture, type[TrainableSAE]] = {
    "batchtopk": BatchTopK,
    "topk": TopK,
    "matryoshka": Matryoshka,
    "standard": Standard,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def build(d_in: int, config: ArmConfig, seed: int) -> TrainableSAE:
    """The SAE of ``config`` for activations of ``d_in`` dimensions; ``seed`` fixes its initial weights."""
    return CLASSES[config.architecture](d_in, config, torch.Generator().manual_seed(seed))
