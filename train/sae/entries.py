"""Pre-activations that may be active, listed where they are few and as a matrix where they are many.

Architectures whose sparsity is learned begin with half of all entries active and end with one in a hundred.
Below `SPARSE_BELOW` the sparse products (`tcsae.train.sae.sparse`) are faster than dense ones, above it
slower. Both kinds of `Entries` do the same, so an architecture's equations are written once, elementwise.

Legend: B tokens, D d_model, F features, N listed entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tcsae.train.sae.code import Code, DenseCode, SparseCode
from tcsae.train.sae.sparse import Active, active_entries, decode_active, encode_active

SPARSE_BELOW = 0.05
"""share of entries below which listing them is faster, measured at B = 2048, D = 576, F = 2304"""


class Entries(ABC):
    """Some entries of a batch's pre-activations; ``[...]`` below is [N] or [B, F]."""

    values: Tensor
    """[...] with gradient to the encoder's weight and bias"""

    @abstractmethod
    def spread(self, per_feature: Float[Tensor, " feature"]) -> Tensor:
        """[...] each entry's feature's value, or what broadcasts to it, with gradient."""

    @abstractmethod
    def only(self, values: Tensor) -> Tensor:
        """[...] with 0 for entries that are not listed, with gradient."""

    @abstractmethod
    def sums(self, values: Tensor) -> Float[Tensor, " feature"]:
        """Sum over the batch of each feature's ``values`` [...], which are `only` listed ones."""

    @abstractmethod
    def decode(
        self, values: Tensor, W_dec: Float[Tensor, "feature d_model"]
    ) -> Float[Tensor, "token d_model"]:
        """The code with ``values`` [...], which are `only` listed ones, times W_dec."""

    @abstractmethod
    def code(self, values: Tensor) -> Code:
        """The code with ``values`` [...] ≥ 0, which are `only` listed ones."""


@dataclass(frozen=True, slots=True)
class ListedEntries(Entries):
    """[N]"""

    values: Float[Tensor, " listed"]
    where: Active

    def spread(self, per_feature: Float[Tensor, " feature"]) -> Tensor:
        # Not per_feature[...], whose gradient is summed in any order.
        return per_feature.index_select(0, self.where.feature)

    def only(self, values: Tensor) -> Tensor:
        return values

    def sums(self, values: Tensor) -> Float[Tensor, " feature"]:
        n_features = len(self.where.feature_offsets) - 1
        return values.new_zeros(n_features).index_add(0, self.where.feature, values)

    def decode(
        self, values: Tensor, W_dec: Float[Tensor, "feature d_model"]
    ) -> Float[Tensor, "token d_model"]:
        return decode_active(values, W_dec, self.where)

    def code(self, values: Tensor) -> Code:
        on = (values.detach() > 0).nonzero().flatten()
        if len(on) == len(values):
            return SparseCode(values, self.where)
        n_tokens, n_features = len(self.where.token_offsets) - 1, len(self.where.feature_offsets) - 1
        active = active_entries(self.where.token[on], self.where.feature[on], n_tokens, n_features)
        return SparseCode(values.index_select(0, on), active)


@dataclass(frozen=True, slots=True)
class AllEntries(Entries):
    """[B, F]"""

    values: Float[Tensor, "token feature"]
    listed: Bool[Tensor, "token feature"]

    def spread(self, per_feature: Float[Tensor, " feature"]) -> Tensor:
        return per_feature

    def only(self, values: Tensor) -> Tensor:
        return values * self.listed

    def sums(self, values: Tensor) -> Float[Tensor, " feature"]:
        return values.sum(dim=0)

    def decode(
        self, values: Tensor, W_dec: Float[Tensor, "feature d_model"]
    ) -> Float[Tensor, "token d_model"]:
        return values @ W_dec

    def code(self, values: Tensor) -> Code:
        return DenseCode(values)


class _EncodeAll(torch.autograd.Function):
    """values = x W^T + bias, computed before; gradients to W and bias."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
        del W, bias
        ctx.save_for_backward(x)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return None, None, grad.T @ x, grad.sum(dim=0)


def entries_of(
    pre: Float[Tensor, "token feature"],
    listed: Bool[Tensor, "token feature"],
    valid: Bool[Tensor, " token"],
    x: Float[Tensor, "token d_model"],
    W: Float[Tensor, "feature d_model"],
    bias: Float[Tensor, " feature"],
) -> Entries:
    """The ``listed`` entries of the ``valid`` tokens, connected to W and bias.

    Parameters
    ----------
    pre
        ``x @ W.T + bias``, which the caller has computed without gradient and does not change
    listed
        which entries may be active; changed to leave out tokens that are not valid
    """
    if not valid.all():
        listed &= valid[:, None]
    if int(torch.count_nonzero(listed)) < SPARSE_BELOW * listed.numel():
        token, feature = listed.nonzero(as_tuple=True)
        where = active_entries(token, feature, *pre.shape)
        return ListedEntries(encode_active(pre[token, feature], x, W, bias, where), where)
    values: Tensor = _EncodeAll.apply(pre, x, W, bias)  # type: ignore[no-untyped-call]
    return AllEntries(values, listed)
