"""The model with something else at the hook: an SAE's reconstruction, zeros or the mean.

The layers below the hook run once per batch, the layers above it once per variant. Nothing is spliced at
special tokens or padding (`Batch.keep`), except in SAEBench's own ablation, which zeroes every position.

Ablation is cheaper than it looks. Above a hook that the whole residual stream passes through, nothing is
left of a row's text once its activations are replaced by a constant: only its positions and its BOS matter,
which all rows share. So one row is run and serves them all. Whether the hook is such a bottleneck is
measured, by changing the tokens under a fixed activation, and not read off its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tcsae.evaluate.heldout import Batch
from tcsae.evaluate.language import log_softmax_

BOTTLENECK_TOLERANCE = 1e-4
"""Largest difference of log-probabilities that still counts as rounding."""


@runtime_checkable
class ReplayModel(Protocol):
    """What is asked of a language model; `tcsae.harvest.model.LanguageModel` is one."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    def residuals(
        self, input_ids: Int64[Tensor, "batch position"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch position d_model"]]:
        """Activations at ``hooks``; nothing above the highest of them runs."""

    def logits_from(
        self,
        input_ids: Int64[Tensor, "batch position"],
        hook: str,
        x: Float[Tensor, "batch position d_model"],
    ) -> Float[Tensor, "batch position vocab"]:
        """Logits if the activation at ``hook`` were ``x``; what is below the hook need not run."""


class Splicer:
    """One model at one hook."""

    def __init__(self, model: ReplayModel, hook: str) -> None:
        self.model = model
        self.hook = hook
        self._is_bottleneck: bool | None = None

    def activations(self, batch: Batch) -> Float[Tensor, "batch position d_model"]:
        """The model's own activations at the hook, in float32."""
        return self.model.residuals(batch.input_ids, [self.hook])[self.hook].float()

    def log_probs(
        self, batch: Batch, x: Float[Tensor, "batch position d_model"]
    ) -> Float[Tensor, "batch position vocab"]:
        """Log-probabilities of the next token with ``x`` at the hook, in float32."""
        return log_softmax_(self.model.logits_from(batch.input_ids, self.hook, x).float())

    def is_bottleneck(self, one: Batch, x: Float[Tensor, "1 position d_model"]) -> bool:
        """Whether the logits depend on the text through the activation at the hook alone.

        Measured at the first call, by running the upper layers for the tokens of the row ``one`` and for
        others, under the same activation.
        """
        if self._is_bottleneck is None:
            others = (one.input_ids + 1) % self.model.vocab_size
            changed = Batch(others, one.keep, one.length, one.document)
            difference = self.log_probs(one, x) - self.log_probs(changed, x)
            self._is_bottleneck = bool(difference.abs().max() <= BOTTLENECK_TOLERANCE)
        return self._is_bottleneck


class Ablation:
    """Log-probabilities with one constant at the hook.

    Parameters
    ----------
    splicer
        the model and the hook
    constant
        what is put there
    everywhere
        at every position, as SAEBench ablates, or at the kept ones only, where an SAE is spliced
    """

    def __init__(self, splicer: Splicer, constant: Float[Tensor, " d_model"], *, everywhere: bool) -> None:
        self._splicer = splicer
        self._constant = constant
        self._everywhere = everywhere
        self.shared: Float[Tensor, "1 position vocab"] | None = None
        """the one row that serves all, if one has been run"""
        self._front: Float[Tensor, "front d_model"] | None = None

    def log_probs(
        self, batch: Batch, x: Float[Tensor, "batch position d_model"]
    ) -> Float[Tensor, "batch position vocab"]:
        """As `Splicer.log_probs`, the constant put into ``x``.

        A view of one row for all where every row comes out the same.

        Batches must come with their longest row first (as `HeldOut.batches` gives them) for the one row to
        serve them all; a longer one later is run and kept in its place.
        """
        ablated = torch.where(self._mask(batch).to(x.device), self._constant.to(x), x)
        if not self._only_the_front_is_left(batch):
            return self._splicer.log_probs(batch, ablated)
        n_positions = ablated.shape[1]
        front = ablated[0, :1]
        fits = (
            self.shared is not None
            and self._front is not None
            and self.shared.shape[1] >= n_positions
            and torch.allclose(self._front, front, rtol=1e-4, atol=1e-5)
        )
        if not fits:
            one = Batch(batch.input_ids[:1], batch.keep[:1], batch.length[:1], batch.document[:1])
            if not self._splicer.is_bottleneck(one, ablated[:1]):
                return self._splicer.log_probs(batch, ablated)
            self.shared = self._splicer.log_probs(one, ablated[:1])
            self._front = front
        assert self.shared is not None
        return self.shared[:, :n_positions].expand(len(batch.length), -1, -1)

    def _mask(self, batch: Batch) -> Bool[Tensor, "batch position 1"]:
        mask = torch.ones_like(batch.keep) if self._everywhere else batch.keep
        return mask[..., None]

    def _only_the_front_is_left(self, batch: Batch) -> bool:
        """Whether the ablation leaves at most each row's first token, and that the same in every row."""
        if self._everywhere:
            return True
        positions = torch.arange(batch.keep.shape[1])
        real = positions < torch.tensor(batch.length)[:, None]
        inside = (real & ~batch.keep)[:, 1:]
        same_front = bool(
            batch.keep[:, 0].all()
            or (not batch.keep[:, 0].any() and (batch.input_ids[:, 0] == batch.input_ids[0, 0]).all())
        )
        # the longest row stands first and is the one that is run: it must reach to the batch's end
        return same_front and not bool(inside.any()) and batch.length[0] == batch.keep.shape[1]
