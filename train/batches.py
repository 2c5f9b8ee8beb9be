"""Batches of windows in a seeded order, and random pieces of the train split for the ring.

Nothing here has a hidden state: what is read in an epoch or after a step is a function of the seed and of
that epoch or step, so a run resumes from ``(epoch, cursor)``.

Legend: B tokens of a batch, W windows, D d_model.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError, RunMismatch
from tcsae.train.scaler import Scaler

log = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]

ORDER, RING, PAIRS = range(3)
"""purposes of random numbers; each has its own stream (see `random_stream`)"""


def random_stream(seed: int, purpose: int, index: int) -> np.random.Generator:
    """The generator for ``purpose`` at epoch or step ``index``: a function of its arguments alone."""
    return np.random.default_rng([seed, purpose, index])


class Rows(NamedTuple):
    """Some rows of the store with what the losses must know about them."""

    raw: Float[Tensor, "token d_model"]
    """as stored; outliers are zeros"""
    x: Float32[Tensor, "token d_model"]
    """normalised; outliers are zeros"""
    valid: Bool[Tensor, " token"]
    """not an outlier"""
    document: Int64Array
    """[token] index of the document"""
    source: Int64Array
    """[token] number of the document's source"""
    position: Int64Array
    """[token] in its context"""
    token: npt.NDArray[np.int32]
    """[token] token id"""
    eligible: npt.NDArray[np.bool_]
    """[token] may be anchor, positive or negative: no outlier, no special token, not too early"""


