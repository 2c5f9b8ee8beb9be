"""Writes tests/data/v1/tiny.zarr, the store of format 1 that every version must read. Run once for a release.

python -P tests/data/make_store_v1.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tcsae.store import Layout, Provenance, StoreWriter, split_of
from tcsae.store.layout import documents_table


def activations(n_rows: int, d_model: int) -> torch.Tensor:
    """Whole numbers from -6 to 6, exact in every dtype."""
    row, dimension = torch.arange(n_rows)[:, None], torch.arange(d_model)[None]
    return ((7 * row + dimension) % 13 - 6).float()


def main() -> None:
    """Three documents of 5, 9 and 6 rows in contexts of at most 4, two hooks, chunks of 8 rows."""
    lengths, ids = [5, 9, 6], ["a", "b", "f"]
    layout = Layout(
        np.arange(20, dtype=np.int32) * 3,
        np.array([0, 5, 14, 20]),
        np.array([0, 4, 5, 9, 13, 14, 18, 20]),
        documents_table(
            {
                "id": ids,
                "source": ["made"] * 3,
                "topic": ["one", "two", "one"],
                "split": [split_of(name) for name in ids],
                "n_tokens": lengths,
                "sha256": ["00" * 32] * 3,
            }
        ),
    )
    made = Provenance(
        model="made-by-hand",
        model_revision="",
        model_sha256="00" * 32,
        tokenizer_sha256="11" * 32,
        hooks=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
        d_model=4,
        context_length=5,
        bos_token_id=0,
        special_token_ids=(0,),
        vocab_size=100,
        dtype="bfloat16",
        precision="float32",
        rows_per_chunk=8,
        corpus="made-by-hand",
        corpus_sha256="22" * 32,
        max_tokens=None,
        versions={"tcsae": "0.1.0"},
        created="2026-11-22",
    )
    path = Path(__file__).parent / "v1" / "tiny.zarr"
    with StoreWriter.create(path, layout, made) as writer:
        for chunk in range(writer.n_chunks):
            start, stop = writer.rows_of(chunk)
            for sign, hook in zip((1, -1), made.hooks, strict=True):
                writer.write(hook, chunk, sign * activations(20, 4)[start:stop])
        writer.finish()


if __name__ == "__main__":
    main()
