"""The terms of the objective (METHOD.md, section 3), each a pure function of tensors.

Legend: B tokens, D d_model, A anchors, Q keys in the ring, H features of the contrastive block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize


def fvu(
    x: Float[Tensor, "token d_model"],
    reconstruction: Float[Tensor, "token d_model"],
    weight: Float[Tensor, " token"],
) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: mean ||x - x_hat||^2 / mean ||x||^2, tokens weighted by ``weight``.

    ``x`` is centred by the store's mean.

    Tokens (2, 0) and (0, 4) with errors 1 and 2; the third, an outlier, has weight 0: (1 + 4) / (4 + 16).

    >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0], [900.0, 0.0]])
    >>> x_hat = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> fvu(x, x_hat, torch.tensor([1.0, 1.0, 0.0]))
    tensor(0.2500)
    """
    return weight @ (x - reconstruction).square().sum(dim=1) / (weight @ x.square().sum(dim=1))


def auxiliary(
    error: Float[Tensor, "token d_model"],
    dead: Float[Tensor, "token dead"],
    W_dec: Float[Tensor, "dead d_model"],
    aux_k: int,
    weight: Float[Tensor, " token"],
) -> Float[Tensor, ""]:
    """AuxK: how badly the ``aux_k`` strongest dead features of each token reconstruct its error.

    mean ||error - e_hat||^2 / mean ||error||^2 with e_hat = (top aux_k of ReLU(dead)) W_dec, so features that
    no longer fire are drawn to what is missing. ``error`` is x - x_hat and gets no gradient.

    Error (3, 4), dead features 1 and 2 along the axes; the stronger alone gives (0, 2), so (9 + 4) / 25.

    >>> auxiliary(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]]), torch.eye(2), 1, torch.ones(1))
    tensor(0.5200)
    """
    error = error.detach()
    code = dead.relu()
    if code.shape[1] > aux_k:
        strongest = code.topk(aux_k, dim=1, sorted=False)
        code = torch.zeros_like(code).scatter(1, strongest.indices, strongest.values)
    return fvu(error, code @ W_dec, weight)


class Keys(NamedTuple):
    """Some of the ring's items as negatives."""

    code: Float[Tensor, "key block"]
    """≥ 0, of any norm; a row of zeros is no key; read only, may be reused for the next keys"""
    document: Int64[Tensor, " key"]
    source: Int64[Tensor, " key"]
    """small integers; what counts as the same source for ``accuracy_within_source``"""


class Contrast(NamedTuple):
    """InfoNCE and what describes it; shares and accuracies are 0-1, nan where nothing was counted."""

    loss: Float[Tensor, ""]
    """mean over both directions of the pairs that count, in nats; 0 where none does"""
    accuracy: float
    """share of queries whose positive is nearer than every negative"""
    accuracy_within_source: float
    """the same against the negatives of the query's own source alone; nan unless asked for"""
    masked_share: float
    """share of (query, key) pairs left out as of one document, or because the key is empty"""
    empty_share: float
    """share of pairs dropped because the anchor's or the positive's code is empty"""
    n_pairs: int
    """pairs that count"""


