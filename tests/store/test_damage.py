"""Damage to a shared store is found at first touch and named; rows never come out as zeros."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.errors import StoreCorrupt, StoreError
from tcsae.tests.store.damage import chunk, edit_documents, edit_root, flip, swap


@pytest.fixture
def path(make_store):
    return make_store(torch.randn(1000, 16, generator=torch.Generator().manual_seed(2)), [100] * 10).path


def link_out(store: Path) -> None:
    outside = store.parent / "elsewhere"
    shutil.move(chunk(store, 1), outside)
    chunk(store, 1).symlink_to(outside)


def rewrite_documents(store: Path) -> None:
    table = pq.read_table(store / "documents.parquet")
    pq.write_table(table.slice(1), store / "documents.parquet")
    edit_root(store, table_sha256=None)  # as in a store from before it was kept


def write_no_parquet(store: Path) -> None:
    (store / "documents.parquet").write_bytes(b"x")
    edit_root(store, table_sha256=None)


DAMAGE = [
    pytest.param(lambda s: flip(chunk(s, 1), 5), r"c/1/0: CRC-32C .* stored", id="a flipped bit in a chunk"),
    pytest.param(lambda s: flip(chunk(s, 1), -1), r"c/1/0: CRC-32C", id="a flipped bit in the checksum"),
    pytest.param(lambda s: chunk(s, 2).unlink(), r"c/2/0: chunk is missing", id="a missing chunk"),
    pytest.param(lambda s: chunk(s, 2).write_bytes(b""), r"expected 9604 bytes, got 0", id="an empty chunk"),
    pytest.param(
        lambda s: chunk(s, 3).write_bytes(chunk(s, 3).read_bytes()[:100]),
        r"expected 9604 bytes, got 100",
        id="cut off",
    ),
    pytest.param(swap, r"c/0/0: CRC-32C .* another chunk's file", id="two chunks swapped"),
    pytest.param(link_out, r"c/1/0: is a link", id="a link out of the store"),
    pytest.param(
        lambda s: flip(s / "tokens" / "c" / "0", 9), r"tokens/c/0: CRC-32C", id="a flipped bit in the tokens"
    ),
    pytest.param(
        lambda s: flip(s / "document_offsets" / "c" / "0", 9),
        r"document_offsets/c/0: CRC",
        id="a flipped offset",
    ),
    pytest.param(
        lambda s: edit_documents(s, "topic", ["even"] * 10),
        r"documents.parquet: SHA-256 \w{12}… expected",
        id="another topic",
    ),
    pytest.param(
        lambda s: flip(s / "documents.parquet", 100), r"documents.parquet: SHA-256", id="a flipped bit in it"
    ),
    pytest.param(rewrite_documents, r"expected 10 lines .* got 9", id="a document's line gone, no SHA-256"),
    pytest.param(write_no_parquet, r"documents.parquet: cannot be read", id="no Parquet, no SHA-256"),
    pytest.param(
        lambda s: edit_root(s, table_sha256=["x"]), r"expected SHA-256 by file name", id="digests of no file"
    ),
    pytest.param(
        lambda s: edit_root(s, format_version=2), r"format 2, this tcsae reads 1", id="a newer format"
    ),
    pytest.param(
        lambda s: edit_root(s, format="other"), r"expected 'tcsae-activations'", id="another format"
    ),
    pytest.param(
        lambda s: edit_root(s, d_model=8), r"does not fit the group's attributes", id="a wrong attribute"
    ),
    pytest.param(
        lambda s: edit_root(s, hooks=["../../x"]), r"cannot name an array", id="a path in a hook's name"
    ),
    pytest.param(lambda s: (s / "zarr.json").write_text("{"), r"not a Zarr v3 group", id="broken JSON"),
    pytest.param(
        lambda s: (s / "zarr.json").write_bytes(b" " * (64 * 2**20 + 1)),
        r"a store's header is below",
        id="a huge header",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(path, damage, message):
    damage(path)
    with pytest.raises(StoreError, match=message) as caught:
        ActivationStore.open(path).rows(0, 1000)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_chunks_that_are_whole_still_read(path):
    flip(chunk(path, 1), 5)
    store = ActivationStore.open(path)
    assert store.rows(0, 300).abs().sum() > 0
    with pytest.raises(StoreCorrupt, match="c/1/0"):
        store.rows(299, 301)
