"""Every released format is read forever: one tiny store of each lies in tests/data."""

from __future__ import annotations

from pathlib import Path

import torch

from tcsae.store import ActivationStore
from tcsae.store.verify import verify

DATA = Path(__file__).parents[1] / "data"


def test_the_store_of_format_1_reads_as_it_was_written():
    store = ActivationStore.open(DATA / "v1" / "tiny.zarr")
    row, dimension = torch.arange(20)[:, None], torch.arange(4)[None]
    expected = ((7 * row + dimension) % 13 - 6).bfloat16()
    assert torch.equal(store.rows(0, 20, "blocks.0.hook_resid_post"), expected)
    assert torch.equal(store.rows(0, 20, "blocks.1.hook_resid_post"), -expected)
    assert store.tokens.tolist() == list(range(0, 60, 3))
    assert store.document_offsets.tolist() == [0, 5, 14, 20]
    assert store.context_offsets.tolist() == [0, 4, 5, 9, 13, 14, 18, 20]
    assert store.documents["topic"].to_pylist() == ["one", "two", "one"]
    assert store.provenance.bos_token_id == 0
    assert store.statistics("blocks.0.hook_resid_post").n_rows == 20


def test_the_store_of_format_1_verifies():
    assert verify(DATA / "v1" / "tiny.zarr").problems == ()
