"""The terms of the objective (METHOD.md, section 3), each a pure function of tensors.

Legend: B tokens, D d_model, A anchors, Q keys in the ring, H features of the contrastive block. The temporal
terms without a ring are in `tcsae.train.pair_losses`.
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


class Codes(NamedTuple):
    """Block H's code of some tokens, and where they are from."""

    code: Float[Tensor, "token block"]
    """≥ 0, of any norm; a row of zeros is empty"""
    document: Int64[Tensor, " token"]
    source: Int64[Tensor, " token"]
    """small integers; what counts as the same source for ``accuracy_within_source``"""


class Contrast(NamedTuple):
    """A temporal term and what describes it; shares and accuracies are 0-1, nan where nothing was counted."""

    loss: Float[Tensor, ""]
    """mean over the pairs that count; 0 where none does"""
    accuracy: float
    """share of queries whose positive is nearer than every negative; nan unless asked for"""
    accuracy_within_source: float
    """the same against the negatives of the query's own source alone; nan unless asked for"""
    masked_share: float
    """share of (query, negative) pairs left out as of one document, or because the negative is empty"""
    empty_share: float
    """share of pairs whose anchor or positive has an empty code; a contrast drops them"""
    n_pairs: int
    """pairs that count"""


def info_nce(
    tokens: Codes,
    anchor: Int64[Tensor, " pair"],
    positive: Int64[Tensor, " pair"],
    keys: Iterable[Codes],
    temperature: float,
    *,
    detailed: bool = False,
) -> Contrast:
    """Symmetric InfoNCE with cosines, against keys that come in pieces.

        l_i = -log [ e^{u_i . sg(u_i+) / t} / ( e^{u_i . sg(u_i+) / t} + sum_j e^{u_i . v_j / t} ) ]

    over the keys j of other documents than token i, u and v unit vectors, sg: no gradient; then the same with
    anchor and positive exchanged, and the mean of both. The keys get no gradient. Pairs with an empty code are
    dropped.

    The gradient of the denominators is summed while the keys pass by, so memory is that of one piece; cosines
    are bounded, e^{1 / 0.02} = 5e21, so no maximum has to be known first. A token of several pairs has one
    denominator. Products of codes are fastest where their width is a multiple of 16 (`tcsae.train.temporal`).

    Keys may be of bfloat16. Then logits and their exponentials are, too, which on an AVX-512 CPU is 2.5 times as
    fast; all sums over keys, and everything of the pair itself, stay in the tokens' dtype.

    Parameters
    ----------
    tokens
        every token of the pairs
    anchor, positive
        rows of ``tokens``
    keys
        each piece is used before the next is asked for and may share its memory
    temperature
        ≥ 0.02
    detailed
        also measure the accuracies, two more passes over all logits

    One pair of equal codes and one orthogonal key at temperature 1: log(1 + e^0 / e^1) = 0.3133 both ways.

    >>> one, zero = torch.tensor([1]), torch.tensor([0])
    >>> tokens = Codes(torch.tensor([[2.0, 0.0]]), one, one)
    >>> info_nce(tokens, zero, zero, [Codes(torch.tensor([[0.0, 3.0]]), torch.tensor([7]), one)], 1.0).loss
    tensor(0.3133)
    """
    anchor, positive, empty_share = without_empty(tokens, anchor, positive)
    n_pairs = len(anchor)
    if n_pairs == 0:
        return Contrast(tokens.code.sum() * 0, torch.nan, torch.nan, torch.nan, empty_share, 0)
    unit = normalize(tokens.code, dim=1)
    denominator, seen = _Denominator.apply(  # type: ignore[no-untyped-call]
        unit, tokens.document, tokens.source if detailed else None, keys, temperature
    )
    # index_select, not indexing: its gradient is summed in a fixed order whatever the number of threads.
    queries = torch.cat([anchor, positive])
    query = unit.index_select(0, queries)
    other = query.detach().roll(n_pairs, dims=0)
    own = (query * other).sum(dim=1) / temperature
    loss = torch.log1p(denominator.index_select(0, queries) * torch.exp(-own)).mean()
    own = own.detach()
    return Contrast(
        loss,
        share_won(own, seen.nearest[queries]),
        share_won(own, seen.nearest_in_source[queries]),
        seen.n_masked[queries].double().mean().item() / seen.n_keys if seen.n_keys else torch.nan,
        empty_share,
        n_pairs,
    )


