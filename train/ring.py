"""The ring of negatives: raw activations of the last few steps, re-encoded whenever they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tcsae.store.errors import RunMismatch
from tcsae.train.losses import Codes

PIECE = 1024
"""items encoded at once: their codes and logits (4 MB each) stay in the cache between the products"""


class Ring:
    """The last ``size`` activations that were pushed, with document, position and source.

    Activations wait raw, in the store's dtype, because codes would drift while the encoder learns; every arm
    encodes them afresh, so keys are exact. A ring is shared by all arms.

    >>> ring = Ring(3, 1, torch.float32, torch.device("cpu"))
    >>> for value in (1.0, 2.0, 3.0, 4.0):
    ...     one = torch.tensor([int(value)])
    ...     ring.push(torch.tensor([[value]]), one, one, one)
    >>> ring.activations.flatten().tolist(), ring.filled
    ([4.0, 2.0, 3.0], 3)
    """

    def __init__(self, size: int, d_model: int, dtype: torch.dtype, device: torch.device) -> None:
        self.activations = torch.zeros(size, d_model, dtype=dtype, device=device)
        self.document = torch.zeros(size, dtype=torch.int64, device=device)
        self.position = torch.zeros(size, dtype=torch.int64, device=device)
        self.source = torch.zeros(size, dtype=torch.int64, device=device)
        self.next = 0
        self.filled = 0

    @property
    def size(self) -> int:
        """Slots."""
        return len(self.activations)

    def push(
        self,
        activations: Float[Tensor, "row d_model"],
        document: Int64[Tensor, " row"],
        position: Int64[Tensor, " row"],
        source: Int64[Tensor, " row"],
    ) -> None:
        """Write rows, at most ``size`` of them, over the oldest."""
        slots = (self.next + torch.arange(len(activations), device=document.device)) % self.size
        self.activations[slots] = activations
        self.document[slots] = document
        self.position[slots] = position
        self.source[slots] = source
        self.next = (self.next + len(activations)) % self.size
        self.filled = min(self.filled + len(activations), self.size)

    @torch.no_grad()
    def keys(self, encode: Callable[[Tensor], Tensor]) -> Iterator[Codes]:
        """Everything in the ring, ``encode``d a piece at a time, without gradient."""
        for start in range(0, self.filled, PIECE):
            here = slice(start, min(start + PIECE, self.filled))
            yield Codes(encode(self.activations[here]), self.document[here], self.source[here])

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return {
            "activations": self.activations,
            "document": self.document,
            "position": self.position,
            "source": self.source,
            "next_filled": torch.tensor([self.next, self.filled]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` returned; raises `RunMismatch` for another size or dtype."""
        given = state["activations"]
        if given.shape != self.activations.shape or given.dtype != self.activations.dtype:
            raise RunMismatch(
                f"ring of {tuple(given.shape)} {given.dtype}, this run has {tuple(self.activations.shape)} "
                f"{self.activations.dtype}"
            )
        for name in ("activations", "document", "position", "source"):
            getattr(self, name).copy_(state[name])
        self.next, self.filled = state["next_filled"].tolist()
