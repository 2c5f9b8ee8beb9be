"""Reading windows of the train split in a seeded order, and random pieces of it for the ring.

Nothing here has a hidden state: what is read at a place or after a step is a function of the seed and of that place
or step, so it can be read again after a stop, and ahead.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError
from tcsae.store.spec import TORCH_DTYPES
from tcsae.train.world import World

Int64Array = npt.NDArray[np.int64]
CPU = torch.device("cpu")

ORDER, RING, PAIRS = range(3)
SAMPLE, RESAMPLE = 10, 11
"""purposes of random numbers; each has its own stream (see `random_stream`)"""


def random_stream(seed: int, purpose: int, index: int) -> np.random.Generator:
    """The generator for ``purpose`` at epoch or step ``index``: a function of its arguments alone."""
    return np.random.default_rng([seed, purpose, index])


class Place(NamedTuple):
    """Where a batch begins."""

    epoch: int
    cursor: int
    """windows of the epoch before it"""


class ReadRows(NamedTuple):
    """Rows of the store as far as they are known without looking at the activations."""

    raw: Float[Tensor, "token d_model"]
    """as stored, on the CPU"""
    document: Int64Array
    """[token] index of the document"""
    source: Int64Array
    """[token] number of the document's source"""
    position: Int64Array
    """[token] in its context"""
    token: npt.NDArray[np.int32]
    """[token] token id"""
    allowed: npt.NDArray[np.bool_]
    """[token] may be anchor, positive or negative unless it is an outlier: no special token, not too early"""


