"""What no writer writes is named in one line: values of other types, columns of other types, links."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.card import write_card
from tcsae.store.errors import StoreCorrupt
from tcsae.store.verify import verify
from tcsae.tests.store.damage import HOOK, edit_root


@pytest.fixture
def path(make_store):
    return make_store(torch.randn(1000, 16, generator=torch.Generator().manual_seed(2)), [100] * 10).path


def edit_statistics(store: Path, **changes: object) -> None:
    found = json.loads((store / "zarr.json").read_text())["attributes"]["statistics"]
    edit_root(store, statistics={HOOK: found[HOOK] | changes})


def set_null(store: Path, attribute: str) -> None:
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"][attribute] = None
    (store / "zarr.json").write_text(json.dumps(root))


def set_shape(store: Path, shape: list) -> None:
    header = store / "tokens" / "zarr.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"shape": shape}))


def set_column(store: Path, name: str, values: list, kind: pa.DataType) -> None:
    """Replace a column of the documents' table and its type, as in a store from before its SHA-256 was kept."""
    table = pq.read_table(store / "documents.parquet")
    table = table.set_column(table.column_names.index(name), name, pa.array(values, kind))
    pq.write_table(table, store / "documents.parquet")
    edit_root(store, table_sha256=None)


def spoil_text(store: Path) -> None:
    """Let an id be no UTF-8, which Parquet itself does not notice."""
    table = pq.read_table(store / "documents.parquet")
    ids = pa.array([b"document-\xff"] * 10, pa.binary()).view(pa.string())
    pq.write_table(table.set_column(0, "id", ids), store / "documents.parquet", use_dictionary=False)
    edit_root(store, table_sha256=None)


MALFORMED = [
    pytest.param(
        lambda s: edit_statistics(s, mean=[0.0] * 15), "mean: expected a list of 16 finite", id="a short mean"
    ),
    pytest.param(
        lambda s: edit_statistics(s, mean=[float("nan")] * 16), "mean: expected a list of 16", id="a NaN mean"
    ),
    pytest.param(
        lambda s: edit_statistics(s, mean_square_norm="1"), "mean_square_norm: expected a fin", id="a text"
    ),
    pytest.param(
        lambda s: edit_statistics(s, n_rows=10**400), "n_rows: expected a count", id="a number beyond float64"
    ),
    pytest.param(
        lambda s: edit_statistics(s, norm_quantiles=[1.0]), "norm_quantiles: expected finite", id="a list"
    ),
    pytest.param(
        lambda s: edit_statistics(s, norm_quantiles={"0.5": 1.0}), "for 0.0, 0.01, 0.05,", id="one quantile"
    ),
    pytest.param(lambda s: edit_root(s, statistics=[]), f"statistics of {HOOK}: missing", id="no object"),
    pytest.param(lambda s: edit_root(s, statistics={}), f"statistics of {HOOK}: missing", id="no hook"),
    pytest.param(
        lambda s: edit_root(s, statistics={HOOK: []}), f"{HOOK}: expected dict, got list", id="a list for it"
    ),
    pytest.param(lambda s: set_null(s, "hooks"), "hooks: expected list, got NoneType", id="hooks null"),
    pytest.param(
        lambda s: edit_root(s, hooks=[1]), "hooks: expected str for each, got int", id="a hook of 1"
    ),
    pytest.param(
        lambda s: set_null(s, "codec_configuration"), "codec_configuration: expected dict", id="nothing"
    ),
    pytest.param(
        lambda s: edit_root(s, codec="zip"), "zarr.json: codec of blocks.0", id="a codec that nobody knows"
    ),
    pytest.param(
        lambda s: edit_root(s, codec_effect={HOOK: {"ratio": "2"}}), "expected finite numbers", id="an effect"
    ),
    pytest.param(
        lambda s: edit_root(s, d_model=True), "d_model: expected int, got bool", id="true as number"
    ),
    pytest.param(lambda s: set_shape(s, ["x"]), "shape: expected a length, got 'x'", id="a length of x"),
    pytest.param(lambda s: set_shape(s, [-4]), "shape: expected a length, got -4", id="a negative length"),
    pytest.param(
        lambda s: set_column(s, "id", [None, *"123456789"], pa.string()),
        "id: expected a value in every line",
        id="an id null",
    ),
    pytest.param(
        lambda s: set_column(s, "id", list(range(10)), pa.int64()),
        "id: expected string, got int64",
        id="ids of int",
    ),
    pytest.param(
        lambda s: set_column(s, "n_tokens", ["100"] * 10, pa.string()),
        "n_tokens: expected int64, got string",
        id="n_tokens as text",
    ),
    pytest.param(spoil_text, "documents.parquet: cannot be read (Column 0", id="text that is no UTF-8"),
]


@pytest.mark.parametrize(("damage", "message"), MALFORMED)
def test_what_no_writer_writes_is_named_by_who_opens_and_by_who_verifies(path, damage, message):
    damage(path)
    with pytest.raises(StoreCorrupt) as caught:
        ActivationStore.open(path)
    for said in (str(caught.value), *verify(path).problems):
        assert str(path) in said
        assert "\n" not in said
    assert message in str(caught.value)
    assert any(message in problem for problem in verify(path).problems)


def test_a_document_may_have_no_topic(path):
    set_column(path, "topic", ["law", None] * 5, pa.string())
    assert verify(path).problems == ()
    card = write_card(path)
    assert "| law | 5 |" in card
    assert "| - | 5 |" in card


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "tokens/zarr.json",
        "tokens/c",
        "documents.parquet",
        f"activations/{HOOK}/zarr.json",
        f"activations/{HOOK}/c/1/0",
        f"activations/{HOOK}/c/1",
        f"checksums/{HOOK}/c/0",
    ],
)
def test_a_link_to_the_same_content_is_refused_and_found(path, name):
    outside = path.parent / "outside"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    found = verify(path).problems
    assert len(found) in (1, 2)  # a folder's link is named, and so may be the file behind it
    assert all(str(path / name) in problem and "is a link out of its place" in problem for problem in found)
    with pytest.raises(StoreCorrupt, match="is a link out of its place"):
        ActivationStore.open(path).rows(0, 1000)


def test_a_link_beside_the_stores_own_files_is_found(path):
    (path / "notes").symlink_to("/etc")
    assert verify(path).problems == (
        f"{path / 'notes'}: is a link out of its place; a store has plain files only",
    )
