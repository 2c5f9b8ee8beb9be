"""The temporal term of an arm: which codes of which pairs go into which loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from tcsae.store.errors import ConfigError
from tcsae.train.batches import Rows, WindowLoader
from tcsae.train.config import ArmConfig, TrainConfig
from tcsae.train.losses import Codes, Contrast, info_nce
from tcsae.train.pair_losses import difference, in_batch
from tcsae.train.pairs import Pairs
from tcsae.train.precision import Linear
from tcsae.train.ring import PIECE, Ring
from tcsae.train.sae.base import TrainableSAE
from tcsae.train.sae.code import Coded
from tcsae.train.scaler import Scaler

LANES = 16
"""Codes get empty features up to a multiple of this: products that write rows of 819 floats take 1.3 times as
long as those of 832, whose rows begin at cache lines."""

Encode = Callable[[Tensor, Tensor], Tensor]
"""x [token, d_model] in normalised units to its code, into memory for it [token, block]; no gradient"""


def check_data(arm: ArmConfig, config: TrainConfig, loader: WindowLoader, place: str) -> None:
    """Refuse a temporal term that could never have a pair, or never a negative, in the store at ``place``."""
    if arm.alpha == 0:
        return
    if loader.most_eligible < 2:
        raise ConfigError(
            f"{arm.name}: alpha is {arm.alpha}, but no context of {place}'s train split has two positions "
            f"from min_position = {config.min_position} on; lower min_position or harvest with a larger "
            "--context-length"
        )
    masks = arm.mask_documents and arm.objective != "difference"
    if not (masks or arm.positives == "other_document"):
        return
    needs = (
        "positives = other_document takes its positives"
        if arm.positives == "other_document"
        else f"objective = {arm.objective} takes its negatives"
    )
    if loader.n_documents < 2:
        raise ConfigError(
            f"{arm.name}: {needs} from other documents, but {place}'s train split has {loader.n_documents} "
            f"with a context of {config.window} tokens; expected at least 2; harvest more documents"
        )
    within_batch = arm.positives == "other_document" or arm.objective == "in_batch"
    if within_batch and config.batch_tokens < 2 * config.window:
        raise ConfigError(
            f"{arm.name}: {needs} from other documents of the batch, but batch_tokens = "
            f"{config.batch_tokens} is one window of {config.window} tokens; expected at least "
            f"{2 * config.window}"
        )


def temporal_term(
    config: ArmConfig,
    sae: TrainableSAE,
    coded: Coded,
    batch: Rows,
    pairs: Pairs,
    ring: Ring,
    scaler: Scaler,
    linear: Linear,
    dtype: torch.dtype,
    *,
    detailed: bool,
    learn: bool,
) -> Contrast:
    """The term that ``config`` asks for, over ``pairs`` of ``batch``, with gradient if ``learn``.

    ``dtype`` is that of the ring's codes and of their products with those of the pairs.
    ``detailed`` also measures the accuracies of a contrast. The ring's keys are coded as the pairs are; after
    top-k that is as the SAE would be saved now, since a key has no batch that could select for it (see
    `_encode_kept`).
    """
    device = batch.x.device
    used, where = np.unique(np.concatenate([pairs.anchor, pairs.positive]), return_inverse=True)
    at = torch.from_numpy(used).to(device)
    anchor, positive = torch.from_numpy(where).to(device).chunk(2)
    encode: Encode
    with torch.set_grad_enabled(learn):
        if config.contrasted_code == "before_top_k":
            W, bias = _in_lanes(*sae.encoder_of(slice(0, sae.block_size)))
            code = linear(batch.x[at], W, bias).relu()
            encode = _encode_all(W.detach().to(dtype), bias.detach().to(dtype), linear)
        else:
            kept = coded.code.rows(at, sae.block_size)
            code = pad(kept, (0, -kept.shape[1] % LANES))
            encode = _encode_kept(sae, linear)
        tokens = Codes(
            code,
            torch.from_numpy(batch.document[used]).to(device),
            torch.from_numpy(batch.source[used]).to(device),
        )
        if config.objective == "difference":
            return difference(tokens, anchor, positive, batch.x.shape[1])
        if config.objective == "in_batch":
            return in_batch(
                tokens,
                anchor,
                positive,
                config.temperature,
                similarity=config.similarity,
                mask_documents=config.mask_documents,
                detailed=detailed,
            )
        keys = _keys(ring, encode, scaler, code.shape[1], dtype)
        return info_nce(tokens, anchor, positive, keys, config.temperature, detailed=detailed)


def _keys(ring: Ring, encode: Encode, scaler: Scaler, width: int, dtype: torch.dtype) -> Iterable[Codes]:
    """The ring's items with codes of ``width`` features in ``dtype``, all pieces in the same memory.

    Fresh memory for every piece took a twelfth of the whole term: the system has to hand out its pages.
    """
    n = min(PIECE, ring.filled)
    x = scaler.mean.new_empty((n, ring.activations.shape[1]), device=ring.activations.device)
    code = x.new_empty((n, width), dtype=dtype)
    return ring.keys(lambda raw: encode(scaler.normalise(raw, x[: len(raw)]), code[: len(raw)]))


def _in_lanes(W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """An encoder with features that are always 0 after the last."""
    extra = -len(W) % LANES
    return pad(W, (0, 0, 0, extra)), pad(bias, (0, extra))


def _encode_all(W: Tensor, bias: Tensor, linear: Linear) -> Encode:
    """ReLU(x W^T + bias)."""
    return lambda x, out: linear(x, W, bias, out).relu_()


@torch.no_grad()
def _encode_kept(sae: TrainableSAE, linear: Linear) -> Encode:
    """Block H of the function that ``sae`` would be saved as, in normalised units.

    batchtopk, topk and matryoshka keep what exceeds the block's running threshold (a topk SAE with blocks is
    saved so, too), jumprelu and gated what exceeds a feature's own, standard all of ReLU's.
    """
    parts, block = sae.parts(), slice(0, sae.block_size)
    W, bias = _in_lanes(parts.W_enc[block], parts.b_enc[block] - parts.W_enc[block] @ parts.b_dec)
    if parts.threshold is None:
        return _encode_all(W, bias, linear)
    threshold = pad(parts.threshold[block], (0, len(W) - sae.block_size))
    return lambda x, out: _above(linear(x, W, bias, out).relu_(), threshold)


def _above(
    code: Float[Tensor, "token block"], threshold: Float[Tensor, " block"]
) -> Float[Tensor, "token block"]:
    """The entries above their feature's threshold; ``code`` is overwritten."""
    return code.mul_(code > threshold)
