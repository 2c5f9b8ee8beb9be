"""A small store whose activations are sums of a few directions, some of which last for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.tests.train.small import SMALL_ARM
from tcsae.train import ArmConfig, TrainConfig

D_MODEL = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These products are far too small for two threads, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sticky_activations(lengths: list[int], seed: int = 0) -> torch.Tensor:
    """Rows of one direction that lasts for 24 rows of its document, three that are drawn anew, and noise."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(40, D_MODEL))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    documents = []
    for length in lengths:
        lasting = np.repeat(rng.integers(10, size=-(-length // 24)), 24)[:length]
        fresh = rng.integers(10, 40, size=(length, 3))
        strength = rng.uniform(2, 6, size=(length, 3, 1))
        rows = 5 * directions[lasting] + (strength * directions[fresh]).sum(axis=1)
        documents.append(rows + 0.1 * rng.normal(size=rows.shape))
    return torch.from_numpy(np.concatenate(documents) + 3.0).float()


@pytest.fixture
def sticky_store(make_store: Callable[..., ActivationStore]) -> ActivationStore:
    """Sixty documents of 30 to 89 rows in contexts of at most 25, about 3,500 rows, token ids 0 to 49."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(30, 90, size=60).tolist()
    tokens = rng.integers(50, size=sum(lengths))
    return make_store(sticky_activations(lengths), lengths, tokens=tokens)


@pytest.fixture
def small_config() -> Callable[..., TrainConfig]:
    """A configuration of a control and a contrastive arm that takes a second; arguments change its fields."""

    def make(*, arm: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        of_arms = SMALL_ARM | (arm or {})
        values: dict[str, Any] = {
            "arms": (ArmConfig(name="block", **of_arms), ArmConfig(name="tc8", alpha=0.1, **of_arms)),
            "tokens": 40 * 128,
            "batch_tokens": 128,
            "ring_size": 256,
            "ring_feed": 32,
            "min_position": 2,
            "log_every": 5,
            "checkpoint_every": 7,
            "precision": "float32",  # the same on every machine
            **changes,
        }
        return TrainConfig(**values)

    return make
