"""KL and cross-entropy against float64 and against SAEBench's arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from tcsae.evaluate.language import kl_divergence, log_softmax_, next_token_loss, saebench_kl

EVERY = torch.ones(1, dtype=torch.bool)


def log_probs(*logits: float) -> torch.Tensor:
    return torch.log_softmax(torch.tensor([logits]), dim=-1)


def slow_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    """From logits, in Python floats."""
    p = [math.exp(x) for x in p_logits.double().tolist()]
    q = [math.exp(x) for x in q_logits.double().tolist()]
    return sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))


def test_kl_is_that_of_a_slow_calculation_in_double_precision() -> None:
    p, q = (
        torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).chunk(2, dim=1)[0].repeat(1, 2),
        None,
    )
    q = torch.randn(5, p.shape[1], generator=torch.Generator().manual_seed(1))
    found = kl_divergence(torch.log_softmax(p, -1), torch.log_softmax(q, -1))
    for at in range(5):
        assert found[at].item() == pytest.approx(slow_kl(p[at], q[at]), rel=1e-5)


def test_the_loss_is_that_of_the_next_token_and_the_last_position_has_none() -> None:
    half = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]]).log()
    found = next_token_loss(half, torch.tensor([[2, 0, 1]]))
    assert found[0].tolist() == pytest.approx([-math.log(0.5), -math.log(0.8)])


def test_log_softmax_in_place_is_log_softmax() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.log_softmax(logits, dim=-1)
    assert torch.equal(log_softmax_(logits), expected)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("clean", "other", "expected"),
    [
        pytest.param((120.0, 0.0), (60.0, 0.0), "nan", id="a clean gap of 120 makes 0 times infinity, NaN"),
        pytest.param((80.0, 0.0), (120.0, 0.0), "inf", id="80 against 120 makes an infinity"),
        pytest.param((5.0, 0.0), (3.0, 0.0), "same", id="small gaps give the true divergence"),
    ],
)
def test_saebench_kl_fails_where_saebench_fails(
    clean: tuple[float, float], other: tuple[float, float], expected: str
) -> None:
    p, q = log_probs(*clean), log_probs(*other)
    ours = kl_divergence(p, q)
    theirs = saebench_kl(p, q, kl=ours, kept=EVERY).item()
    assert math.isfinite(ours.item())
    if expected == "same":
        assert theirs == ours.item()
    else:
        assert str(theirs) == expected


def test_saebench_kl_looks_at_kept_positions_only() -> None:
    p = torch.cat([log_probs(120.0, 0.0), log_probs(1.0, 0.0)])
    q = torch.cat([log_probs(60.0, 0.0), log_probs(0.0, 0.0)])
    kept = torch.tensor([False, True])
    kl = kl_divergence(p, q)[kept]
    assert torch.equal(saebench_kl(p, q, kl=kl, kept=kept), kl)