class WindowLoader:
    """All windows of the train split in a new order each epoch, ``batch_tokens`` tokens at a time.

    A context of L tokens has L // window windows; in each epoch they begin at a new random phase, so that
    every token is seen. A batch that runs over the end of an epoch goes on with the next.

    Parameters
    ----------
    store, hook
        where the activations are
    window
        tokens of a window
    batch_tokens
        tokens of a batch, a multiple of ``window``
    seed
        of the order
    min_position
        earlier positions of a context are not eligible
    device
        where the tensors go

    Raises
    ------
    ConfigError
        no context of the train split holds a window, or all together hold less than a batch
    """

    def __init__(
        self,
        store: ActivationStore,
        hook: str | None,
        *,
        window: int,
        batch_tokens: int,
        seed: int,
        min_position: int,
        device: torch.device,
    ) -> None:
        self._store, self._hook, self._device = store, hook, device
        self._window, self._seed, self._min_position = window, seed, min_position
        statistics = store.statistics(hook)
        self.scaler = Scaler.of(statistics)
        self._outlier_norm = statistics.outlier_norm
        self._special = np.array(store.provenance.special_token_ids, dtype=np.int64)
        _, source = np.unique(store.documents["source"].to_numpy(zero_copy_only=False), return_inverse=True)
        self._source: Int64Array = source.astype(np.int64)
        contexts = store.contexts_in("train")
        lengths = np.diff(store.context_offsets)[contexts]
        fits = lengths >= window
        self._contexts, self._lengths = contexts[fits], lengths[fits]
        self.windows_per_epoch = int((self._lengths // window).sum())
        self.windows_per_batch = batch_tokens // window
        self.n_tokens = int(lengths.sum())
        n_eligible = np.maximum(self._lengths - min_position, 0)
        self.most_eligible = int(n_eligible.max(initial=0))
        """positions from ``min_position`` on of the longest context"""
        # Eligible positions over those that one piece holds: then all are equally likely to be drawn.
        weights = np.where(n_eligible > 0, np.maximum(n_eligible, window), 0)
        self._piece_bounds: Int64Array = np.cumsum(weights)
        self._eligible_per_piece = window * n_eligible.sum() / max(weights.sum(), 1)
        longest = int(lengths.max()) if len(lengths) else 0
        if not self.windows_per_epoch:
            raise ConfigError(
                f"window: {window} tokens, but the longest context of {store.path}'s train split has "
                f"{longest}; choose a smaller window or harvest with a larger --context-length"
            )
        if self.windows_per_epoch < self.windows_per_batch:
            raise ConfigError(
                f"batch_tokens: {batch_tokens} tokens are {self.windows_per_batch} windows of {window}, but "
                f"{store.path}'s train split has {self.windows_per_epoch} ({self.n_tokens} tokens); lower "
                "batch_tokens or harvest more"
            )
        self.epoch = 0
        self.cursor = 0
        self._load_epoch()

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in an epoch's windows."""
        return self.windows_per_epoch * self._window

    def next(self) -> Rows:
        """The next batch: windows one after the other, so it reshapes to [W, window]."""
        picked = np.arange(self.cursor, min(self.cursor + self.windows_per_batch, self.windows_per_epoch))
        starts, contexts = self._starts[picked], self._of_context[picked]
        self.cursor += self.windows_per_batch
        if self.cursor >= self.windows_per_epoch:
            self.cursor -= self.windows_per_epoch
            self.epoch += 1
            self._load_epoch()
            log.info("epoch %d begins, in a new order", self.epoch + 1)
            starts = np.concatenate([starts, self._starts[: self.windows_per_batch - len(picked)]])
            contexts = np.concatenate([contexts, self._of_context[: self.windows_per_batch - len(picked)]])
        return self._read(starts, contexts)

    def ring_rows(self, step: int, n: int) -> Rows:
        """About 1.5 ``n`` tokens from ``min_position`` on for the ring after ``step``, in random pieces.

        A piece is as long as a window and contiguous. Contexts of a window or more are drawn so that each
        gives tokens in proportion to its positions from ``min_position`` on; within a context those near its
        ends are in fewer pieces. The surplus makes up for outliers and special tokens. For stores with
        `most_eligible` > 0.
        """
        stream = random_stream(self._seed, RING, step)
        n_pieces = math.ceil(1.5 * n / self._eligible_per_piece)
        drawn = stream.integers(self._piece_bounds[-1], size=n_pieces)
        which = np.searchsorted(self._piece_bounds, drawn, side="right")
        last = self._lengths[which] - self._window
        first = np.minimum(self._min_position, last)
        starts = self._store.context_offsets[self._contexts[which]] + stream.integers(first, last + 1)
        return self._read(starts, self._contexts[which])

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins."""
        return {"version": 1, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what `state_dict` returned; raises `RunMismatch` for another version."""
        if state["version"] != 1:
            raise RunMismatch(
                f"loader state of version {state['version']}, this tcsae reads 1; upgrade tcsae"
            )
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._load_epoch()

    def _load_epoch(self) -> None:
        """The windows of `epoch` in its order: `_starts` (rows) and `_of_context`."""
        stream = random_stream(self._seed, ORDER, self.epoch)
        window = self._window
        # A phase of 0 .. L mod window leaves room for all L // window windows.
        phases = stream.integers(self._lengths % window + 1)
        counts = self._lengths // window
        first = np.repeat(np.cumsum(counts) - counts, counts)
        within = np.arange(self.windows_per_epoch) - first  # counts [2, 3] give [0, 1, 0, 1, 2]
        starts = np.repeat(self._store.context_offsets[self._contexts] + phases, counts) + within * window
        order = stream.permutation(self.windows_per_epoch)
        self._starts: Int64Array = starts[order]
        self._of_context: Int64Array = np.repeat(self._contexts, counts)[order]

    def _read(self, starts: Int64Array, contexts: Int64Array) -> Rows:
        rows = (starts[:, None] + np.arange(self._window)).ravel()
        raw = self._store.gather(rows, self._hook).to(self._device)
        valid = torch.linalg.vector_norm(raw, dim=1, dtype=torch.float32) <= self._outlier_norm
        x = self.scaler.normalise(raw)
        if not valid.all():
            raw[~valid] = 0
            x[~valid] = 0
        per_token = np.repeat(contexts, self._window)
        document = self._store.document_of_context[per_token]
        position = rows - self._store.context_offsets[per_token]
        token = np.asarray(self._store.tokens[rows])
        eligible = (position >= self._min_position) & ~np.isin(token, self._special) & valid.cpu().numpy()
        return Rows(raw, x, valid, document, self._source[document], position, token, eligible)
