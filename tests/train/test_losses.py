"""Each loss against plain loops, gradients included, and InfoNCE against an example worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tcsae.train.losses import Codes, Contrast, auxiliary, fvu, info_nce


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contrast(
    anchor: Tensor,
    positive: Tensor,
    document: list[int],
    source: list[int],
    keys: list[Codes],
    temperature: float,
    *,
    detailed: bool = False,
) -> Contrast:
    """info_nce of pairs that share no token."""
    n = len(anchor)
    tokens = Codes(torch.cat([anchor, positive]), torch.tensor(document * 2), torch.tensor(source * 2))
    return info_nce(tokens, torch.arange(n), torch.arange(n, 2 * n), keys, temperature, detailed=detailed)


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
    key = Codes(
        torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0], [0.0, 0.0]]),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([0, 0, 1, 1]),
    )
    # Anchor 0 of document 1: equal to its positive; its negatives are keys 1 and 2: cosines 0 and 1.
    # Anchor 1 of document 9: at a right angle to its positive; negatives 0, 1 and 2.
    # Anchor 2 has an empty positive and is dropped.
    anchor = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    positive = torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    found = contrast(anchor, positive, [1, 9, 2], [0, 1, 0], [key], 0.5, detailed=True)
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
    document, key_document = [0, 0, 1, 2, 3, 4], torch.tensor([0, 1, 2, 2, 5, 6, 7])
    gradients = []
    for slow in (False, True):
        anchor, positive = a.clone().requires_grad_(), p.clone().requires_grad_()
        if slow:
            loss = loop_info_nce(anchor, positive, torch.tensor(document), key, key_document, temperature)
        else:
            keys = [
                Codes(key[i : i + piece], key_document[i : i + piece], key_document[i : i + piece] * 0)
                for i in range(0, 7, piece)
            ]
            loss = contrast(anchor, positive, document, [0] * 6, keys, temperature).loss
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append((loss.detach(), anchor.grad, positive.grad))
    for fast, slow_one in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow_one, rtol=1e-9, atol=1e-12)


def test_info_nce_with_keys_of_bfloat16_is_that_with_float32_keys_but_for_rounding() -> None:
    tokens, keys = draw(40, 64).relu().float(), draw(300, 64, seed=1).relu().float()
    keys[7], document = 0, torch.arange(300) % 50
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        code = tokens.clone().requires_grad_()
        pieces = [
            Codes(keys[i : i + 128].to(dtype), document[i : i + 128], document[i : i + 128] % 3)
            for i in range(0, 300, 128)
        ]
        term = contrast(code[:20], code[20:], [*range(20)], [0] * 20, pieces, 0.1, detailed=True)
        (slope,) = torch.autograd.grad(term.loss, code)
        assert slope.dtype == term.loss.dtype == torch.float32
        found.append((term, slope))
    (exact, slope), (rounded, rounded_slope) = found
    # Half a unit in the last of bfloat16's 8 places of each logit, up to 2^-5 at 8 to 16, of both signs.
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=2e-3)
    assert torch.nn.functional.cosine_similarity(slope.flatten(), rounded_slope.flatten(), dim=0) > 0.999
    assert rounded_slope.norm().item() == pytest.approx(slope.norm().item(), rel=5e-3)
    assert (rounded.masked_share, rounded.n_pairs) == (exact.masked_share, exact.n_pairs)
    assert abs(rounded.accuracy - exact.accuracy) <= 1 / 40


def test_tokens_that_share_pairs_and_positives_of_other_documents_equal_plain_loops() -> None:
    # Token 0 is an anchor and twice a positive; pair (2, 3) is of documents 1 and 2, as the placebo's are.
    code, key = draw(5, 4).relu() + 0.01, draw(6, 4, seed=1).relu() + 0.01
    code[1] = code[0] * 2  # so that some queries win
    document, key_document = [0, 0, 1, 2, 0], [0, 1, 2, 3, 1, 4]
    pairs = [(0, 1), (1, 0), (2, 3), (4, 0)]
    fast, slow = code.clone().requires_grad_(), code.clone().requires_grad_()
    where = torch.zeros(6, dtype=torch.int64)
    found = info_nce(
        Codes(fast, torch.tensor(document), where[:5]),
        torch.tensor([i for i, _ in pairs]),
        torch.tensor([j for _, j in pairs]),
        [Codes(key, torch.tensor(key_document), where)],
        0.2,
        detailed=True,
    )
    losses, wins, masked = [], 0, 0
    for a, b in pairs:
        for i, j in ((a, b), (b, a)):
            u = slow[i] / slow[i].norm()
            own = u @ (slow[j] / slow[j].norm()).detach()
            others = [u @ v / v.norm() for v, d in zip(key, key_document, strict=True) if d != document[i]]
            masked += len(key) - len(others)
            wins += int(own > max(others))
            total = (own / 0.2).exp() + sum(((s / 0.2).exp() for s in others), torch.tensor(0.0))
            losses.append(-((own / 0.2).exp() / total).log())
    loss = torch.stack(losses).mean()
    found.loss.backward()  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-9, atol=1e-12)
    assert found.accuracy == found.accuracy_within_source == wins / 8
    assert 0 < wins < 8
    assert found.masked_share == pytest.approx(masked / 48)


def test_features_that_are_always_zero_change_nothing() -> None:
    code, key = draw(4, 5).relu(), draw(6, 5, seed=1).relu()
    found = []
    for extra in (0, 11):
        padded = torch.nn.functional.pad(code, (0, extra)).requires_grad_()
        keys = [Codes(torch.nn.functional.pad(key, (0, extra)), torch.arange(10, 16), torch.arange(6))]
        loss = contrast(padded[:2], padded[2:], [0, 1], [0, 0], keys, 0.1).loss
        (slope,) = torch.autograd.grad(loss, padded)
        assert not slope[:, 5:].any()
        found.append((loss.detach(), slope[:, :5]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_an_empty_ring_gives_no_loss_and_no_gradient() -> None:
    code = torch.ones(2, 3, requires_grad=True)
    found = contrast(code, code.detach(), [0, 1], [0, 0], [], 0.1, detailed=True)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss.item() == 0
    assert code.grad is not None
    assert not code.grad.any()
    assert math.isnan(found.accuracy)


def test_without_any_pair_that_counts_the_loss_is_zero() -> None:
    code = torch.zeros(2, 3, requires_grad=True)
    found = contrast(code, code, [0, 1], [0, 0], [], 0.1)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert (found.loss.item(), found.n_pairs, found.empty_share) == (0, 0, 1)


def test_low_temperatures_neither_overflow_nor_vanish() -> None:
    anchor = torch.tensor([[1.0, 0.0]], requires_grad=True)
    positive = torch.tensor([[1e-3, 1.0]])
    key = Codes(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([0]))
    found = contrast(anchor, positive, [0], [0], [key], 0.02)
    found.loss.backward()  # type: ignore[no-untyped-call]
    # Forward: cosine 0.001 against 1, (1 - 0.001) / 0.02 = 49.95 nats. Backward: 0.001 against 0.001, log 2.
    assert found.loss.item() == pytest.approx((49.95 + math.log(2)) / 2, rel=1e-4)
    assert anchor.grad is not None
    assert torch.isfinite(anchor.grad).all()


def test_the_largest_sums_of_the_lowest_temperature_are_finite() -> None:
    # 16384 keys equal to the query, whose positive is at a right angle: log(1 + 16384 e^50) both ways.
    one = torch.eye(2)[:1].requires_grad_()
    keys = [Codes(torch.eye(2)[:1].repeat(16384, 1), torch.full((16384,), 9), torch.zeros(16384).long())]
    found = contrast(one, torch.eye(2)[1:], [0], [0], keys, 0.02)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss.item() == pytest.approx((math.log(16384) + 50 + math.log(1 + 16384)) / 2, rel=1e-5)
    assert one.grad is not None
    assert torch.isfinite(one.grad).all()


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
