"""Small stores that were made from a known dictionary, and SAEs that know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tcsae.harvest import HarvestConfig, harvest
from tcsae.store import ActivationStore
from tcsae.store.truth import Truth
from tcsae.train.sae.inference import SAE


def known_store(folder: Path, *, documents: int, length: int, context_length: int) -> ActivationStore:
    """Forty features in 64 dimensions, so that a threshold tells them apart."""
    corpus = f"synthetic:features=40,d_model=64,documents={documents},length={length},topics=3,rate=0.04:0.1"
    path = folder / "s.zarr"
    harvest(HarvestConfig(store=path, corpus=corpus, context_length=context_length, rows_per_chunk=1000))
    return ActivationStore.open(path)


def sae_of(
    directions: np.ndarray, mean: np.ndarray, order: np.ndarray, block_size: int, **changes: Any
) -> SAE:
    """Reads each of ``directions`` in ``order``, above a threshold."""
    W_dec = torch.from_numpy(np.ascontiguousarray(directions[order]))
    fields: dict[str, Any] = {
        "architecture": "jumprelu",
        "W_enc": W_dec.T.contiguous(),
        "b_enc": torch.zeros(len(order)),
        "W_dec": W_dec,
        "b_dec": torch.from_numpy(mean),
        "threshold": torch.full((len(order),), 0.4),
        "block_size": block_size,
    }
    return SAE(**(fields | changes))


def solving(truth: Truth, order: np.ndarray, block_size: int, **changes: Any) -> SAE:
    """Solves for the true values, of which there are fewer than dimensions, instead of reading along them."""
    W_enc = torch.from_numpy(np.linalg.pinv(truth.directions[order]))
    return sae_of(truth.directions, truth.mean, order, block_size, W_enc=W_enc, **changes)
