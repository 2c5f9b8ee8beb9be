"""Each loss against plain loops, gradients included, and InfoNCE against an example worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tcsae.train.losses import Keys, auxiliary, fvu, info_nce


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_info_nce(
    anchor: Tensor, positive: Tensor, document: Tensor, key: Tensor, key_document: Tensor, temperature: float
) -> Tensor:
    """METHOD.md's formula term by term."""

    def unit(a: Tensor) -> Tensor:
        return a / a.square().sum().sqrt()

    losses = []
    for query, other in ((anchor, positive), (positive, anchor)):
        for i in range(len(query)):
            if not (query[i] > 0).any() or not (other[i] > 0).any():
                continue
            u, u_plus = unit(query[i]), unit(other[i]).detach()
            own = ((u * u_plus).sum() / temperature).exp()
            total = own
            for j in range(len(key)):
                if key_document[j] != document[i] and (key[j] > 0).any():
                    total = total + ((u * unit(key[j]).detach()).sum() / temperature).exp()
            losses.append(-(own / total).log())
    return torch.stack(losses).mean()


def test_three_anchors_and_four_ring_items_by_hand() -> None:
    # Block of two features, temperature 1/2. Keys: (1,0) of document 1, (0,1) of 2, (1,0) of 3, empty of 4.
    key = Keys(
        torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0], [0.0, 0.0]]),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([0, 0, 1, 1]),
    )
    # Anchor 0 of document 1: equal to its positive; its negatives are keys 1 and 2: cosines 0 and 1.
    # Anchor 1 of document 9: at a right angle to its positive; negatives 0, 1 and 2.
    # Anchor 2 has an empty positive and is dropped.
    anchor = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    positive = torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    found = info_nce(
        anchor,
        positive,
        torch.tensor([1, 9, 2]),
        torch.tensor([0, 1, 0]),
        [key],
        0.5,
        within_source=True,
    )
    e2 = math.exp(2)
    zero = math.log((e2 + 1 + e2) / e2)  # both directions the same
    one_forward = math.log((1 + e2 + 1 + e2) / 1)  # u = (1,0): positive 0; keys 1, 0, 1
    one_backward = math.log((1 + 1 + e2 + 1) / 1)  # u = (0,1): positive 0; keys 0, 1, 0
    assert found.loss.item() == pytest.approx((2 * zero + one_forward + one_backward) / 4, rel=1e-6)
    # No query is nearer to its positive than to every negative: key 2 ties with anchor 0's positive.
    assert found.accuracy == 0
    # Within source 0, anchor 0 meets key 1 alone and wins, both ways; within source 1, anchor 1 meets key 2:
    # forward it loses (0 against 1), backward it ties (0 against 0).
    assert found.accuracy_within_source == pytest.approx(2 / 4)
    assert found.empty_share == pytest.approx(1 / 3)
    assert found.n_pairs == 2
    # Of 4 queries x 4 keys: the empty key 4 times, key 0 for anchor 0 both ways.
    assert found.masked_share == pytest.approx(6 / 16)


@pytest.mark.parametrize("piece", [1, 3, 7], ids=["one key at a time", "uneven pieces", "all keys at once"])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_info_nce_and_its_gradient_equal_plain_loops(piece: int, temperature: float) -> None:
    a, p, key = draw(6, 5).relu(), draw(6, 5, seed=1).relu(), draw(7, 5, seed=2).relu()
    p[2], key[4] = 0, 0
    document, key_document = torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 2, 5, 6, 7])
    gradients = []
    for slow in (False, True):
        anchor, positive = a.clone().requires_grad_(), p.clone().requires_grad_()
        if slow:
            loss = loop_info_nce(anchor, positive, document, key, key_document, temperature)
        else:
            keys = [
                Keys(key[i : i + piece], key_document[i : i + piece], key_document[i : i + piece] * 0)
                for i in range(0, 7, piece)
            ]
            loss = info_nce(anchor, positive, document, document * 0, keys, temperature).loss
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append((loss.detach(), anchor.grad, positive.grad))
    for fast, slow_one in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow_one, rtol=1e-9, atol=1e-12)


def test_an_empty_ring_gives_no_loss_and_no_gradient() -> None:
    code = torch.ones(2, 3, requires_grad=True)
    found = info_nce(code, code.detach(), torch.tensor([0, 1]), torch.tensor([0, 0]), [], 0.1)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss.item() == 0
    assert code.grad is not None
    assert not code.grad.any()
    assert math.isnan(found.accuracy)


def test_without_any_pair_that_counts_the_loss_is_zero() -> None:
    code = torch.zeros(2, 3, requires_grad=True)
    found = info_nce(code, code, torch.tensor([0, 1]), torch.tensor([0, 0]), [], 0.1)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert (found.loss.item(), found.n_pairs, found.empty_share) == (0, 0, 1)


def test_low_temperatures_neither_overflow_nor_vanish() -> None:
    anchor = torch.tensor([[1.0, 0.0]], requires_grad=True)
    positive = torch.tensor([[1e-3, 1.0]])
    key = Keys(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([0]))
    found = info_nce(anchor, positive, torch.tensor([0]), torch.tensor([0]), [key], 0.02)
    found.loss.backward()  # type: ignore[no-untyped-call]
    # Forward: cosine 0.001 against 1, (1 - 0.001) / 0.02 = 49.95 nats. Backward: 0.001 against 0.001, log 2.
    assert found.loss.item() == pytest.approx((49.95 + math.log(2)) / 2, rel=1e-4)
    assert anchor.grad is not None
    assert torch.isfinite(anchor.grad).all()


def test_fvu_and_its_gradient_equal_plain_loops() -> None:
    x, weight = draw(5, 3), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    fast = draw(5, 3, seed=1).requires_grad_()
    slow = fast.detach().clone().requires_grad_()
    fvu(x, fast, weight).backward()  # type: ignore[no-untyped-call]
    error = sum(
        ((x[i, d] - slow[i, d]) ** 2 for i in range(5) for d in range(3) if i != 2), torch.tensor(0.0)
    )
    size = sum(float(x[i, d]) ** 2 for i in range(5) for d in range(3) if i != 2)
    (error / size).backward()
    torch.testing.assert_close(fast.grad, slow.grad)


def test_auxiliary_and_its_gradient_equal_plain_loops() -> None:
    error, weight = draw(4, 3), torch.ones(4, dtype=torch.float64)
    fast = [draw(4, 6, seed=1).requires_grad_(), draw(6, 3, seed=2).requires_grad_()]
    slow = [t.detach().clone().requires_grad_() for t in fast]
    auxiliary(error, fast[0], fast[1], 2, weight).backward()  # type: ignore[no-untyped-call]
    total = torch.tensor(0.0, dtype=torch.float64)
    for i in range(4):
        code = [max(v, 0.0) for v in slow[0][i].tolist()]
        strongest = sorted(range(6), key=lambda j, code=code: -code[j])[:2]  # type: ignore[misc]
        guess = torch.zeros(3, dtype=torch.float64)
        for j in strongest:
            if code[j] > 0:
                guess = guess + slow[0][i, j] * slow[1][j]
        total = total + (error[i] - guess).square().sum()
    (total / error.square().sum()).backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_auxiliary_loss_does_not_pull_on_the_error() -> None:
    error = draw(4, 3).requires_grad_()
    dead = draw(4, 6, seed=1).requires_grad_()
    weight = torch.ones(4, dtype=torch.float64)
    auxiliary(error, dead, draw(6, 3, seed=2), 2, weight).backward()  # type: ignore[no-untyped-call]
    assert error.grad is None
