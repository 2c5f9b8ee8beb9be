"""What every architecture has to do, as tests that a class for each inherits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from tcsae.tests.train.small import SMALL_ARM
from tcsae.train import load_sae, save_sae
from tcsae.train.config import SELECTING, ArmConfig
from tcsae.train.precision import float32_linear
from tcsae.train.sae.base import TrainableSAE
from tcsae.train.sae.build import build
from tcsae.train.sae.code import Coded, SparseCode
from tcsae.train.scaler import Scaler

D_IN, D_SAE, N_TOKENS = 8, 24, 40

OPTIONS: dict[str, dict[str, Any]] = {
    "batchtopk": {},
    "topk": {"architecture": "topk"},
    "matryoshka": {"architecture": "matryoshka", "prefix_shares": (0.25, 0.5)},
    "standard": {"architecture": "standard", "sparsity_weight": 0.2},
    "batch-norm": {"architecture": "standard", "batch_norm": True, "sparsity_weight": 0.2},
    "jumprelu": {"architecture": "jumprelu", "sparsity_weight": 0.3},
    "gated": {"architecture": "gated", "sparsity_weight": 0.2},
}
"""what a short run on the sticky store needs of each architecture, by a name"""


def every_architecture(**more: Any) -> tuple[ArmConfig, ...]:
    """An arm of each, small enough for the sticky store."""
    return tuple(ArmConfig(name=name, **(SMALL_ARM | options | more)) for name, options in OPTIONS.items())


class Slow(NamedTuple):
    """One batch by full matrices, differentiable, tokens that do not count included as zeros of the code."""

    code: Tensor
    reconstruction: Tensor
    fit: Tensor
    sparsity: Tensor


def rows(n: int = N_TOKENS, seed: int = 2) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_valid() -> Tensor:
    valid = torch.ones(N_TOKENS, dtype=torch.bool)
    valid[[3, 17]] = False
    return valid


def unexplained(x: Tensor, reconstruction: Tensor, valid: Tensor) -> Tensor:
    return (x - reconstruction)[valid].square().sum() / x[valid].square().sum()


def decoder_weighted_l1(code: Tensor, W_dec: Tensor, n: int) -> Tensor:
    """mean over tokens of sum_j z_j ||W_dec,j|| / sqrt(D), one feature after the other"""
    total = code.new_zeros(())
    for j in range(code.shape[1]):
        total = total + code[:, j].sum() * W_dec[j].square().sum().sqrt()
    return total / n / W_dec.shape[1] ** 0.5


class ArchitectureTests(ABC):
    """Subclasses say how to make the SAE and what it computes."""

    options: ClassVar[dict[str, Any]]
    """fields of `ArmConfig`, the architecture among them"""
    sparse_bias = -2.0
    """added to the encoder's bias where few entries are to be active"""

    @abstractmethod
    def slow(self, sae: Any, x: Tensor, valid: Tensor) -> Slow:
        """An independent implementation of a step's terms."""

    def at_inference(self, sae: Any, x: Tensor) -> Tensor:
        """The code of ``x`` that the saved SAE should give, in normalised units."""
        return self.slow(sae, x, torch.ones(len(x)) > 0).code

    def gradients_by_hand(self, sae: Any, x: Tensor, valid: Tensor, slow: Slow) -> dict[str, Tensor]:
        """Of fit + sparsity / 10 + |code|^2 for parameters whose gradient autograd does not know."""
        return {}

    def make(self, *, block: bool = False, sparse: bool = False, **more: Any) -> Any:
        """An SAE with all parameters away from their defaults, in float64."""
        config = ArmConfig(
            name="a",
            block_share=0.25 if block else 0.0,
            block_k_share=0.2,
            **({"expansion": D_SAE / D_IN, "k": 5} | self.options | more),
        )
        sae = build(D_IN, config, 0).double()
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                if parameter.ndim == 1:
                    noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                    parameter += 0.05 * noise
                elif name == "W_dec" and not config.unit_norm_decoder:
                    parameter *= torch.rand(D_SAE, 1, generator=draw, dtype=torch.float64) + 0.5
            if sparse:
                sae.b_enc += self.sparse_bias
        return sae

    @pytest.mark.parametrize("sparse", [False, True], ids=["many active", "few active"])
    @pytest.mark.parametrize("block", [False, True], ids=["one block", "two blocks"])
    def test_a_step_is_that_of_the_slow_implementation(self, block: bool, sparse: bool) -> None:
        coded = self.compare_with_slow(block=block, sparse=sparse)
        # Where many are active only those that select list them.
        assert isinstance(coded.code, SparseCode) == (sparse or self.options["architecture"] in SELECTING)

    def compare_with_slow(self, **how: Any) -> Coded:
        x, valid = rows(), some_valid()
        x[3], x[17] = 1000.0, 0.0  # an outlier that would take every budget
        fast, slow = self.make(**how), self.make(**how)
        out = torch.empty(N_TOKENS, D_SAE, dtype=torch.float64)
        coded: Coded = fast(x, valid, float32_linear, out)
        expected = self.slow(slow, x, valid)
        code = coded.code.rows(torch.arange(N_TOKENS), D_SAE)
        losses = fast.losses(x, coded, valid.double())
        for found, wanted in (
            (code, expected.code),
            (coded.reconstruction[valid], expected.reconstruction[valid]),
            (losses.fvu, unexplained(x, expected.reconstruction, valid)),
            (losses.fit, expected.fit),
            (losses.sparsity, expected.sparsity),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        assert not code[~valid].any()
        for start, stop in ((0, 6), (0, D_SAE)):
            part = expected.code.detach()[:, start:stop]
            assert coded.code.count(start, stop) == int((part > 0).sum()) > 0
            assert coded.code.energy(start, stop) == pytest.approx(part.square().sum().item())
        assert coded.code.total() == pytest.approx(expected.code.sum().item())
        factor = torch.arange(D_SAE, dtype=torch.float64) / 7
        sized = expected.code.detach() * factor
        assert coded.code.total(factor) == pytest.approx(sized.sum().item())
        assert coded.code.energy(2, 9, factor) == pytest.approx(sized[:, 2:9].square().sum().item())
        assert torch.equal(coded.code.fired(), (expected.code > 0).any(dim=0))
        # The last term gives the active values a gradient of their own.
        (losses.fit + losses.sparsity / 10 + code.square().sum()).backward()
        (expected.fit + expected.sparsity / 10 + expected.code.square().sum()).backward()
        by_hand = self.gradients_by_hand(slow, x, valid, expected)
        for (name, a), (_, b) in zip(fast.named_parameters(), slow.named_parameters(), strict=True):
            wanted = by_hand.get(name, b.grad)
            assert a.grad is not None, name
            torch.testing.assert_close(a.grad, wanted, rtol=1e-6, atol=1e-9, msg=name)
            assert a.grad.abs().max() > 1e-6, name
        return coded

    def test_the_encoder_of_some_features_is_that_of_the_preactivations(self) -> None:
        sae, x = self.make(block=True), rows()
        sae(x, torch.ones(N_TOKENS) > 0)
        every = sae.preactivations(x, float32_linear)
        for features in (slice(0, 6), torch.tensor([7, 2, 23])):
            W, bias = sae.encoder_of(features)
            torch.testing.assert_close(x @ W.T + bias, every[:, features])
            assert W.requires_grad
            assert bias.requires_grad

    @pytest.mark.parametrize("block", [False, True], ids=["one block", "two blocks"])
    def test_what_is_saved_is_the_trained_function_on_raw_activations(
        self, block: bool, tmp_path: Path
    ) -> None:
        self.compare_with_saved(tmp_path, block=block)

    def compare_with_saved(self, folder: Path, **how: Any) -> None:
        sae = self.make(**how)
        draw = torch.Generator().manual_seed(5)
        scaler = Scaler(torch.randn(D_IN, generator=draw) * 10, 0.037)
        raw = torch.randn(300, D_IN, generator=draw) / scaler.scale + scaler.mean
        x = scaler.normalise(raw).double()
        sae(x, torch.ones(300) > 0)  # whatever a step leaves behind for later
        sae.calibrate([x[:200], x[200:]], float32_linear)
        save_sae(sae.to_inference(scaler, name="a", metadata={}), folder)
        saved = load_sae(folder)
        torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(D_SAE))
        code = self.at_inference(sae, x)
        folded = sae.parts()
        norm = folded.W_dec.norm(dim=1)
        reconstruction = (code @ folded.W_dec + folded.b_dec) / scaler.scale + scaler.mean
        # A token with an entry at its very threshold may fall on either side of it by rounding.
        found = saved.encode(raw).double() * scaler.scale
        same = ((found > 0) == (code > 0)).all(dim=1)
        assert int(same.sum()) >= 297
        torch.testing.assert_close(found[same], (code * norm)[same], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(saved(raw)[same].double(), reconstruction[same], rtol=1e-3, atol=2e-2)

    def test_features_that_fire_are_not_dead(self) -> None:
        sae: TrainableSAE = self.make(block=True)
        coded = sae(rows(2), torch.tensor([True, False]))
        sae.after_step(coded, 1)
        fired = coded.code.rows(torch.arange(2), D_SAE)[0] > 0
        assert 0 < int(fired.sum()) < D_SAE
        assert torch.equal(sae.silent, torch.where(fired, 0, 1))
