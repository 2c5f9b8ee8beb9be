"""The temporal term of an arm: which codes of which pairs go into which loss."""

from __future__ import annotations

import torch
from torch import Tensor

from tcsae.train.batches import Rows
from tcsae.train.config import ArmConfig
from tcsae.train.losses import Contrast, info_nce
from tcsae.train.pairs import Pairs
from tcsae.train.precision import Linear
from tcsae.train.ring import Ring
from tcsae.train.sae.base import TrainableSAE
from tcsae.train.sae.code import Coded
from tcsae.train.scaler import Scaler


def temporal_term(
    config: ArmConfig,
    sae: TrainableSAE,
    coded: Coded,
    batch: Rows,
    pairs: Pairs,
    ring: Ring,
    scaler: Scaler,
    linear: Linear,
    *,
    detailed: bool,
    learn: bool,
) -> Contrast:
    """The term that ``config`` asks for, over ``pairs`` of ``batch``, with gradient if ``learn``.

    ``detailed`` also measures what costs extra (see `tcsae.train.losses.info_nce`).
    """
    device = batch.x.device
    anchor = torch.from_numpy(pairs.anchor).to(device)
    positive = torch.from_numpy(pairs.positive).to(device)
    with torch.set_grad_enabled(learn):
        W, bias = sae.encoder_of(slice(0, sae.block_size))
        frozen_W, frozen_bias = W.detach(), bias.detach()

        def encode(raw: Tensor) -> Tensor:
            return linear(scaler.normalise(raw), frozen_W, frozen_bias).relu_()

        return info_nce(
            linear(batch.x[anchor], W, bias).relu(),
            linear(batch.x[positive], W, bias).relu(),
            torch.from_numpy(batch.document[pairs.anchor]).to(device),
            torch.from_numpy(batch.source[pairs.anchor]).to(device),
            ring.keys(encode),
            config.temperature,
            within_source=detailed,
        )
