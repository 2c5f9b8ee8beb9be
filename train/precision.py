"""The dense products of the encoder, in the precision that pays on the hardware at hand."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import linear

from tcsae.store.errors import ConfigError
from tcsae.train.config import Precision

PIECE = 512
"""rows of a bfloat16 product that wait for their conversion: they and their float32 copy stay in the cache"""


@runtime_checkable
class Linear(Protocol):
    """``x @ W.T + b`` in float32; into ``out`` where given, in its dtype, and then without gradient.

    ``out`` is of float32 or of what `dtype_for` names.
    """

    def __call__(self, x: Tensor, W: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor: ...


def float32_linear(x: Tensor, W: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product in the inputs' own precision."""
    return linear(x, W, b) if out is None else torch.addmm(b, x, W.T, out=out)


def bfloat16_linear(x: Tensor, W: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of bfloat16 roundings, accumulated by the hardware and rounded once more.

    Into ``out`` it goes piece by piece: a whole batch's product in bfloat16, then in float32, are new pages at
    every step, and on two cores took as long as the product itself.
    """
    if out is None:
        return linear(x.bfloat16(), W.bfloat16()).float() + b
    W16, b16 = W.bfloat16(), b.bfloat16()
    if out.dtype == torch.bfloat16:
        return torch.addmm(b16, x.bfloat16(), W16.T, out=out)
    memory = torch.empty(min(PIECE, len(x)), len(W), dtype=torch.bfloat16, device=x.device)
    for start in range(0, len(x), PIECE):
        rows = x[start : start + PIECE].bfloat16()
        out[start : start + PIECE] = torch.addmm(b16, rows, W16.T, out=memory[: len(rows)])
    return out


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """What products are computed of; ``auto`` takes bfloat16 only where the hardware multiplies it fast.

    A CPU without AMX or AVX-512-BF16 emulates it, a hundred times slower than float32.
    """
    if precision == "auto":
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def linear_for(precision: Precision, device: torch.device) -> Linear:
    """The product of `dtype_for`."""
    return bfloat16_linear if dtype_for(precision, device) == torch.bfloat16 else float32_linear


def compiled(product: Linear) -> Linear:
    """The same product through torch.compile: what surrounds the matrix product becomes part of its kernel.

    In bfloat16 that is the rounding of the inputs and the bias, in float32 the bias alone. One kernel serves inputs
    of every length, since pairs and keys are never the same number. The first call compiles; without a compiler it
    raises `ConfigError`.
    """
    fast = torch.compile(product, dynamic=True)

    def call(x: Tensor, W: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        try:
            found: Tensor = fast(x, W, b)
        except BackendCompilerFailed as error:
            raise ConfigError(
                f"compile: torch.compile failed ({str(error).splitlines()[0]}); install a C++ compiler or set "
                "compile = false"
            ) from error
        return found if out is None else out.copy_(found)

    return call


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
