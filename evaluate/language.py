"""What a change of the logits costs: KL divergence and next-token cross-entropy at each position.

Everything is in float32 (`log_softmax`, never log of softmax); sums over tokens are the caller's, in float64.
A few positions are done at a time: beside the logits themselves only a few megabytes are needed, which stay in
the cache. (One row of 128 positions and 49,152 tokens at a time, 25 MB, takes ten times as long: every
temporary is new memory then.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

UNDERFLOW = -80.0
"""Log-probability, in nats, below which float32's softmax may be 0 (it is at -87 to -104)."""

POSITIONS_AT_ONCE = 16
"""Positions that are gone through together: 3 MB of a vocabulary of 49,152."""


def log_softmax_(logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, "batch position vocab"]:
    """Turn ``logits`` into log-probabilities in place; returns its argument."""
    for row in logits:
        for few in row.split(POSITIONS_AT_ONCE):
            few.copy_(torch.log_softmax(few, dim=-1))
    return logits


def kl_divergence(
    clean: Float[Tensor, "position vocab"], other: Float[Tensor, "position vocab"]
) -> Float[Tensor, " position"]:
    """KL(clean || other) in nats at each position, from log-probabilities.

    >>> half, skew = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(kl_divergence(half, skew).item(), 4)
    0.1438
    """
    return kl_divergences(clean, [other])[0]


def kl_divergences(
    clean: Float[Tensor, "position vocab"], others: Sequence[Float[Tensor, "position vocab"]]
) -> Float[Tensor, "variant position"]:
    """`kl_divergence` of several others at once, which share the exponential of ``clean``."""
    found = clean.new_empty(len(others), len(clean))
    for start in range(0, len(clean), POSITIONS_AT_ONCE):
        few = slice(start, start + POSITIONS_AT_ONCE)
        p = clean[few].exp()
        for variant, other in enumerate(others):
            # not kl_div(log_target=True): nine times slower
            found[variant, few] = (clean[few] - other[few]).mul_(p).sum(dim=-1)
    return found


def saebench_kl(
    clean: Float[Tensor, "position vocab"],
    other: Float[Tensor, "position vocab"],
    *,
    kl: Float[Tensor, " kept"],
    kept: Bool[Tensor, " position"],
) -> Float[Tensor, " kept"]:
    """KL at the kept positions as SAEBench computes it: NaN or infinite where float32's softmax underflows.

    Through log(softmax(.)) it equals ``kl`` (of `kl_divergence`) unless some log-probability lies below
    `UNDERFLOW`; only those positions are computed its way. Log-probabilities have the same softmax as the
    logits they came from.
    """
    least = _least(clean).minimum(_least(other))
    doubtful = torch.nonzero(least[kept] < UNDERFLOW).flatten()
    if not len(doubtful):
        return kl
    result = kl.clone()
    positions = torch.nonzero(kept).flatten()
    for at in doubtful.tolist():
        p = torch.softmax(clean[positions[at]], dim=-1)
        q = torch.softmax(other[positions[at]], dim=-1)
        result[at] = (p * (p.log() - q.log())).sum()
    return result


def _least(log_probs: Float[Tensor, "position vocab"]) -> Float[Tensor, " position"]:
    """The smallest log-probability at each position."""
    return log_probs.amin(dim=-1)


def next_token_loss(
    log_probs: Float[Tensor, "batch position vocab"], tokens: Int64[Tensor, "batch position"]
) -> Float[Tensor, "batch target"]:
    """Cross-entropy in nats of predicting token t + 1 at t; one shorter than ``tokens``."""
    return -log_probs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
