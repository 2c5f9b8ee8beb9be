"""The temporal terms without a ring against plain loops and finite differences, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from tcsae.train.config import Similarity
from tcsae.train.losses import Codes
from tcsae.train.pair_losses import difference, in_batch

ANCHOR, POSITIVE = torch.tensor([0, 2, 4, 1, 6]), torch.tensor([1, 3, 0, 5, 7])
DOCUMENT = torch.tensor([0, 0, 1, 1, 0, 2, 3, 3])
SOURCE = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes() -> Tensor:
    """Eight tokens of six features; token 6 is empty, so the last pair is dropped."""
    code = draw(8, 6).relu()
    code[6] = 0
    return code


def slope_by_differences(loss: Callable[[Tensor], float], at: Tensor, step: float = 1e-6) -> Tensor:
    slope = torch.zeros_like(at)
    for i in range(at.numel()):
        beside = torch.zeros_like(at)
        beside.view(-1)[i] = step
        slope.view(-1)[i] = (loss(at + beside) - loss(at - beside)) / (2 * step)
    return slope


def loop_in_batch(
    code: Tensor, temperature: float, similarity: Similarity, masks: bool
) -> tuple[float, float]:
    """Loss and share of masked negatives, one query and one negative at a time."""
    pairs = list(zip(ANCHOR.tolist(), POSITIVE.tolist(), strict=True))[:4]

    def sim(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(code[i].tolist(), code[j].tolist(), strict=True))
        norms = math.sqrt(sum(a * a for a in code[i].tolist()) * sum(b * b for b in code[j].tolist()))
        return (dot / norms if similarity == "cosine" else dot) / temperature

    total, masked = 0.0, 0
    for query, answer in ((0, 1), (1, 0)):
        for pair in pairs:
            own = math.exp(sim(pair[query], pair[answer]))
            everything = own
            for other in pairs:
                if other is pair:
                    continue
                if masks and DOCUMENT[pair[query]] == DOCUMENT[other[answer]]:
                    masked += 1
                    continue
                everything += math.exp(sim(pair[query], other[answer]))
            total -= math.log(own / everything)
    return total / 8, masked / 24


@pytest.mark.parametrize("masks", [True, False], ids=["documents masked", "as T-SAE"])
@pytest.mark.parametrize(("similarity", "temperature"), [("cosine", 0.1), ("cosine", 1.0), ("dot", 1.0)])
def test_in_batch_and_its_gradient_equal_plain_loops(
    similarity: Similarity, temperature: float, masks: bool
) -> None:
    code = codes().requires_grad_()
    found = in_batch(
        Codes(code, DOCUMENT, SOURCE),
        ANCHOR,
        POSITIVE,
        temperature,
        similarity=similarity,
        mask_documents=masks,
    )
    loss, masked = loop_in_batch(code.detach(), temperature, similarity, masks)
    assert found.loss.item() == pytest.approx(loss, rel=1e-12)
    assert found.masked_share == pytest.approx(masked)
    # Of pairs (0,1), (2,3), (4,0), (1,5) the first, third and fourth have tokens of document 0.
    assert (masked > 0) == masks
    assert (found.n_pairs, found.empty_share) == (4, pytest.approx(1 / 5))
    (slope,) = torch.autograd.grad(found.loss, code)
    expected = slope_by_differences(
        lambda moved: loop_in_batch(moved, temperature, similarity, masks)[0], code.detach()
    )
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


def test_three_pairs_by_hand() -> None:
    # Anchors (1,0), (0,2), (3,0); positives (2,0), (0,1), (0,5): cosines, rows are anchors
    #     1 0 0
    #     0 1 1
    #     1 0 0
    # Pairs 0 and 2 are of document 7: anchor 0 does not meet positive 2, nor anchor 2 positive 0.
    code = torch.tensor([[1.0, 0], [0, 2], [3, 0], [2, 0], [0, 1], [0, 5]])
    tokens = Codes(code, torch.tensor([7, 8, 7] * 2), torch.tensor([0, 0, 1] * 2))
    found = in_batch(tokens, torch.arange(3), torch.arange(3, 6), 1.0, detailed=True)
    e = math.e
    rows = math.log((e + 1) / e) + math.log((e + e + 1) / e) + math.log(1 + 1)  # {1 0 -} {0 1 1} {- 0 0}
    columns = math.log((e + 1) / e) + math.log((e + 2) / e) + math.log(1 + e)  # {1 0 -} {0 1 0} {- 1 0}
    assert found.loss.item() == pytest.approx((rows + columns) / 6)
    assert found.masked_share == pytest.approx(4 / 12)
    # Won: row 0, columns 0 and 1. Row 1 ties, row 2 ties (0, 0), column 2 loses.
    assert found.accuracy == pytest.approx(3 / 6)
    # Within sources {0, 1} and {2}: rows 0 and 1 win, as do columns 0 and 1; pair 2 has nothing to meet.
    assert found.accuracy_within_source == 1


def test_the_dot_product_rewards_size_and_the_cosine_does_not() -> None:
    found = {}
    for similarity in get_args(Similarity):
        for size in (1.0, 3.0):
            tokens = Codes(torch.eye(2).double() * size, torch.arange(2), torch.arange(2))
            same = torch.arange(2)
            found[similarity, size] = in_batch(tokens, same, same, 1.0, similarity=similarity).loss.item()
    assert found["cosine", 1.0] == found["cosine", 3.0] == pytest.approx(math.log1p(math.exp(-1)))
    assert found["dot", 3.0] == pytest.approx(math.log1p(math.exp(-9)))


def test_without_a_pair_that_counts_the_contrast_is_zero_with_a_gradient() -> None:
    code = torch.zeros(2, 3, requires_grad=True)
    tokens = Codes(code, torch.arange(2), torch.arange(2))
    found = in_batch(tokens, torch.tensor([0]), torch.tensor([1]), 1.0, detailed=True)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert (found.loss.item(), found.n_pairs, found.empty_share) == (0, 0, 1)
    assert math.isnan(found.accuracy)


def test_a_pair_with_every_negative_masked_has_neither_loss_nor_accuracy() -> None:
    code = draw(4, 3).abs().requires_grad_()
    tokens = Codes(code, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    found = in_batch(tokens, torch.arange(2), torch.arange(2, 4), 0.1, detailed=True)
    (slope,) = torch.autograd.grad(found.loss, code)
    assert found.loss.item() == 0
    assert not slope.any()
    assert math.isnan(found.accuracy)
    assert found.masked_share == 1


def test_the_difference_and_its_gradient_equal_plain_loops() -> None:
    code = codes().requires_grad_()
    found = difference(Codes(code, DOCUMENT, SOURCE), ANCHOR, POSITIVE, 3)

    def loop(moved: Tensor) -> float:
        total = 0.0
        for i, j in zip(ANCHOR.tolist(), POSITIVE.tolist(), strict=True):
            total += sum((moved[i, f].item() - moved[j, f].item()) ** 2 for f in range(6))
        return total / 5 / 3

    assert found.loss.item() == pytest.approx(loop(code.detach()), rel=1e-12)
    (slope,) = torch.autograd.grad(found.loss, code)
    torch.testing.assert_close(slope, slope_by_differences(loop, code.detach()), rtol=1e-6, atol=1e-8)
    # Pairs with an empty code count: shrinking to nothing is what this term is known for.
    assert (found.n_pairs, found.empty_share) == (5, pytest.approx(1 / 5))
    assert math.isnan(found.accuracy)


def test_the_difference_of_no_pair_is_zero() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    code = torch.ones(2, 3, requires_grad=True)
    found = difference(Codes(code, torch.arange(2), torch.arange(2)), none, none, 4)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert (found.loss.item(), found.n_pairs) == (0, 0)


def test_the_difference_shrinks_with_the_square_of_the_codes() -> None:
    # Nothing normalises it, so half the code is a quarter of the loss; a code of zeros is its minimum.
    tokens = Codes(codes(), DOCUMENT, SOURCE)
    whole = difference(tokens, ANCHOR, POSITIVE, 3).loss
    half = difference(tokens._replace(code=tokens.code / 2), ANCHOR, POSITIVE, 3).loss
    assert half.item() == pytest.approx(whole.item() / 4)
