"""Batches of windows in normalised units, and what enters the ring, each read while the step before it computes.

What is read follows from the seed and from a batch's place or a step (`tcsae.train.window_reader`), so a run resumes
from ``(epoch, cursor)``.

Legend: B tokens of a batch, W windows, D d_model.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from tcsae.store import ActivationStore
from tcsae.store.errors import RunMismatch
from tcsae.train.read_ahead import ReadAhead
from tcsae.train.scaler import Scaler
from tcsae.train.window_reader import Int64Array, Memory, Place, ReadRows, WindowReader
from tcsae.train.world import ALONE, World

log = logging.getLogger(__name__)


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


class RingRows(NamedTuple):
    """Rows that enter the ring, all eligible."""

    raw: Float[Tensor, "row d_model"]
    """as stored"""
    document: Int64[Tensor, " row"]
    position: Int64[Tensor, " row"]
    source: Int64[Tensor, " row"]


class WindowLoader:
    """The train split's windows in a new order each epoch, ``batch_tokens`` tokens at a time.

    Parameters
    ----------
    store, hook, window, batch_tokens, seed, min_position, world
        see `WindowReader`, which also says what is refused
    device
        where the tensors go
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
        world: World = ALONE,
    ) -> None:
        self._device, self._window = device, window
        statistics = store.statistics(hook)
        self.scaler = Scaler.of(statistics)
        self._outlier_norm = statistics.outlier_norm
        # Used by the thread that reads ahead alone, but for its sizes.
        self._reader = WindowReader(
            store,
            hook,
            window=window,
            batch_tokens=batch_tokens,
            seed=seed,
            min_position=min_position,
            world=world,
        )
        self.windows_per_epoch = self._reader.windows_per_epoch
        self.windows_per_batch = self._reader.windows_per_batch
        self.n_documents = self._reader.n_documents
        """of the train split that have a window"""
        self.most_eligible = self._reader.most_eligible
        """positions from ``min_position`` on of the longest context"""
        self._ahead = ReadAhead()
        self._memory = Memory()
        self._place = Place(0, 0)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in an epoch's windows."""
        return self.windows_per_epoch * self._window

    @property
    def epoch(self) -> int:
        """Of the next batch, 0-based."""
        return self._place.epoch

    @property
    def cursor(self) -> int:
        """Windows of the epoch before the next batch."""
        return self._place.cursor

    def next(self) -> Rows:
        """The next batch, or this process's slice of it: windows one after the other, so [W, window] once reshaped.

        Its tensors are overwritten by the next call. The batch after it begins to be read.
        """
        read, after = self._ahead.take(self._reader.batch, self._place)
        if after.epoch > self._place.epoch:
            log.info("epoch %d begins, in a new order", after.epoch + 1)
        self._place = after
        self._ahead.begin(self._reader.batch, after)
        return self._rows(read, self._memory)

    def begin_ring_rows(self, step: int, n: int) -> None:
        """Let what `ring_rows` will be asked for begin to be read."""
        self._ahead.begin(self._reader.pieces, step, n)

    def ring_rows(self, step: int, n: int) -> RingRows:
        """``n`` tokens from ``min_position`` on for the ring after ``step`` (see `WindowReader.pieces`).

        Fewer come back where more than a third of what was read are outliers or special tokens.
        """
        read = self._ahead.take(self._reader.pieces, step, n)
        raw = read.raw.to(self._device)
        eligible = torch.from_numpy(np.flatnonzero(read.allowed & self._valid(raw).cpu().numpy())[:n])
        where = eligible.to(self._device)
        document, position, source = (
            torch.from_numpy(values)[eligible].to(self._device)
            for values in (read.document, read.position, read.source)
        )
        return RingRows(raw[where], document, position, source)

    def sample(self, n: int) -> Rows:
        """About ``n`` random tokens of the train split, the same at every call (see `WindowReader.sample`)."""
        return self._rows(self._ahead.take(self._reader.sample, n), Memory())

    def close(self) -> None:
        """Wait until nothing is read any more; nothing can be read after."""
        self._ahead.close()

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins."""
        return {"version": 1, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what `state_dict` returned; raises `RunMismatch` for another version."""
        if state["version"] != 1:
            raise RunMismatch(
                f"loader state of version {state['version']}, this tcsae reads 1; upgrade tcsae"
            )
        self._place = Place(state["epoch"], state["cursor"])
        self._ahead.forget()

    def _valid(self, raw: Tensor) -> Tensor:
        valid: Tensor = torch.linalg.vector_norm(raw, dim=1, dtype=torch.float32) <= self._outlier_norm
        return valid

    def _rows(self, read: ReadRows, memory: Memory) -> Rows:
        raw = read.raw.to(self._device)
        x = memory((len(raw), raw.shape[1]), torch.float32, self._device).copy_(raw)
        valid = self._valid(x)  # norms of float16 take twice the time
        x = self.scaler.normalise(x, out=x)
        if not valid.all():
            raw[~valid] = 0
            x[~valid] = 0
        eligible = read.allowed & valid.cpu().numpy()
        return Rows(raw, x, valid, read.document, read.source, read.position, read.token, eligible)