def without_empty(tokens: Codes, anchor: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, float]:
    """The pairs both of whose codes have an entry, and the share of those that have not."""
    some = tokens.code.detach().amax(dim=1) > 0
    keep = some[anchor] & some[positive]
    empty_share = 1 - keep.double().mean().item() if len(keep) else torch.nan
    return anchor[keep], positive[keep], empty_share


def share_won(own: Tensor, nearest: Tensor) -> float:
    """Share of the queries with a negative whose ``own`` is above ``nearest``, which is -inf without one."""
    return (own > nearest)[nearest > -torch.inf].double().mean().item()


class _Seen(NamedTuple):
    nearest: Tensor
    """largest logit of a negative for each query, -inf without one; as the next, only where asked for"""
    nearest_in_source: Tensor
    n_masked: Tensor
    """keys that are no negative for each query"""
    n_keys: int


class _Denominator(torch.autograd.Function):
    """sum_j e^{q_i . v_j / t} over the keys of other documents; its gradient, sum_j e^(..) v_j / t."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        document: Tensor,
        source: Tensor | None,
        keys: Iterable[Codes],
        temperature: float,
    ) -> tuple[Tensor, _Seen]:
        learns = ctx.needs_input_grad[0]
        total = query.new_zeros(len(query))
        slope = torch.zeros_like(query)
        nearest = query.new_full((len(query),), -torch.inf)
        nearest_in_source = nearest.clone()
        n_masked, n_keys = torch.zeros_like(document), 0
        memory: _Memory | None = None
        scaled, by_document = query / temperature, _ByDocument(document)
        for piece in keys:
            code, n = piece.code, len(piece.code)
            if memory is None or len(memory.unit) < n:
                scaled, memory = scaled.to(code.dtype), _memory(query, code)
            norm = torch.linalg.vector_norm(code, dim=1, keepdim=True, dtype=query.dtype)
            unit, logits = memory.unit[:n], memory.logits[: n * len(query)].view(len(query), n)
            torch.mul(code, norm.clamp_min(1e-12).reciprocal_(), out=unit)
            torch.mm(scaled, unit.T, out=logits)
            masked_query, masked_key = by_document.pairs(piece.document)
            logits[masked_query, masked_key] = -torch.inf
            empty = norm[:, 0] == 0
            if empty.any():
                logits[:, empty] = -torch.inf
            n_masked += torch.bincount(masked_query[~empty[masked_key]], minlength=len(query)) + empty.sum()
            n_keys += n
            if source is not None:
                nearest = torch.maximum(nearest, logits.amax(dim=1))
                elsewhere = source[:, None] != piece.source[None, :]
                inside = logits.masked_fill(elsewhere, -torch.inf).amax(dim=1)
                nearest_in_source = torch.maximum(nearest_in_source, inside)
            logits.exp_()
            total += logits.sum(dim=1, dtype=query.dtype)
            if learns:
                slope += torch.mm(logits, unit, out=memory.slope)
        ctx.save_for_backward(slope.div_(temperature))
        ctx.set_materialize_grads(False)
        return total, _Seen(nearest, nearest_in_source, n_masked, n_keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (None if grad is None else grad[:, None] * slope), None, None, None, None


class _Memory(NamedTuple):
    """What every piece of keys overwrites: fresh pages would cost as much as the exponentials."""

    unit: Tensor
    """[key, block], in the keys' dtype as all of these"""
    logits: Tensor
    """[query * key]"""
    slope: Tensor
    """[query, block]"""


def _memory(query: Tensor, code: Tensor) -> _Memory:
    return _Memory(
        torch.empty_like(code), code.new_empty(len(query) * len(code)), code.new_empty(query.shape)
    )


class _ByDocument:
    """Queries in order of their document, to find those of a key's: the same for every piece of keys."""

    def __init__(self, document: Tensor) -> None:
        self._document, self._order = document.sort(stable=True)

    def pairs(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Index pairs (query, key) of one document, given the keys' documents.

        A join: its work grows with the pairs that it finds, not with queries times keys.

        >>> [each.tolist() for each in _ByDocument(torch.tensor([7, 5, 7])).pairs(torch.tensor([7, 6, 5]))]
        [[0, 2, 1], [0, 0, 2]]
        """
        first = torch.searchsorted(self._document, key)
        counts = torch.searchsorted(self._document, key, right=True) - first
        column = torch.repeat_interleave(torch.arange(len(key), device=key.device), counts)
        within = torch.arange(len(column), device=key.device) - (counts.cumsum(0) - counts)[column]
        return self._order[first[column] + within], column
