"""What a change of the logits costs: KL divergence and next-token cross-entropy at each position.

Everything is in float32 (`log_softmax`, never log of softmax) for one row of a batch at a time, so that
beside the logits themselves only one row's worth of scratch is needed; sums over tokens are the caller's, in
float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

UNDERFLOW_GAP = 80.0
"""Nats below the largest logit from which float32's softmax may be 0 (it is at 87 to 104)."""


def log_softmax_(logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, "batch position vocab"]:
    """Turn ``logits`` into log-probabilities in place, a row at a time; returns its argument."""
    for row in logits:
        row.copy_(torch.log_softmax(row, dim=-1))
    return logits


def kl_divergence(
    clean: Float[Tensor, "position vocab"], other: Float[Tensor, "position vocab"]
) -> Float[Tensor, " position"]:
    """KL(clean || other) in nats at each position, from log-probabilities.

    >>> half, skew = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(kl_divergence(half, skew).item(), 4)
    0.1438
    """
    # not kl_div(log_target=True): nine times slower here (54 ms against 6 ms for 128 x 49152)
    return (clean.exp() * (clean - other)).sum(dim=-1)


def saebench_kl(
    clean: Float[Tensor, "position vocab"],
    other: Float[Tensor, "position vocab"],
    *,
    kl: Float[Tensor, " kept"],
    kept: Bool[Tensor, " position"],
) -> Float[Tensor, " kept"]:
    """KL at the kept positions as SAEBench computes it: NaN or infinite where float32's softmax underflows.

    Through log(softmax(.)) it equals ``kl`` (of `kl_divergence`) unless some log-probability lies more than
    `UNDERFLOW_GAP` below the largest; only those positions are computed its way. Log-probabilities have the
    same softmax as the logits they came from.
    """
    doubtful = torch.nonzero(_gap(clean).maximum(_gap(other))[kept] > UNDERFLOW_GAP).flatten()
    if not len(doubtful):
        return kl
    result = kl.clone()
    positions = torch.nonzero(kept).flatten()
    for at in doubtful.tolist():
        p = torch.softmax(clean[positions[at]], dim=-1)
        q = torch.softmax(other[positions[at]], dim=-1)
        result[at] = (p * (p.log() - q.log())).sum()
    return result


def _gap(log_probs: Float[Tensor, "position vocab"]) -> Float[Tensor, " position"]:
    return log_probs.amax(dim=-1) - log_probs.amin(dim=-1)


def next_token_loss(
    log_probs: Float[Tensor, "position vocab"], tokens: Int64[Tensor, " position"]
) -> Float[Tensor, " target"]:
    """Cross-entropy in nats of predicting token t + 1 at t; one shorter than ``tokens``."""
    return -log_probs[:-1].gather(-1, tokens[1:, None]).squeeze(-1)
