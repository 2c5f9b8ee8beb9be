"""Damage to a shared store is found at first touch and named; rows never come out as zeros."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.errors import StoreCorrupt, StoreError

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def path(make_store):
    return make_store(torch.randn(1000, 16, generator=torch.Generator().manual_seed(2)), [100] * 10).path


def chunk(store: Path, number: int) -> Path:
    return store / "activations" / HOOK / "c" / str(number) / "0"


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def swap(store: Path) -> None:
    first, second = chunk(store, 0).read_bytes(), chunk(store, 1).read_bytes()
    chunk(store, 0).write_bytes(second)
    chunk(store, 1).write_bytes(first)


def edit_root(store: Path, **changes: object) -> None:
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"].update(changes)
    (store / "zarr.json").write_text(json.dumps(root))


def link_out(store: Path) -> None:
    outside = store.parent / "elsewhere"
    shutil.move(chunk(store, 1), outside)
    chunk(store, 1).symlink_to(outside)


def rewrite_documents(store: Path) -> None:
    table = pq.read_table(store / "documents.parquet")
    pq.write_table(table.slice(1), store / "documents.parquet")


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
    pytest.param(rewrite_documents, r"expected 10 lines .* got 9", id="a document's line gone"),
    pytest.param(
        lambda s: (s / "documents.parquet").write_bytes(b"x"),
        r"documents.parquet: cannot be read",
        id="no Parquet",
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
