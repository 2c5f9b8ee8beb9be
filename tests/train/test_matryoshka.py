"""Matryoshka-BatchTopK against full matrices and sorting, each prefix decoded from the beginning."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tcsae.store.errors import ConfigError
from tcsae.tests.train.architectures import ArchitectureTests, Slow, unexplained
from tcsae.train.config import ArmConfig


class TestMatryoshka(ArchitectureTests):
    options: ClassVar = {"architecture": "matryoshka", "prefix_shares": (0.25, 0.5)}

    def slow(self, sae: Any, x: Tensor, valid: Tensor) -> Slow:
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        code = torch.zeros_like(pre)
        for start, stop, k in sae.blocks:
            part = pre[:, start:stop] * valid[:, None]
            bound = part.detach().flatten().sort(descending=True).values[k * int(valid.sum()) - 1]
            code[:, start:stop] = torch.where(part >= bound.clamp(min=1e-12), part, 0)
        # 24 features: the first 6, the first 12, all.
        prefixes = [code[:, :m] @ sae.W_dec[:m] + sae.b_dec for m in (6, 12, 24)]
        fit = sum((unexplained(x, part, valid) for part in prefixes), code.new_zeros(())) / 3
        return Slow(code, prefixes[-1], fit, code.new_zeros(()))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((), "prefix_shares: expected one or more rising shares between 0 and 1, got \\[\\]"),
        ((0.5, 0.25), "expected one or more rising shares"),
        ((0.5, 1.0), "expected one or more rising shares"),
        # 32 features: the first 1.6 % are none.
        ((0.016, 0.5), r"prefix_shares \[0.016, 0.5\] of 32 features are prefixes of \[0, 16, 32\]"),
        ((0.5, 0.51), r"prefixes of \[16, 16, 32\]; each must have more features"),
    ],
    ids=["none", "falling", "all features twice", "a prefix without features", "two equal prefixes"],
)
def test_prefixes_that_are_none_are_refused(shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ArmConfig(name="a", architecture="matryoshka", expansion=2.0, k=4, prefix_shares=shares).check_sizes(
            16
        )
