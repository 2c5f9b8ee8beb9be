"""The trainable SAE: its sparse step against dense autograd, thresholds and folding."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from tcsae.train.config import ArmConfig
from tcsae.train.precision import float32_linear
from tcsae.train.sae.batch_topk import BatchTopK
from tcsae.train.scaler import Scaler


def example(block: bool = True, seed: int = 0) -> BatchTopK:
    config = ArmConfig(
        name="a", expansion=3.0, k=5, block_share=0.25 if block else 0.0, block_k_share=0.2 if block else 0.0
    )
    sae = BatchTopK(8, config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec):
            bias.normal_(std=0.1, generator=torch.Generator().manual_seed(seed + 1))
    return sae


def dense_step(sae: BatchTopK, x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Code and reconstruction by full matrices and sorting, all differentiable."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    code = torch.zeros_like(pre)
    for start, stop, k in sae.blocks:
        part = pre[:, start:stop][valid].relu()
        bound = part.detach().flatten().sort(descending=True).values[k * int(valid.sum()) - 1]
        code[valid, start:stop] = torch.where(part >= bound, part, 0)
    return code, code @ sae.W_dec + sae.b_dec


def test_gradients_equal_dense_autograd() -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(40, dtype=torch.bool)
    valid[[3, 17]] = False
    for block in (True, False):
        sparse, dense = example(block), example(block)
        coded = sparse(x, valid)
        code, reconstruction = dense_step(dense, x, valid)
        torch.testing.assert_close(coded.reconstruction, reconstruction)
        target = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
        # The second term gives the active values a gradient of their own.
        ((coded.reconstruction - target).square().sum() + coded.code.values.square().sum()).backward()
        ((reconstruction - target).square().sum() + code.square().sum()).backward()
        for (name, a), (_, b) in zip(sparse.named_parameters(), dense.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_tokens_that_do_not_count_get_no_active_entry() -> None:
    sae = example()
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    x[3] *= 1e4  # an outlier would take the whole budget
    valid = torch.ones(40, dtype=torch.bool)
    valid[3] = False
    coded = sae(x, valid)
    assert 3 not in coded.code.active.token
    assert len(coded.code.values) == 39 * 5


def test_the_budget_is_split_between_the_blocks() -> None:
    coded = example()(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), torch.ones(100) > 0)
    assert int((coded.code.active.feature < 6).sum()) == 100
    assert int((coded.code.active.feature >= 6).sum()) == 400


def test_the_parallel_gradient_is_removed_and_rows_stay_unit() -> None:
    sae = example()
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    coded = sae(x, torch.ones(40) > 0)
    coded.reconstruction.square().sum().backward()
    sae.remove_parallel_gradient()
    assert sae.W_dec.grad is not None
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(dim=1), torch.zeros(24), atol=1e-4, rtol=0)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.after_step(coded, 40)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))


def test_dead_counters_count_tokens_since_the_last_firing() -> None:
    sae = example()
    coded = sae(torch.randn(1, 8, generator=torch.Generator().manual_seed(2)), torch.ones(1) > 0)
    fired = coded.code.active.feature
    sae.after_step(coded, 1)
    sae.after_step(coded, 1)
    expected = torch.full((24,), 2)
    expected[fired] = 0
    assert torch.equal(sae.silent, expected)
    h, rest = sae.dead(2)
    assert sorted([*h.tolist(), *rest.tolist()]) == [i for i in range(24) if i not in fired.tolist()]
    assert h.max() < 6 <= rest.min()


def test_calibration_keeps_k_per_token_over_all_batches_together() -> None:
    sae = example()
    draw = torch.Generator().manual_seed(0)
    # Batches of very different norm: the mean of their own thresholds would miss the budget.
    batches = [torch.randn(200, 8, generator=draw) * size for size in (0.5, 1.0, 3.0)]
    sae.calibrate(batches, float32_linear)
    pre = sae.preactivations(torch.cat(batches), float32_linear)
    for block, threshold in zip(sae.blocks, sae.thresholds.tolist(), strict=True):
        kept = int((pre[:, block.start : block.stop] >= threshold).sum())
        assert kept == block.k * 600


def test_the_folded_sae_on_raw_activations_is_the_trained_one_on_normalised_ones() -> None:
    sae = example()
    draw = torch.Generator().manual_seed(5)
    scaler = Scaler(torch.randn(8, generator=draw) * 10, 0.037)
    raw = torch.randn(300, 8, generator=draw) / scaler.scale + scaler.mean
    x = scaler.normalise(raw)
    sae.calibrate([x], float32_linear)
    folded = sae.to_inference(scaler, name="a", metadata={})
    pre = linear(x, sae.W_enc, sae.bias)
    bounds = torch.cat(
        [torch.full((b.stop - b.start,), t) for b, t in zip(sae.blocks, sae.thresholds.tolist(), strict=True)]
    )
    # Not the entries at the threshold itself, which rounding may put on either side.
    code = pre * (pre > bounds)
    clear = (pre - bounds).abs() > 1e-4
    torch.testing.assert_close((folded.encode(raw) * scaler.scale)[clear], code[clear], rtol=1e-4, atol=1e-4)
    rows = clear.all(dim=1)
    reconstruction = (code @ sae.W_dec + sae.b_dec) / scaler.scale + scaler.mean
    torch.testing.assert_close(folded(raw)[rows], reconstruction[rows], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(24))
    assert int(rows.sum()) > 290


def test_without_a_budget_of_its_own_block_h_competes_with_all_features() -> None:
    config = ArmConfig(name="a", expansion=3.0, k=5, block_share=0.25, block_k_share=0.0)
    sae = BatchTopK(8, config, torch.Generator().manual_seed(0))
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    coded = sae(x, torch.ones(100) > 0)
    pre = (x @ sae.W_enc.T + sae.bias).detach()
    bound = pre.flatten().sort(descending=True).values[5 * 100 - 1]
    assert coded.code.count(0, 24) == 500
    assert coded.code.count(0, 6) == int((pre[:, :6] >= bound).sum())
    sae.calibrate([x], float32_linear)
    folded = sae.to_inference(Scaler(torch.zeros(8), 1.0), name="a", metadata={})
    assert folded.block_size == 6
    assert folded.threshold is not None
    assert folded.threshold.unique().tolist() == pytest.approx([bound.item()])
    assert [len(features) for features in sae.dead(0)] == [6, 18]
