"""Operations of a step against counts by hand, and against what torch counts in a real step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tcsae.store import ActivationStore
from tcsae.train import ArmConfig, TrainConfig
from tcsae.train.flop import flop_per_step
from tcsae.train.training import Training

# D = 10 dimensions, F = 40 features, H = 8 of them, B = 64 tokens, A = 4 anchors so T = 8, Q = 100, k = 5.
ARM = ArmConfig(name="a", k=5, block_share=0.2, block_k_share=0.4, window=8, anchors=4, alpha=0.1)
DENSE, SPARSE, CODES = 2 * 64 * 10 * 40, 8 * 64 * 5 * 10, 4 * 8 * 10 * 8


@pytest.mark.parametrize(
    ("changes", "l0", "expected"),
    [
        ({"alpha": 0.0}, None, (DENSE, SPARSE, 0)),
        ({}, None, (DENSE, SPARSE, CODES + 2 * 100 * 10 * 8 + 4 * 8 * 100 * 8)),
        ({"objective": "in_batch"}, None, (DENSE, SPARSE, CODES + 6 * 16 * 8)),
        ({"objective": "in_batch", "contrasted_code": "after_top_k"}, None, (DENSE, SPARSE, 6 * 16 * 8)),
        ({"objective": "difference"}, None, (DENSE, SPARSE, CODES)),
        (
            {"architecture": "standard", "sparsity_weight": 0.1, "alpha": 0.0},
            7.5,
            (DENSE, 8 * 64 * 7.5 * 10, 0),
        ),
        ({"architecture": "gated", "sparsity_weight": 0.1, "alpha": 0.0}, 2.0, (DENSE, 12 * 64 * 2 * 10, 0)),
    ],
    ids=["no contrast", "ring", "in-batch", "in-batch after top-k", "difference", "standard", "gated"],
)
def test_a_step_counted_by_hand(
    changes: dict[str, object], l0: float | None, expected: tuple[float, float, float]
) -> None:
    arm = replace(ARM, **changes)  # type: ignore[arg-type]
    run = TrainConfig(arms=(arm,), batch_tokens=64, ring_size=100, ring_feed=10)
    assert flop_per_step(arm, run, 10, l0) == expected


def test_torch_counts_the_same_products_in_a_real_step(sticky_store: ActivationStore) -> None:
    arm = replace(ARM, k=4, block_k_share=0.25, aux_k=0, warmup_steps=2, anchors=16)
    counted = []
    for alpha in (0.0, 0.1):
        config = TrainConfig(
            arms=(replace(arm, alpha=alpha),),
            tokens=40 * 128,
            batch_tokens=128,
            ring_size=128,
            min_position=2,
            ring_feed=128,
        )
        training = Training(sticky_store, config, torch.device("cpu"))
        while training.ring.filled < 128:
            training.step(detailed=False)
        with FlopCounterMode(display=False) as counter:
            training.step(detailed=False)
        counted.append(counter.get_total_flops())
        expected = flop_per_step(config.arms[0], config, 16)
    # To torch sums over lists of entries are none. Codes are padded from 12 features to 16, and of the 32 tokens
    # of pairs a few are the same.
    assert counted[0] == pytest.approx(expected.dense, rel=0.02)
    assert counted[1] - counted[0] == pytest.approx(expected.contrast * 16 / 12, rel=0.1)
