"""Temporal terms between the pairs of a step alone: T-SAE's contrast, and the squared difference.

Legend: P pairs, D d_model, H features of the contrastive block.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tcsae.train.config import Similarity
from tcsae.train.losses import Codes, Contrast, share_won, without_empty


def in_batch(
    tokens: Codes,
    anchor: Int64[Tensor, " pair"],
    positive: Int64[Tensor, " pair"],
    temperature: float,
    *,
    similarity: Similarity = "cosine",
    mask_documents: bool = True,
    detailed: bool = False,
) -> Contrast:
    """Symmetric InfoNCE between the pairs of one step (T-SAE, Bhalla et al. 2025, arXiv 2511.05541).

        s_ij = sim(a_i, p_j) / t
        l    = 1/2 mean_i [ -log e^{s_ii} / sum_j e^{s_ij} ] + 1/2 mean_j [ -log e^{s_jj} / sum_i e^{s_ij} ]

    with a the codes of the anchors and p of their positives: each anchor among the positives of all pairs, and
    each positive among the anchors. The gradient goes through both sides. T-SAE as published has the cosine
    and t = 1; as released, the dot product.

    Where this differs from the original: every token of a batch is an anchor there, and pairs with an empty
    code count (their similarity is 0); here they are dropped.

    Parameters
    ----------
    tokens
        every token of the pairs
    anchor, positive
        rows of ``tokens``
    temperature
        more than 0
    similarity
        the cosine, or the plain dot product, which rewards large codes
    mask_documents
        leave tokens of a query's own document out of its negatives; T-SAE does not
    detailed
        also measure the accuracies

    Two pairs of equal codes at right angles: each row of s is 1 and 0, so log(1 + e^-1) = 0.3133.

    >>> tokens = Codes(torch.eye(2), torch.arange(2), torch.zeros(2, dtype=torch.int64))
    >>> in_batch(tokens, torch.arange(2), torch.arange(2), 1.0).loss
    tensor(0.3133)
    """
    anchor, positive, empty_share = without_empty(tokens, anchor, positive)
    n_pairs = len(anchor)
    if n_pairs == 0:
        return Contrast(tokens.code.sum() * 0, torch.nan, torch.nan, torch.nan, empty_share, 0)
    code = normalize(tokens.code, dim=1) if similarity == "cosine" else tokens.code
    # index_select, not indexing: its gradient is summed in a fixed order whatever the number of threads.
    logits = code.index_select(0, anchor) @ code.index_select(0, positive).T / temperature
    itself = torch.eye(n_pairs, dtype=torch.bool, device=logits.device)
    document = tokens.document
    masked = (document[anchor][:, None] == document[positive][None, :]) & ~itself & mask_documents
    logits = logits.masked_fill(masked, -torch.inf)
    own = torch.arange(n_pairs, device=logits.device)
    loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    accuracy = within_source = torch.nan
    if detailed:
        source = tokens.source
        elsewhere = source[anchor][:, None] != source[positive][None, :]
        negative = logits.detach().masked_fill(itself, -torch.inf)
        accuracy = _top_1(logits, negative)
        within_source = _top_1(logits, negative.masked_fill(elsewhere, -torch.inf))
    n_negatives = n_pairs * (n_pairs - 1)
    return Contrast(
        loss,
        accuracy,
        within_source,
        masked.sum().item() / n_negatives if n_negatives else torch.nan,
        empty_share,
        n_pairs,
    )


def _top_1(logits: Tensor, negative: Tensor) -> float:
    """Share of queries, rows and columns, whose own logit is above every ``negative`` one."""
    own = logits.detach().diagonal()
    return share_won(torch.cat([own, own]), torch.cat([negative.amax(dim=1), negative.amax(dim=0)]))


def difference(
    tokens: Codes, anchor: Int64[Tensor, " pair"], positive: Int64[Tensor, " pair"], d_model: int
) -> Contrast:
    """Mean squared difference of anchor's and positive's code, mean_i ||a_i - p_i||^2 / D.

    Activations have E||x||^2 = D, so this is in the units of the FVU. Nothing divides it by the codes' own
    size: it is the control whose known failure is to shrink them, a = p = 0 being its minimum (METHOD.md,
    section 2). Pairs with an empty code count, and ``empty_share`` tells how many there are.

    Codes (3, 0) and (1, 1) at D = 2: (4 + 1) / 2.

    >>> where = torch.zeros(2, dtype=torch.int64)
    >>> tokens = Codes(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), where, where)
    >>> difference(tokens, torch.tensor([0]), torch.tensor([1]), 2).loss
    tensor(2.5000)
    """
    *_, empty_share = without_empty(tokens, anchor, positive)
    code, n_pairs = tokens.code, len(anchor)
    apart = code.index_select(0, anchor) - code.index_select(0, positive)
    loss = apart.square().sum() / (max(n_pairs, 1) * d_model)
    return Contrast(loss, torch.nan, torch.nan, torch.nan, empty_share, n_pairs)
