"""The bytes on disk: any Zarr reader opens a store and finds what format 1 promises."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from tcsae.tests.store.damage import chunk, edit_root, flip, swap


@pytest.fixture
def opened(make_store):
    """Plain zarr group, our store and the activations in it: 40 documents, three chunks and a bit."""
    torch.manual_seed(0)
    rows = torch.randn(1000, 16)
    store = make_store(
        rows, [10, 40, 25, 25] * 10, hooks=("blocks.0.hook_resid_post", "blocks.1.attn.hook_out")
    )
    with warnings.catch_warnings():
        # documents.parquet lies in the group by design; zarr says that it is not one of its own
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        group = zarr.open_group(str(store.path), mode="r")
        assert sorted(group.array_keys()) == ["context_offsets", "document_offsets", "tokens"]
    return group, store, rows


def test_plain_zarr_reads_every_array(opened):
    group, store, rows = opened
    for hook in store.hooks:
        array = group["activations"][hook]
        assert array.shape == (1000, 16)
        assert array.chunks == (300, 16)
        np.testing.assert_array_equal(array[:], rows.half().numpy())
    assert group["tokens"].dtype == np.int32
    assert group["document_offsets"].dtype == np.int64
    np.testing.assert_array_equal(group["document_offsets"][:6], [0, 10, 50, 75, 100, 110])
    # contexts of 25 rows: the document of 40 rows is cut into 25 and 15
    np.testing.assert_array_equal(group["context_offsets"][:6], [0, 10, 35, 50, 75, 100])


def test_attributes_say_who_made_the_store(opened):
    attributes = dict(opened[0].attrs)
    assert attributes["format"] == "tcsae-activations"
    assert attributes["format_version"] == 1
    assert attributes["complete"] is True
    assert attributes["bos_token_id"] == 0
    assert attributes["hooks"] == ["blocks.0.hook_resid_post", "blocks.1.attn.hook_out"]
    assert set(attributes["statistics"]) == set(attributes["hooks"])


def test_a_chunk_file_is_its_rows_and_a_crc(opened):
    _, store, rows = opened
    content = (store.path / "activations" / store.hooks[0] / "c" / "1" / "0").read_bytes()
    body, checksum = content[:-4], content[-4:]
    assert body == rows[300:600].half().numpy().astype("<f2").tobytes()
    assert int.from_bytes(checksum, "little") == google_crc32c.value(body)


def test_the_last_chunk_is_padded_with_zeros(opened):
    _, store, rows = opened
    content = (store.path / "activations" / store.hooks[0] / "c" / "3" / "0").read_bytes()
    values = np.frombuffer(content[:-4], dtype="<f2").reshape(300, 16)
    np.testing.assert_array_equal(values[:100], rows[900:].half().numpy())
    assert not values[100:].any()


def test_checksums_are_kept_per_chunk(opened):
    group, store, _ = opened
    recorded = group["checksums"][store.hooks[0]][:]
    folder = store.path / "activations" / store.hooks[0] / "c"
    assert recorded.tolist() == [
        int.from_bytes((folder / str(chunk) / "0").read_bytes()[-4:], "little") for chunk in range(4)
    ]


def test_documents_table_has_one_line_a_document(opened):
    _, store, _ = opened
    table = pq.read_table(store.path / "documents.parquet")
    assert table.column_names == ["id", "source", "topic", "split", "n_tokens", "sha256"]
    assert table["n_tokens"].to_pylist() == np.diff(store.document_offsets).tolist()


def test_bfloat16_is_stored_as_its_bits_and_says_so(make_store):
    rows = torch.tensor([[1.0, -2.5, 3.14159, 1e30]] * 4)
    store = make_store(rows, [4], dtype="bfloat16")
    array = zarr.open_array(str(store.path / "activations" / store.hooks[0]), mode="r")
    assert array.dtype == np.uint16
    assert array.attrs["stored_as"] == "bfloat16"
    # the upper half of a float32's bits: 1.0 is 0x3F800000
    assert array[0, 0] == 0x3F80
    assert torch.equal(store.rows(0, 4), rows.bfloat16())


def test_nothing_in_a_store_is_a_pickle_or_a_leftover(opened):
    files = [p.relative_to(opened[1].path) for p in opened[1].path.rglob("*") if p.is_file()]
    names = {p.name for p in files}
    assert names == {"zarr.json", "0", "documents.parquet"}, files
    for path in opened[1].path.rglob("zarr.json"):
        json.loads(Path(path).read_text())


PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text("utf-8")


@pytest.fixture
def documented():
    """The function that docs/format.md shows."""
    code = PAGE.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 30
    imported = {line.split()[1] for line in code.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"pathlib", "numpy", "zarr"}
    names: dict[str, object] = {}
    exec(compile(code, "docs/format.md", "exec"), names)

    def read(*arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
            return names["read_document"](*arguments)

    return read


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_reader_in_the_documentation_reads_a_store(documented, make_store, dtype):
    rows = torch.randn(700, 8, generator=torch.Generator().manual_seed(1))
    store = make_store(rows, [30, 670], dtype=dtype, hooks=("a", "b"))  # the second document has three chunks
    tokens, activations = documented(str(store.path), 1, "b")
    np.testing.assert_array_equal(tokens, np.arange(30, 700))
    np.testing.assert_array_equal(activations, store.document(1, "b").float().numpy())


def test_the_reader_in_the_documentation_finds_swapped_and_damaged_chunks(documented, make_store):
    path = make_store(torch.randn(1000, 16), [100] * 10).path
    swap(path)
    with pytest.raises(ValueError, match="c/0/0: another chunk's file"):
        documented(str(path), 0)
    documented(str(path), 9)
    flip(chunk(path, 3), 7)
    with pytest.raises(ValueError, match="[Cc]hecksum"):
        documented(str(path), 9)
    edit_root(path, complete=False)
    with pytest.raises(ValueError, match="not a finished store"):
        documented(str(path), 9)


def test_the_listing_in_the_documentation_names_a_stores_files(make_store):
    listing = PAGE.split("```console\n")[1].split("```")[0].splitlines()[1:]
    hook = "blocks.9.hook_resid_post"
    store = make_store(torch.randn(25 * 300, 16), [100] * 75, hooks=(hook,))
    found = {str(p.relative_to(store.path)) for p in store.path.rglob("*") if p.is_file()}
    between = {f"activations/{hook}/c/{number}/0" for number in range(2, 24)}  # the line of three full stops
    shown = {line.split()[1].removeprefix("store.zarr/") for line in listing if line != "..."}
    assert listing.count("...") == 1
    assert shown | between == found


def test_every_attribute_is_shown_and_specified(opened):
    shown = {line.split()[0] for line in PAGE.split("```pycon\n")[1].split("```")[0].splitlines()}
    specified = PAGE.split("### Attributes of the group")[1].split("`statistics/<hook>`")[0]
    for name in opened[0].attrs:
        assert name in shown
        assert f"`{name}`" in specified
