"""The gated SAE, and that the JumpReLU SAE that is saved is the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tcsae.tests.train.architectures import ArchitectureTests, Slow, decoder_weighted_l1, unexplained


class TestGated(ArchitectureTests):
    options: ClassVar = {"architecture": "gated", "sparsity_weight": 0.1}

    def slow(self, sae: Any, x: Tensor, valid: Tensor) -> Slow:
        projected = (x - sae.b_dec) @ sae.W_enc.T
        gate = (projected + sae.b_enc).relu() * valid[:, None]
        magnitude = projected * sae.r_mag.exp() + sae.b_mag
        code = (gate > 0) * magnitude.relu()
        reconstruction = code @ sae.W_dec + sae.b_dec
        by_gate = gate @ sae.W_dec.detach() + sae.b_dec.detach()
        fit = unexplained(x, reconstruction, valid) + unexplained(x, by_gate, valid)
        return Slow(code, reconstruction, fit, decoder_weighted_l1(gate, sae.W_dec, int(valid.sum())))

    def test_a_decoder_of_any_norm_is_trained_and_saved_with_unit_rows(self, tmp_path: Path) -> None:
        self.compare_with_slow(unit_norm_decoder=False, initialisation="xavier")
        self.compare_with_saved(tmp_path, unit_norm_decoder=False)

    def test_gates_that_open_below_a_magnitude_of_0_save_no_negative_threshold(self) -> None:
        sae = self.make(sparse=False)
        threshold = sae.parts().threshold
        # Biases on both sides of 0 make b_mag - exp(r_mag) b_enc of both signs.
        by_hand = [
            max(0.0, m.item() - r.exp().item() * b.item())
            for m, r, b in zip(sae.b_mag, sae.r_mag, sae.b_enc, strict=True)
        ]
        assert threshold.tolist() == by_hand
        assert 0 < sum(t > 0 for t in by_hand) < len(by_hand)
