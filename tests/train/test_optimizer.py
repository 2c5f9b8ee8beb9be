"""The optimiser against torch's own, and what of a step outlives it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tcsae.store import ActivationStore
from tcsae.train import TrainConfig
from tcsae.train.optimizer import adam
from tcsae.train.training import Training


def test_steps_are_torchs_own_bit_for_bit_and_what_has_no_gradient_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator), torch.ones(2)]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in first] for _ in range(2))
    optimizers = adam(ours, 0.01), torch.optim.Adam(theirs, lr=0.01, betas=(0.9, 0.999), fused=True)
    for _ in range(5):
        gradients = [torch.randn(one.shape, generator=generator) for one in first[:2]]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=False):
                parameter.grad = gradient.clone()
            optimizer.step()
    for mine, other, before in zip(ours, theirs, first, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine, before) == (before is first[2])


def test_no_arm_keeps_its_gradients_while_the_others_step(
    sticky_store: ActivationStore, small_config: Callable[..., TrainConfig]
) -> None:
    training = Training(sticky_store, small_config(), torch.device("cpu"))
    assert len(training.arms) > 1
    training.step(detailed=True)
    assert all(parameter.grad is None for arm in training.arms for parameter in arm.sae.parameters())
