"""The inference SAE against equations written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tcsae.store.errors import ConfigError
from tcsae.train import SAE

W = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])  # d_model 2, three features


def small(architecture: str, **more: Any) -> SAE:
    weights: dict[str, Any] = {
        "W_enc": W,
        "b_enc": torch.tensor([0.0, -1.0, 0.0]),
        "W_dec": W.T,
        "b_dec": torch.tensor([1.0, 0.0]),
    }
    return SAE(architecture=architecture, **(weights | more))  # type: ignore[arg-type]


# x = (4, 1): x - b_dec = (3, 1), times W_enc (3, 2, -2), plus b_enc: pre = (3, 1, -2)
CASES = [
    ("standard", {}, [3.0, 1.0, 0.0]),
    ("topk", {"k": 1}, [3.0, 0.0, 0.0]),
    ("topk", {"k": 3}, [3.0, 1.0, 0.0]),
    ("jumprelu", {"threshold": torch.tensor([2.9, 1.0, 0.0])}, [3.0, 0.0, 0.0]),
    ("jumprelu", {"threshold": torch.tensor([3.0, 0.9, -5.0])}, [0.0, 1.0, 0.0]),
]


@pytest.mark.parametrize(
    ("architecture", "more", "code"),
    CASES,
    ids=[
        "standard clips below zero",
        "topk keeps the largest",
        "topk never gives a negative",
        "jumprelu is strict at the threshold",
        "a negative threshold lets no negative through",
    ],
)
def test_codes_follow_the_equations(architecture: str, more: dict[str, Any], code: list[float]) -> None:
    sae = small(architecture, **more)
    f = sae.encode(torch.tensor([4.0, 1.0]))
    assert f.tolist() == code
    # x_hat = f W_dec + b_dec
    expected = code[0] * W[:, 0] + code[1] * W[:, 1] + code[2] * W[:, 2] + torch.tensor([1.0, 0.0])
    torch.testing.assert_close(sae.decode(f), expected)


@pytest.mark.parametrize("shape", [(2,), (5, 2), (3, 5, 2), (0, 2)], ids=str)
def test_any_leading_shape_is_coded_row_by_row(shape: tuple[int, ...]) -> None:
    sae = small("topk", k=2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    f = sae.encode(x)
    assert f.shape == (*shape[:-1], 3)
    assert sae(x).shape == shape
    rows = [sae.encode(row) for row in x.reshape(-1, 2)]
    if rows:
        torch.testing.assert_close(f.reshape(-1, 3), torch.stack(rows))


@pytest.mark.parametrize("shape", [(3,), (4, 4), (2, 3, 1)], ids=str)
def test_activations_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"sae: activations of shape \({', '.join(map(str, shape))},?\), "):
        small("standard").encode(torch.zeros(shape))


def test_half_precision_activations_are_computed_in_the_weights_precision() -> None:
    x = torch.tensor([[4.0, 1.0]], dtype=torch.float16)
    assert small("standard").encode(x).dtype == torch.float32


def test_the_identity_returns_its_input() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SAE.identity(5)(x), x)


def test_the_zero_sae_returns_zeros() -> None:
    assert not SAE.zero(5)(torch.ones(3, 5)).any()


@pytest.mark.parametrize(
    ("architecture", "more", "message"),
    [
        ("standard", {"b_enc": torch.zeros(2)}, r"b_enc has shape \(2,\), expected \(3,\)"),
        ("standard", {"W_dec": W}, r"W_dec has shape \(2, 3\), expected \(3, 2\)"),
        ("jumprelu", {}, "has a threshold"),
        ("standard", {"threshold": torch.zeros(3)}, "has a threshold"),
        ("topk", {}, "k in 1..3"),
        ("topk", {"k": 4}, "k in 1..3"),
        ("standard", {"block_size": 4}, r"block_size is 4, expected 0\.\.3"),
    ],
    ids=[
        "bias too short",
        "decoder not transposed",
        "jumprelu without threshold",
        "threshold out of place",
        "topk without k",
        "k above the number of features",
        "block larger than the dictionary",
    ],
)
def test_what_does_not_fit_is_refused(architecture: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(architecture, **more)