class Memory:
    """A matrix that is used again: a fresh one costs a page fault for every 4 kB, more than filling it."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def __call__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """The matrix, with whatever it held before."""
        if self._flat.numel() < math.prod(shape):
            self._flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
        return self._flat[: math.prod(shape)].view(shape)


class WindowReader:
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
        earlier positions of a context are not allowed
    world
        the processes that each read an equal slice of a batch

    Raises
    ------
    ConfigError
        no context of the train split holds a window, all together hold less than a batch, or a batch has
        windows that cannot be shared out among the processes
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
        world: World,
    ) -> None:
        self._store, self._hook = store, hook
        self._window, self._seed, self._min_position = window, seed, min_position
        self._world = world
        self._special = np.array(store.provenance.special_token_ids, dtype=np.int64)
        _, source = np.unique(store.documents["source"].to_numpy(zero_copy_only=False), return_inverse=True)
        self._source: Int64Array = source.astype(np.int64)
        contexts = store.contexts_in("train")
        lengths = np.diff(store.context_offsets)[contexts]
        fits = lengths >= window
        self._contexts, self._lengths = contexts[fits], lengths[fits]
        self._windows_until: Int64Array = np.cumsum(self._lengths // window)
        self.windows_per_epoch = int(self._windows_until[-1]) if len(fits) and fits.any() else 0
        self.windows_per_batch = batch_tokens // window
        self.n_tokens = int(lengths.sum())
        self.n_documents = len(np.unique(store.document_of_context[self._contexts]))
        """of the train split that have a window"""
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
                f"window: {window} tokens, but the longest context of {store.url}'s train split has "
                f"{longest}; choose a smaller window or harvest with a larger --context-length"
            )
        if self.windows_per_epoch < self.windows_per_batch:
            raise ConfigError(
                f"batch_tokens: {batch_tokens} tokens are {self.windows_per_batch} windows of {window}, but "
                f"{store.url}'s train split has {self.windows_per_epoch} ({self.n_tokens} tokens); lower "
                "batch_tokens or harvest more"
            )
        if self.windows_per_batch % world.size:
            raise ConfigError(
                f"batch_tokens: {batch_tokens} tokens are {self.windows_per_batch} windows of {window}, which "
                f"{world.size} processes cannot share out equally; expected a multiple of "
                f"{world.size * window} tokens"
            )
        self._dtype = TORCH_DTYPES[store.provenance.dtype]
        # A batch is read into one while the one before it is used.
        self._batch_memory = [Memory(), Memory()]
        self._piece_memory = Memory()
        self._loaded_epoch = -1

    def batch(self, place: Place) -> tuple[ReadRows, Place]:
        """The batch at a place, or this process's slice of it, and the place after it.

        Its activations are overwritten by the call after the next.
        """
        epoch, cursor = place
        self._load_epoch(epoch)
        picked = self._order[cursor : cursor + self.windows_per_batch]
        starts, contexts = self._windows(picked)
        cursor += self.windows_per_batch
        if cursor >= self.windows_per_epoch:
            epoch, cursor = epoch + 1, cursor - self.windows_per_epoch
            self._load_epoch(epoch)
            more = self._windows(self._order[: self.windows_per_batch - len(picked)])
            starts, contexts = np.concatenate([starts, more[0]]), np.concatenate([contexts, more[1]])
        mine = self._world.slice(self.windows_per_batch)
        self._batch_memory.reverse()
        return self._read(starts[mine], contexts[mine], self._batch_memory[0]), Place(epoch, cursor)

    def pieces(self, step: int, n: int) -> ReadRows:
        """About 1.5 ``n`` tokens from ``min_position`` on for the ring after ``step``, in random pieces.

        A piece is as long as a window and contiguous. Contexts of a window or more are drawn so that each
        gives tokens in proportion to its positions from ``min_position`` on; within a context those near its
        ends are in fewer pieces. The surplus makes up for outliers and special tokens. For stores with
        `most_eligible` > 0. Its activations are overwritten by the next call.
        """
        stream = random_stream(self._seed, RING, step)
        n_pieces = math.ceil(1.5 * n / self._eligible_per_piece)
        drawn = stream.integers(self._piece_bounds[-1], size=n_pieces)
        which = np.searchsorted(self._piece_bounds, drawn, side="right")
        last = self._lengths[which] - self._window
        first = np.minimum(self._min_position, last)
        starts = self._store.context_offsets[self._contexts[which]] + stream.integers(first, last + 1)
        return self._read(starts, self._contexts[which], self._piece_memory)

    def sample(self, n: int) -> ReadRows:
        """About ``n`` random tokens of the train split in windows, the same at every call.

        Contexts are drawn in proportion to their length; tokens near their ends are in fewer windows.
        """
        stream = random_stream(self._seed, SAMPLE, 0)
        share = self._lengths / self._lengths.sum()
        which = stream.choice(len(share), size=math.ceil(n / self._window), p=share)
        phase = stream.integers(self._lengths[which] - self._window + 1)
        contexts = self._contexts[which]
        return self._read(self._store.context_offsets[contexts] + phase, contexts, Memory())

    def _load_epoch(self, epoch: int) -> None:
        """The order of ``epoch``, 4 bytes a window, and each context's phase: windows follow from them."""
        if epoch == self._loaded_epoch:
            return
        stream = random_stream(self._seed, ORDER, epoch)
        # A phase of 0 .. L mod window leaves room for all L // window windows.
        self._phases = stream.integers(self._lengths % self._window + 1)
        self._order = stream.permutation(np.arange(self.windows_per_epoch, dtype=np.uint32))
        self._loaded_epoch = epoch

    def _windows(self, numbers: npt.NDArray[np.uint32]) -> tuple[Int64Array, Int64Array]:
        """First rows and contexts of windows, numbered from the first context's first on."""
        which = np.searchsorted(self._windows_until, numbers, side="right")
        within = numbers - (self._windows_until[which] - self._lengths[which] // self._window)
        contexts = self._contexts[which]
        starts = self._store.context_offsets[contexts] + self._phases[which] + within * self._window
        return starts, contexts

    def _read(self, starts: Int64Array, contexts: Int64Array, memory: Memory) -> ReadRows:
        rows = (starts[:, None] + np.arange(self._window)).ravel()
        raw = self._store.gather(rows, self._hook, memory((len(rows), self._store.d_model), self._dtype))
        per_token = np.repeat(contexts, self._window)
        document = self._store.document_of_context[per_token]
        position = rows - self._store.context_offsets[per_token]
        token = self._store.tokens_at(rows)
        allowed = position >= self._min_position
        for special in self._special:  # a handful: `np.isin` sorts
            allowed &= token != special
        return ReadRows(raw, document, self._source[document], position, token, allowed)
