"""TopK: its selection against sorting, its step against full matrices."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tcsae.tests.train.architectures import ArchitectureTests, Slow, rows, unexplained
from tcsae.train.sae.per_token import keep_largest_of_each
from tcsae.train.sae.select import Block

BLOCKS = (Block(0, 6, 2), Block(6, 20, 3))


def kept_by_sorting(pre: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    code = torch.zeros_like(pre)
    for i in range(len(pre)):
        for start, stop, k in blocks:
            ranked = sorted(range(start, stop), key=lambda j: -pre[i, j].item())
            for j in ranked[:k]:
                code[i, j] = pre[i, j].relu()
    return code


@pytest.mark.parametrize(
    "guess", [(0.0, 0.0), (0.3, 0.3), (9.0, 0.1)], ids=["none", "low", "far too high for one block"]
)
def test_each_token_keeps_its_largest_entries_whatever_the_guess(guess: tuple[float, ...]) -> None:
    pre = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    pre[4] = -torch.inf  # a token that does not count
    pre[5] -= 2  # few positive entries
    kept = keep_largest_of_each(pre, BLOCKS, guess)
    code = torch.zeros_like(pre)
    code[kept.token, kept.feature] = kept.values
    assert torch.equal(code, kept_by_sorting(pre, BLOCKS))
    order = kept.token * 20 + kept.feature
    assert torch.equal(order, order.sort().values)
    for block, bounds in zip(BLOCKS, kept.thresholds, strict=True):
        part = pre[:, block.start : block.stop]
        assert torch.equal(bounds, part.sort(descending=True).values[:, block.k - 1].relu())


def test_entries_that_equal_the_smallest_kept_one_are_kept_too() -> None:
    kept = keep_largest_of_each(torch.tensor([[1.0, 2.0, 1.0, 0.5]]), (Block(0, 4, 2),), (0.0,))
    assert kept.feature.tolist() == [0, 1, 2]


def test_nothing_positive_is_an_empty_selection() -> None:
    assert len(keep_largest_of_each(-torch.ones(4, 20), BLOCKS, (0.0, 0.5)).values) == 0


class TestTopK(ArchitectureTests):
    options: ClassVar = {"architecture": "topk"}

    def slow(self, sae: Any, x: Tensor, valid: Tensor) -> Slow:
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        code = pre * (kept_by_sorting(pre.detach(), sae.blocks) > 0) * valid[:, None]
        reconstruction = code @ sae.W_dec + sae.b_dec
        return Slow(code, reconstruction, unexplained(x, reconstruction, valid), code.new_zeros(()))

    def at_inference(self, sae: Any, x: Tensor) -> Tensor:
        """With two blocks the thresholds, which keep k of each token on average."""
        if len(sae.blocks) == 1:
            return super().at_inference(sae, x)
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        code = torch.zeros_like(pre)
        for b in sae.blocks:
            part = pre[:, b.start : b.stop].relu()
            bound = part.flatten().sort(descending=True).values[b.k * len(x) - 1]
            code[:, b.start : b.stop] = torch.where(part >= bound, part, 0)
        return code

    def test_a_step_is_the_same_with_a_guess_from_the_steps_before(self) -> None:
        sae, x = self.make(block=True), rows()
        valid = torch.ones(len(x)) > 0
        first = sae(x, valid)
        sae.after_step(first, len(x))
        assert min(sae.running_thresholds) > 0
        with torch.no_grad():
            sae.W_dec.copy_(self.make(block=True).W_dec)
        torch.testing.assert_close(sae(x, valid).reconstruction, first.reconstruction)

    def test_without_a_block_the_saved_sae_is_a_top_k(self) -> None:
        assert self.make().parts().architecture == "topk"
        assert self.make(block=True).parts().architecture == "jumprelu"
