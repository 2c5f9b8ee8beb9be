"""A store as a PyTorch dataset of documents."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from tcsae.store.reader import ActivationStore


class Documents(Dataset[Tensor]):
    """Item i is the activations of document i, [row, d_model] in the stored dtype (see `ActivationStore.document`).

    Safe with ``DataLoader`` workers, forked or spawned: a worker opens the store itself and maps the same files, so
    the page cache holds them once. Documents differ in length: use ``batch_size=None`` or a ``collate_fn``.

    Parameters
    ----------
    store
        an open store
    hook
        may be left out when the store has one
    """

    def __init__(self, store: ActivationStore, hook: str | None = None) -> None:
        self.store = store
        self.hook = hook

    def __len__(self) -> int:
        return self.store.n_documents

    def __getitem__(self, index: int) -> Float[Tensor, "row d_model"]:
        return self.store.document(index, self.hook)
