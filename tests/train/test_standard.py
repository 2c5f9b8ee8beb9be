"""ReLU with an L1 penalty, and its batch normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from tcsae.tests.train.architectures import (
    D_IN,
    N_TOKENS,
    ArchitectureTests,
    Slow,
    decoder_weighted_l1,
    rows,
    some_valid,
    unexplained,
)
from tcsae.train.precision import float32_linear


class TestStandard(ArchitectureTests):
    options: ClassVar = {"architecture": "standard", "sparsity_weight": 0.1}

    def slow(self, sae: Any, x: Tensor, valid: Tensor) -> Slow:
        code = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu() * valid[:, None]
        reconstruction = code @ sae.W_dec + sae.b_dec
        fit = unexplained(x, reconstruction, valid)
        return Slow(code, reconstruction, fit, decoder_weighted_l1(code, sae.W_dec, int(valid.sum())))

    def test_a_decoder_of_any_norm_is_trained_and_saved_with_unit_rows(self, tmp_path: Path) -> None:
        self.compare_with_slow(unit_norm_decoder=False, initialisation="xavier")
        self.compare_with_saved(tmp_path, unit_norm_decoder=False)

    def test_nothing_is_gained_by_a_small_code_and_large_rows(self) -> None:
        sae, x = self.make(unit_norm_decoder=False), rows()
        valid = torch.ones(N_TOKENS) > 0
        before = sae.losses(x, sae(x, valid), valid.double())
        with torch.no_grad():
            sae.W_enc /= 10
            sae.b_enc /= 10
            sae.W_dec *= 10
        after = sae.losses(x, sae(x, valid), valid.double())
        torch.testing.assert_close(after, before)

    def test_the_penalty_is_the_l1_norm_of_activations_of_unit_mean_square(self) -> None:
        # Three unit rows and the code (2, 0, 4).
        sae = self.make(expansion=3 / D_IN, k=1)
        with torch.no_grad():
            sae.W_enc.zero_()
            sae.b_enc.copy_(torch.tensor([2.0, -1.0, 4.0]))
        x = rows(1)
        assert sae(x, torch.ones(1) > 0).sparsity.item() == pytest.approx(6 / D_IN**0.5)


class TestBatchNorm(ArchitectureTests):
    options: ClassVar = {
        "architecture": "standard",
        "batch_norm": True,
        "unit_norm_decoder": False,
        "sparsity_weight": 0.1,
    }

    def slow(self, sae: Any, x: Tensor, valid: Tensor) -> Slow:
        pre = (x - sae.b_dec) @ sae.W_enc.T + 3.0  # a bias before the normalisation makes no difference
        normed = batch_norm(
            pre[valid], None, None, sae.input_norm.gain, sae.b_enc, training=True, eps=1e-5
        ).relu()
        code = torch.zeros_like(pre).index_put((valid.nonzero().flatten(),), normed)
        decoded = code[valid] @ sae.W_dec
        whole = batch_norm(decoded, None, None, sae.output_norm.gain, sae.b_dec, training=True, eps=1e-5)
        reconstruction = torch.zeros_like(x).index_put((valid.nonzero().flatten(),), whole)
        scale = sae.output_norm.gain / (decoded.var(dim=0, correction=0) + 1e-5).sqrt()
        sparsity = decoder_weighted_l1(code, sae.W_dec * scale, int(valid.sum()))
        return Slow(code, reconstruction, unexplained(x, reconstruction, valid), sparsity)

    def test_the_running_statistics_are_those_of_batch_normalisation(self) -> None:
        sae, valid = self.make(), some_valid()
        other = torch.nn.BatchNorm1d(D_IN, dtype=torch.float64)
        for seed in range(3):
            x = rows(seed=seed) + seed
            with torch.no_grad():
                decoded = self.slow(sae, x, valid).code[valid] @ sae.W_dec
            sae(x, valid)
            # Ours begin with the first batch; torch's variance is the unbiased one.
            other.momentum = 1.0 if seed == 0 else 0.1
            other(decoded)
        n = int(valid.sum())
        torch.testing.assert_close(sae.output_norm.mean, other.running_mean)
        torch.testing.assert_close(sae.output_norm.variance, other.running_var * (n - 1) / n)
        x = torch.cat([rows(seed=seed)[valid] + seed for seed in range(3)])
        by_hand = rows(seed=0)[valid].mean(dim=0)
        for seed in (1, 2):
            by_hand = 0.9 * by_hand + 0.1 * (rows(seed=seed)[valid] + seed).mean(dim=0)
        torch.testing.assert_close(sae.input_norm.mean, by_hand)

    def test_calibration_leaves_nothing_of_the_running_statistics(self) -> None:
        sae, other, x = self.make(), self.make(), rows(90)
        sae(rows(seed=7) * 3 + 1, some_valid())
        for one in (sae, other):
            one.calibrate([x[:30], x[30:]], float32_linear)
        for name, buffer in sae.named_buffers():
            torch.testing.assert_close(buffer, dict(other.named_buffers())[name], msg=name)
        # The statistics of both batches together: as if they were one.
        code = self.slow(sae, x, torch.ones(90) > 0).code
        torch.testing.assert_close(sae.preactivations(x, float32_linear).relu(), code)

    def test_nothing_is_gained_by_a_small_code(self) -> None:
        # The output's normalisation undoes the scale of the code; the penalty must not reward it.
        sae, x = self.make(), rows()
        valid = torch.ones(N_TOKENS) > 0
        before = sae.losses(x, sae(x, valid), valid.double())
        with torch.no_grad():
            sae.input_norm.gain /= 10
            sae.b_enc /= 10
        after = sae.losses(x, sae(x, valid), valid.double())
        torch.testing.assert_close(after, before, rtol=1e-2, atol=0)
