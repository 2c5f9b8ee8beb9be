"""JumpReLU: its step against the paper's formulas, the straight-through gradients written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tcsae.tests.train.architectures import (
    N_TOKENS,
    ArchitectureTests,
    Slow,
    rows,
    unexplained,
)


class TestJumpReLU(ArchitectureTests):
    options: ClassVar = {
        "architecture": "jumprelu",
        "bandwidth": 0.4,
        "initial_threshold": 0.3,
        "sparsity_weight": 0.1,
    }

    def slow(self, sae: Any, x: Tensor, valid: Tensor) -> Slow:
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        code = pre * (pre > sae.threshold) * valid[:, None]
        reconstruction = code @ sae.W_dec + sae.b_dec
        sparsity = code.new_zeros(())
        for b in sae.blocks:
            l0 = (code[:, b.start : b.stop] > 0).sum() / valid.sum()
            sparsity = sparsity + (l0 / b.k - 1) ** 2
        return Slow(code, reconstruction, unexplained(x, reconstruction, valid), sparsity)

    def gradients_by_hand(self, sae: Any, x: Tensor, valid: Tensor, slow: Slow) -> dict[str, Tensor]:
        pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
        width, n, total = 0.4, int(valid.sum()), x[valid].square().sum()
        found = torch.zeros_like(sae.threshold)
        for b in sae.blocks:
            l0 = int((slow.code[:, b.start : b.stop] > 0).sum()) / n
            for j in range(b.start, b.stop):
                t = sae.threshold[j].item()
                for i in valid.nonzero().flatten().tolist():
                    if abs(pre[i, j].item() - t) < width / 2:
                        of_fit = 2 * (slow.reconstruction[i] - x[i]) @ sae.W_dec[j] / total
                        of_step = 0.1 * 2 * (l0 / b.k - 1) / b.k / n
                        # The code that is given out holds what is active; |code|^2 sees no other entry.
                        of_square = 2 * slow.code[i, j]
                        found[j] -= (t * (of_fit + of_square) + of_step).item() / width
        return {"threshold": found}

    def test_a_decoder_of_any_norm_is_saved_with_unit_rows(self, tmp_path: Path) -> None:
        self.compare_with_saved(tmp_path, unit_norm_decoder=False)

    def test_the_penalty_moves_the_thresholds_towards_the_number_of_features(self) -> None:
        valid = torch.ones(N_TOKENS) > 0
        for threshold, sign in ((0.1, -1), (2.0, 1)):  # too many active, too few
            sae = self.make(initial_threshold=threshold)
            sae(rows(), valid).sparsity.backward()
            assert (sae.threshold.grad * sign >= 0).all()
            assert sae.threshold.grad.abs().max() > 0
            assert sae.W_enc.grad is None

    def test_thresholds_stay_at_0_or_above(self) -> None:
        sae = self.make(initial_threshold=0.0)
        assert sae.threshold.min() < 0
        sae.after_step(sae(rows(), torch.ones(N_TOKENS) > 0), N_TOKENS)
        assert sae.threshold.min() == 0