def info_nce(
    anchor: Float[Tensor, "pair block"],
    positive: Float[Tensor, "pair block"],
    document: Int64[Tensor, " pair"],
    source: Int64[Tensor, " pair"],
    keys: Iterable[Keys],
    temperature: float,
    *,
    within_source: bool = False,
) -> Contrast:
    """Symmetric InfoNCE with cosines, against keys that come in pieces.

        l_i = -log [ e^{u_i . sg(u_i+) / t} / ( e^{u_i . sg(u_i+) / t} + sum_j e^{u_i . v_j / t} ) ]

    over the keys j of other documents, u and v unit vectors, sg: no gradient; then the same with anchor and
    positive exchanged, and the mean of both. The keys get no gradient. Pairs with an empty code are dropped.

    The gradient of the denominators is summed while the keys pass by, so memory is that of one piece; cosines
    are bounded, so no maximum has to be known first. For ``temperature`` ≥ 0.02. ``within_source`` asks for
    the accuracy of that name, which costs as much as the exponentials.

    One pair of equal codes and one orthogonal key at temperature 1: log(1 + e^0 / e^1) = 0.3133 both ways.

    >>> code, one = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    >>> keys = Keys(torch.tensor([[0.0, 3.0]]), torch.tensor([7]), one)
    >>> info_nce(code, code, one, one, [keys], 1.0).loss
    tensor(0.3133)
    """
    keep = (anchor.detach().amax(dim=1) > 0) & (positive.detach().amax(dim=1) > 0)
    n_pairs, n_given = int(keep.sum()), len(anchor)
    empty_share = 1 - n_pairs / n_given if n_given else torch.nan
    if n_pairs == 0:
        nothing = (anchor.sum() + positive.sum()) * 0
        return Contrast(nothing, torch.nan, torch.nan, torch.nan, empty_share, 0)
    query = normalize(torch.cat([anchor[keep], positive[keep]]), dim=1)
    other = query.detach().roll(n_pairs, dims=0)
    documents = document[keep].repeat(2)
    sources = source[keep].repeat(2) if within_source else None
    denominator, seen = _Denominator.apply(  # type: ignore[no-untyped-call]
        query, documents, sources, keys, temperature
    )
    own = ((query * other).sum(dim=1) - 1) / temperature
    loss = torch.log1p(denominator * torch.exp(-own)).mean()
    own = own.detach()
    compared = seen.nearest_in_source > -torch.inf
    return Contrast(
        loss,
        (own > seen.nearest).double().mean().item() if seen.n_logits else torch.nan,
        (own > seen.nearest_in_source)[compared].double().mean().item(),
        seen.n_masked / seen.n_logits if seen.n_logits else torch.nan,
        empty_share,
        n_pairs,
    )


class _Seen(NamedTuple):
    nearest: Tensor
    """largest logit of a negative for each query, -inf without one"""
    nearest_in_source: Tensor
    n_masked: int
    n_logits: int


class _Denominator(torch.autograd.Function):
    """sum_j e^{(q_i . v_j - 1) / t} over the keys of other documents; its gradient, sum_j e^(..) v_j / t."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        document: Tensor,
        source: Tensor | None,
        keys: Iterable[Keys],
        temperature: float,
    ) -> tuple[Tensor, _Seen]:
        scaled = query / temperature
        shift = query.new_full((1,), -1 / temperature)
        total = query.new_zeros(len(query))
        slope = torch.zeros_like(query)
        nearest = query.new_full((len(query),), -torch.inf)
        nearest_in_source = nearest.clone()
        n_masked = n_logits = 0
        for piece in keys:
            unit = normalize(piece.code, dim=1)
            logits = torch.addmm(shift, scaled, unit.T)
            masked_query, masked_key = _same_document(document, piece.document)
            logits[masked_query, masked_key] = -torch.inf
            empty = piece.code.amax(dim=1) <= 0
            if empty.any():
                logits[:, empty] = -torch.inf
            n_masked += int(torch.isinf(logits).sum()) if empty.any() else len(masked_query)
            n_logits += logits.numel()
            nearest = torch.maximum(nearest, logits.amax(dim=1))
            if source is not None:
                elsewhere = source[:, None] != piece.source[None, :]
                inside = logits.masked_fill(elsewhere, -torch.inf).amax(dim=1)
                nearest_in_source = torch.maximum(nearest_in_source, inside)
            logits.exp_()
            total += logits.sum(dim=1)
            slope.addmm_(logits, unit)
        ctx.save_for_backward(slope.div_(temperature))
        ctx.set_materialize_grads(False)
        return total, _Seen(nearest, nearest_in_source, n_masked, n_logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (None if grad is None else grad[:, None] * slope), None, None, None, None


def _same_document(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Index pairs (query, key) of one document; only the few keys that match some query are compared."""
    columns = torch.isin(key, query).nonzero().flatten()
    rows, among = (query[:, None] == key[columns][None, :]).nonzero(as_tuple=True)
    return rows, columns[among]
