"""Floating-point operations of one step, counted from its products.

Counted as 2 for each multiplication and addition of

    dense     the encoder's product for every entry                            2 B D F
    sparse    for each of B L0 active entries: its part of the reconstruction and the gradients of its value, of its
              decoder row and of its encoder row                               8 D     (gated: 4 D for the gate's own)
    contrast  before top-k: the pairs' codes and their gradient                4 T D H
              info_nce: the ring's codes, the logits and their gradient        2 Q D H + 4 T Q H
              in_batch: the logits and their gradients                         6 A^2 H

with B tokens, D d_model, F features, H features of block H, A anchors, T = min(2 A, B) tokens of pairs, of which few
are the same, and Q tokens in the ring, which is taken to be full. Not counted: what is elementwise (selection, the
optimiser), AuxK, which depends on how many features are dead, and batch normalisation.
"""

from __future__ import annotations

from typing import NamedTuple

from tcsae.train.config import SELECTING, ArmConfig, TrainConfig


class Flop(NamedTuple):
    """Of one step of one SAE; see the module's table."""

    dense: float
    sparse: float
    contrast: float


def flop_per_step(arm: ArmConfig, run: TrainConfig, d_model: int, l0: float | None = None) -> Flop:
    """What a step of ``arm`` in ``run`` computes for activations of ``d_model`` dimensions.

    ``l0`` is needed for architectures that do not fix their active features per token (standard, gated); the
    others' is ``arm.k``.

    4 tokens of 2 dimensions, 8 features, 1 active: 2*4*2*8 dense and 8*4*1*2 sparse.

    >>> run = TrainConfig(arms=(ArmConfig(name="a", k=1, block_share=0.0, window=2, anchors=1),), batch_tokens=4)
    >>> flop_per_step(run.arms[0], run, d_model=2)
    Flop(dense=128.0, sparse=64.0, contrast=0.0)
    """
    n_tokens, n_features = run.batch_tokens, arm.features(d_model)
    active = float(arm.k) if l0 is None or arm.architecture in SELECTING else l0
    per_entry = 12 if arm.architecture == "gated" else 8
    return Flop(
        dense=2.0 * n_tokens * d_model * n_features,
        sparse=per_entry * n_tokens * active * d_model,
        contrast=_contrast(arm, run, d_model),
    )


def _contrast(arm: ArmConfig, run: TrainConfig, d_model: int) -> float:
    if arm.alpha == 0:
        return 0.0
    width, tokens = arm.block_size(d_model), min(2 * arm.anchors, run.batch_tokens)
    codes = 4.0 * tokens * d_model * width if arm.contrasted_code == "before_top_k" else 0.0
    if arm.objective == "info_nce":
        return codes + 2.0 * run.ring_size * d_model * width + 4.0 * tokens * run.ring_size * width
    if arm.objective == "in_batch":
        return codes + 6.0 * arm.anchors**2 * width
    return codes
