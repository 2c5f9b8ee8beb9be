"""Fixtures that every package's tests share: small stores of known activations."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tcsae.store import ActivationStore, Layout, Provenance, StoreWriter, split_of
from tcsae.store.layout import documents_table

StoreFactory = Callable[..., ActivationStore]

# A runner in the background hands down an ignored SIGINT, and with it to every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def provenance(**changes: Any) -> Provenance:
    """A provenance for stores that no model made; keyword arguments change single fields."""
    values: dict[str, Any] = {
        "model": "made-by-hand",
        "model_revision": "",
        "model_sha256": "0" * 64,
        "tokenizer_sha256": "1" * 64,
        "hooks": ("blocks.0.hook_resid_post",),
        "d_model": 16,
        "context_length": 26,
        "bos_token_id": 0,
        "special_token_ids": (0,),
        "vocab_size": 100_000,
        "dtype": "float16",
        "precision": "float32",
        "rows_per_chunk": 300,
        "corpus": "made-by-hand",
        "corpus_sha256": "2" * 64,
        "max_tokens": None,
        "versions": {},
        "created": "2026-01-01",
    }
    return Provenance(**(values | changes))


def layout(document_lengths: list[int], context_rows: int, tokens: npt.NDArray[Any] | None = None) -> Layout:
    """Documents of the given lengths, each cut into contexts of ``context_rows`` rows; topics alternate."""
    ids = [f"document-{i}" for i in range(len(document_lengths))]
    document_offsets = np.cumsum([0, *document_lengths])
    starts = [
        start
        for first, stop in itertools.pairwise(document_offsets)
        for start in range(int(first), int(stop), context_rows)
    ]
    n = int(document_offsets[-1])
    return Layout(
        np.arange(n, dtype=np.int32) if tokens is None else tokens.astype(np.int32),
        document_offsets.astype(np.int64),
        np.array([*starts, n], dtype=np.int64),
        documents_table(
            {
                "id": list(ids),
                "source": ["by hand"] * len(ids),
                "topic": ["even" if i % 2 == 0 else "odd" for i in range(len(ids))],
                "split": [split_of(i) for i in ids],
                "n_tokens": list(document_lengths),
                "sha256": [""] * len(ids),
            }
        ),
    )


@pytest.fixture
def make_store(tmp_path: Path) -> StoreFactory:
    """A function that writes a finished store of given activations and opens it."""

    def make(
        activations: torch.Tensor,
        document_lengths: list[int],
        *,
        context_rows: int = 25,
        tokens: npt.NDArray[Any] | None = None,
        name: str = "store.zarr",
        **changes: Any,
    ) -> ActivationStore:
        made = provenance(d_model=activations.shape[1], context_length=context_rows + 1, **changes)
        path = tmp_path / name
        with StoreWriter.create(path, layout(document_lengths, context_rows, tokens), made) as writer:
            for chunk in range(writer.n_chunks):
                start, stop = writer.rows_of(chunk)
                for hook in made.hooks:
                    writer.write(hook, chunk, activations[start:stop])
            writer.finish()
        return ActivationStore.open(path)

    return make


@pytest.fixture
def make_provenance() -> Callable[..., Provenance]:
    """The function `provenance` above, for tests that write a store themselves."""
    return provenance


@pytest.fixture
def make_layout() -> Callable[..., Layout]:
    """The function `layout` above, for tests that write a store themselves."""
    return layout
