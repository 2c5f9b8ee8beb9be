"""BatchTopK's selection against sorting."""

from __future__ import annotations

import pytest
import torch

from tcsae.train.sae.select import SAMPLED, Block, keep_largest

BLOCKS = (Block(0, 6, 2), Block(6, 20, 3))


@pytest.mark.parametrize("guess", [(0.0, 0.0), (0.3, 0.3), (9.0, 0.1)], ids=["none", "low", "far too high"])
def test_each_block_keeps_its_budget_of_largest_entries_whatever_the_guess(guess: tuple[float, ...]) -> None:
    pre = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    kept = keep_largest(pre, BLOCKS, 30, guess)
    code = torch.zeros_like(pre)
    code[kept.token, kept.feature] = kept.values
    for block, threshold in zip(BLOCKS, kept.thresholds, strict=True):
        part = pre[:, block.start : block.stop]
        largest = part.flatten().sort(descending=True).values[: 30 * block.k]
        assert threshold == largest[-1]
        expected = torch.where(part >= largest[-1], part, 0)
        assert torch.equal(code[:, block.start : block.stop], expected)
    order = kept.token * 20 + kept.feature
    assert torch.equal(order, order.sort().values)


@pytest.mark.parametrize("louder", [1.0, 50.0, 0.02], ids=["like the rest", "far louder", "far quieter"])
def test_a_sample_that_misleads_changes_nothing(louder: float) -> None:
    pre = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    pre[::SAMPLED] *= louder
    kept = keep_largest(pre, (Block(0, 20, 3),), 64, (0.0,))
    largest = pre.flatten().sort(descending=True).values[: 64 * 3]
    assert kept.thresholds == (largest[-1],)
    assert torch.equal(kept.values.sort(descending=True).values, largest)


def test_without_enough_positive_entries_all_of_them_are_kept() -> None:
    pre = torch.tensor([[1.0, -1.0, -2.0], [-1.0, 0.0, 2.0]])
    kept = keep_largest(pre, (Block(0, 3, 2),), 2, (0.5,))
    assert kept.values.tolist() == [1.0, 2.0]
    assert kept.thresholds == (0.0,)


def test_nothing_positive_is_an_empty_selection() -> None:
    assert len(keep_largest(-torch.ones(4, 20), BLOCKS, 4, (0.0, 0.0)).values) == 0
