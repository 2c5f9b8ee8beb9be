"""The encoder's dense product in each precision."""

from __future__ import annotations

import torch

from tcsae.train.precision import PIECE, bfloat16_linear, dtype_for, float32_linear, linear_for

CPU = torch.device("cpu")


def test_both_products_are_x_w_plus_b_also_into_a_buffer() -> None:
    draw = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=draw) for shape in ((6, 8), (5, 8), (5,)))
    expected = torch.stack([torch.stack([(x[i] * W[j]).sum() + b[j] for j in range(5)]) for i in range(6)])
    out = torch.empty(6, 5)
    for linear, tolerance in ((float32_linear, 1e-5), (bfloat16_linear, 0.1)):
        torch.testing.assert_close(linear(x, W, b), expected, rtol=0, atol=tolerance)
        assert linear(x, W, b, out) is out
        torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)


def test_a_product_of_several_pieces_is_that_of_each_row_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(PIECE + 3, 8, generator=draw), torch.ones(5, 8), torch.arange(5.0)
    out = bfloat16_linear(x, W, b, torch.empty(PIECE + 3, 5))
    expected = x.sum(dim=1, keepdim=True) + b
    torch.testing.assert_close(out, expected, rtol=0.01, atol=0.05)


def test_a_product_into_bfloat16_is_rounded_once() -> None:
    x, W, b = torch.tensor([[1.0, 2.0**-7]]), torch.ones(1, 2), torch.tensor([-1.0])
    out = bfloat16_linear(x, W, b, torch.empty(1, 1, dtype=torch.bfloat16))
    # 1 + 2^-7 is a bfloat16 number; what is left of it after the bias is exact.
    assert (out.dtype, out.item()) == (torch.bfloat16, 2.0**-7)


def test_gradients_pass_through_the_rounded_product() -> None:
    x, W, b = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    bfloat16_linear(x, W, b).sum().backward()
    assert W.grad is not None
    assert W.grad.tolist() == [[2.0] * 3] * 4


def test_a_precision_asked_for_is_used_and_auto_takes_one_of_them() -> None:
    assert linear_for("float32", CPU) is float32_linear
    assert linear_for("bfloat16", CPU) is bfloat16_linear
    assert linear_for("auto", CPU) in (float32_linear, bfloat16_linear)
    assert dtype_for("float32", CPU) == torch.float32
    assert dtype_for("bfloat16", CPU) == torch.bfloat16
