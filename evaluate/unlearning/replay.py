"""The model with clamped features on contexts whose clean pass is kept.

Below the hook the model runs once per context, whatever is clamped; above it once per setting, and only for
contexts in which a clamped feature fires: the others are what they were, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tcsae.evaluate.heldout import Batch, HeldOut
from tcsae.evaluate.language import next_token_loss
from tcsae.evaluate.splice import Splicer
from tcsae.evaluate.unlearning.clamp import clamp_change
from tcsae.evaluate.unlearning.domains import Indices
from tcsae.train.sae.inference import SAE


@dataclass(frozen=True, slots=True, eq=False)
class CleanContext:
    """One context as the model sees it untouched."""

    number: int
    """of the context in the store"""
    document: int
    """number of its document in the store"""
    input_ids: Int64[Tensor, " position"]
    """BOS included"""
    keep: Bool[Tensor, " position"]
    """where features may be clamped: no special token"""
    x: Float[Tensor, "position d_model"]
    """activations at the hook"""
    counted: Bool[Tensor, " target"]
    """predictions that figures rest on: from a kept token, of a kept token"""
    loss: Float64[Tensor, " target"]
    """cross-entropy of each prediction, in nats"""
    hit: Bool[Tensor, " target"]
    """whether the likeliest token was the right one"""


@torch.no_grad()
def clean_contexts(
    splicer: Splicer, held_out: HeldOut, contexts: Indices, batch_size: int
) -> list[CleanContext]:
    """One clean pass over ``contexts`` (numbers in the store), longest first."""
    store = held_out.store
    lengths = store.context_offsets[contexts + 1] - store.context_offsets[contexts]
    ordered = contexts[np.argsort(-lengths, kind="stable")]
    clean = []
    for at in range(0, len(ordered), batch_size):
        part = ordered[at : at + batch_size]
        batch = held_out.batch_of(part)
        x = splicer.activations(batch)
        log_probs = splicer.log_probs(batch, x)
        for row, (number, length) in enumerate(zip(part.tolist(), batch.length, strict=True)):
            tokens, keep = batch.input_ids[row, :length], batch.keep[row, :length]
            loss, hit = _outcome(log_probs[row, :length], tokens)
            clean.append(
                CleanContext(
                    number=number,
                    document=int(store.document_of_context[number]),
                    input_ids=tokens,
                    keep=keep,
                    x=x[row, :length].clone(),
                    counted=keep[:-1] & keep[1:],
                    loss=loss,
                    hit=hit,
                )
            )
    return clean


def _outcome(
    log_probs: Float[Tensor, "position vocab"], tokens: Int64[Tensor, " position"]
) -> tuple[Float64[Tensor, " target"], Bool[Tensor, " target"]]:
    """Loss and hit of each prediction."""
    (loss,) = next_token_loss(log_probs[None], tokens[None].to(log_probs.device)).double().cpu()
    return loss, log_probs[:-1].argmax(dim=-1).cpu() == tokens[1:]


@runtime_checkable
class Clean(Protocol):
    """One context or prompt whose clean pass is kept; `CleanContext` is one."""

    @property
    def input_ids(self) -> Int64[Tensor, " position"]:
        """BOS included"""

    @property
    def keep(self) -> Bool[Tensor, " position"]:
        """where features may be clamped"""

    @property
    def x(self) -> Float[Tensor, "position d_model"]:
        """activations at the hook"""


class ClampedReplay:
    """An SAE's features of interest on clean contexts, ready to be clamped.

    Parameters
    ----------
    splicer
        the model and the hook
    sae
        whose features are clamped
    contexts
        what is run; those of about one length should stand together
    features
        all that any setting clamps; only their activations are kept
    batch_size
        contexts of one forward pass
    """

    def __init__(
        self, splicer: Splicer, sae: SAE, contexts: Sequence[Clean], features: Sequence[int], batch_size: int
    ) -> None:
        self._splicer = splicer
        self._contexts = contexts
        self._batch_size = batch_size
        self._column = {feature: at for at, feature in enumerate(features)}
        which = torch.tensor(list(features), dtype=torch.int64, device=sae.device)
        self._directions = sae.W_dec[which]
        self._f = [
            torch.where(one.keep[:, None].to(sae.device), sae.encode(one.x.to(sae.device))[:, which], 0.0)
            for one in contexts
        ]

    @torch.no_grad()
    def rerun(
        self, features: Sequence[int], to: Sequence[float]
    ) -> Iterator[tuple[int, Float[Tensor, "position vocab"]]]:
        """Log-probabilities with each of ``features`` at its value in ``to`` wherever it fires.

        Yields the index of each context in which one of them fires; the others are as they were.
        """
        columns = [self._column[feature] for feature in features]
        values = torch.tensor(list(to), dtype=self._directions.dtype, device=self._directions.device)
        touched = [at for at, f in enumerate(self._f) if bool((f[:, columns] > 0).any())]
        for first in range(0, len(touched), self._batch_size):
            part = touched[first : first + self._batch_size]
            rows = []
            for at in part:
                x = self._contexts[at].x
                change = clamp_change(self._f[at][:, columns], values, self._directions[columns])
                rows.append(x + change.to(x))
            log_probs = self._splicer.log_probs(
                batch_of([self._contexts[at] for at in part]), pad_sequence(rows, batch_first=True)
            )
            for row, at in enumerate(part):
                yield at, log_probs[row, : len(rows[row])]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Sums over the counted predictions of each context, the contexts in the order they were given."""

    rise: Float[np.ndarray, " context"]
    """cross-entropy with the features clamped minus without, in nats; exactly 0 where none fires"""
    hits: Float[np.ndarray, " context"]
    """right predictions of the likeliest token, with the features clamped"""


def clamped_outcome(
    replay: ClampedReplay, contexts: Sequence[CleanContext], features: Sequence[int], to: Sequence[float]
) -> Outcome:
    """What the model makes of ``contexts`` (those of ``replay``) with ``features`` clamped to ``to``."""
    rise = np.zeros(len(contexts))
    hits = np.array([float((one.hit & one.counted).sum()) for one in contexts])
    for at, log_probs in replay.rerun(features, to):
        one = contexts[at]
        loss, hit = _outcome(log_probs, one.input_ids)
        rise[at] = float((loss - one.loss)[one.counted].sum())
        hits[at] = float((hit & one.counted).sum())
    return Outcome(rise, hits)


def batch_of(contexts: Sequence[Clean]) -> Batch:
    """The contexts as one batch, padded on the right."""
    return Batch(
        input_ids=pad_sequence([one.input_ids for one in contexts], batch_first=True),
        keep=pad_sequence([one.keep for one in contexts], batch_first=True),
        length=tuple(len(one.input_ids) for one in contexts),
        document=tuple(range(len(contexts))),
    )
