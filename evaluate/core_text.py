"""What the core suite replays: contexts of a store's documents, or the rows of a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.heldout import Batch, HeldOut
from tcsae.evaluate.splice import ReplayModel
from tcsae.evaluate.token_rows import TokenRows
from tcsae.store.reader import ActivationStore


@dataclass(frozen=True, slots=True)
class ReplayText:
    """Batches for the model with what the figures need to know of them."""

    batches: Sequence[Batch]
    """in the order in which they are run"""
    unit: Literal["document", "row"]
    """of resampling: a document, or a row of the file"""
    n_documents: int
    """such units"""
    n_positions: int
    """as SAEBench counts them: batches of full contexts, special tokens included"""
    mean: Float[Tensor, " d_model"]
    """what the mean ablation puts at the hook, float32"""
    held_out: HeldOut | None
    """stored activations behind the reconstruction figures; None: the replay's own activations are"""
    facts: dict[str, Any]
    """where the text and the mean come from, for the result's file"""

    @property
    def n_tokens(self) -> int:
        """Tokens of all batches, padding left out."""
        return sum(sum(batch.length) for batch in self.batches)


def text_of_store(held_out: HeldOut, *, max_tokens: int, batch_size: int, seed: int) -> ReplayText:
    """Contexts drawn at random from a store's held-out documents."""
    batches = held_out.batches(max_tokens, batch_size, seed)
    return ReplayText(
        batches=batches,
        unit="document",
        n_documents=1 + max(document for batch in batches for document in batch.document),
        n_positions=held_out.store.provenance.context_length * len(batches) * batch_size,
        mean=_mean_of_store(held_out.store, held_out.hook),
        held_out=held_out,
        facts={
            "text": f"contexts drawn from the store's {held_out.split} documents",
            "mean_ablation": "mean over the store's train split",
        },
    )


def text_of_rows(
    rows: TokenRows,
    hook: str,
    model: ReplayModel,
    special: tuple[int, ...],
    store: ActivationStore | None,
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> ReplayText:
    """All rows of a file in order.

    The mean ablation takes the mean of the store's train split; without a store, that over these rows' kept
    tokens, for which the layers below the hook are run once more. ``advance`` is told the tokens of each batch.
    """
    batches = rows.batches(batch_size, special)
    return ReplayText(
        batches=batches,
        unit="row",
        n_documents=rows.n_rows,
        n_positions=rows.n_tokens,
        mean=_mean_of_rows(batches, hook, model, advance) if store is None else _mean_of_store(store, hook),
        held_out=None,
        facts={
            "text": f"rows of {rows.path.name} in order",
            "tokens_sha256": rows.sha256,
            "mean_ablation": "mean over these rows' kept tokens"
            if store is None
            else "mean over the store's train split",
        },
    )


def _mean_of_store(store: ActivationStore, hook: str) -> Float[Tensor, " d_model"]:
    return torch.from_numpy(store.statistics(hook).mean).float()


def _mean_of_rows(
    batches: Sequence[Batch], hook: str, model: ReplayModel, advance: Callable[[int], None]
) -> Float[Tensor, " d_model"]:
    totals, n_kept = [], 0
    for batch in batches:
        x = model.residuals(batch.input_ids, [hook])[hook]
        kept = x[batch.keep.to(x.device)]
        totals.append(kept.sum(dim=0, dtype=torch.float64).cpu())
        n_kept += len(kept)
        advance(sum(batch.length))
    return (torch.stack(totals).sum(dim=0) / n_kept).float()
