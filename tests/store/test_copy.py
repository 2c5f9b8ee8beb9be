"""Copies: same bytes or a valid smaller store, resumed where they stopped, complete only when verified."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from tcsae.store import ActivationStore, StoreWriter
from tcsae.store.card import write_card
from tcsae.store.codecs import fit
from tcsae.store.copy import copy_store
from tcsae.store.errors import (
    ConfigError,
    DiskFull,
    Interrupted,
    StoreCorrupt,
    StoreExists,
    StoreIncomplete,
    StoreMismatch,
    StoreNotFound,
    UnknownName,
)
from tcsae.store.places import LocalEnd, write_file
from tcsae.store.recode import plan_recoding
from tcsae.store.space import store_bytes
from tcsae.store.verify import verify
from tcsae.tests.store.damage import edit_root, flip, swap

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(make_store):
    rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    return make_store(rows, [10, 40, 25, 25] * 10, hooks=HOOKS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_whole_copy_has_the_same_bytes_and_id(store, tmp_path):
    copied = copy_store(store.path, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(store.path)
    assert (copied.id, copied.rows, copied.documents, copied.kept) == (store.id, 1000, 40, 0)


def test_documents_hooks_and_rows_select(store, tmp_path):
    # documents of 10, 40, 25, 25 rows: 2:6 are rows 50 to 150; rows 60:120 lie in documents 2 to 5
    by_documents = copy_store(store.path, tmp_path / "a", documents=(2, 6), hooks=HOOKS[1:])
    copy_store(store.path, tmp_path / "b", rows=(60, 120), hooks=HOOKS[1:])
    part = ActivationStore.open(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (part.hooks, part.n_documents, by_documents.rows) == (HOOKS[1:], 4, 100)
    assert torch.equal(part.rows(0, 100), store.rows(50, 150, HOOKS[1]))
    assert part.tokens.tolist() == list(range(50, 150))
    assert part.document_offsets.tolist() == [0, 25, 50, 60, 100]
    assert part.documents["id"].to_pylist() == [f"document-{i}" for i in range(2, 6)]
    assert part.provenance.derived_from == {"id": store.id, "documents": [2, 6]}
    assert verify(part.path).problems == ()
    kept = np.isin(np.arange(40), np.arange(2, 6)) & (np.array(store.documents["split"]) == "train")
    train = np.repeat(kept, np.diff(store.document_offsets))
    expected = store.rows(0, 1000, HOOKS[1])[torch.from_numpy(train)].double().mean(dim=0)
    np.testing.assert_allclose(part.statistics().mean, expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        pytest.param(
            {"documents": (5, 5)}, ConfigError, "inside 0:40, not empty, got 5:5", id="no documents"
        ),
        pytest.param({"documents": (0, 41)}, ConfigError, "inside 0:40", id="more than there are"),
        pytest.param({"rows": (0, 1001)}, ConfigError, "inside 0:1000", id="more rows than there are"),
        pytest.param({"rows": (0, 1), "documents": (0, 1)}, ConfigError, "give one", id="both"),
        pytest.param(
            {"hooks": ("blocks.7.hook_resid_post",)}, UnknownName, "did you mean", id="another hook"
        ),
    ],
)
def test_what_cannot_be_selected_is_refused(store, tmp_path, selection, error, message):
    with pytest.raises(error, match=message):
        copy_store(store.path, tmp_path / "copy", **selection)
    assert not (tmp_path / "copy").exists()


def test_a_copy_that_was_stopped_goes_on_where_it_was(store, tmp_path, monkeypatch):
    written = []

    def stop_after_five(self, name, content):
        if name.startswith("activations") and "/c/" in name:
            if len(written) == 5:
                raise KeyboardInterrupt
            written.append(name)
        write(self, name, content)

    write = LocalEnd.write
    monkeypatch.setattr("tcsae.store.transfer.THREADS", 1)
    monkeypatch.setattr(LocalEnd, "write", stop_after_five)
    with pytest.raises(Interrupted, match=r"copy: interrupted; what is copied is kept, .* --resume"):
        copy_store(store.path, tmp_path / "copy")
    monkeypatch.undo()
    with pytest.raises(StoreIncomplete):
        ActivationStore.open(tmp_path / "copy")
    # of the five, one is damaged meanwhile
    damaged = tmp_path / "copy" / written[2]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert copy_store(store.path, tmp_path / "copy", resume=True).kept == 4
    assert contents(tmp_path / "copy") == contents(store.path)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [(lambda path: flip(path / "activations" / HOOKS[1] / "c" / "2" / "0", 99), 6), (swap, 4)],
    ids=["one of four chunks", "two"],
)
def test_a_finished_compressed_copy_is_checked_and_mended(store, tmp_path, damage, kept):
    copy_store(store.path, tmp_path / "copy", codec="uniform")
    good = contents(tmp_path / "copy")
    damage(tmp_path / "copy")
    assert contents(tmp_path / "copy") != good
    assert copy_store(store.path, tmp_path / "copy", codec="uniform", resume=True).kept == kept
    assert contents(tmp_path / "copy") == good


@pytest.mark.parametrize("dst", ["small", "memory://fits/small.zarr"], ids=["folder", "URL"])
def test_a_copy_that_is_resumed_keeps_the_fit_that_it_was_begun_with(store, tmp_path, monkeypatch, dst):
    def fit_a_bit_differently(name, sample, dtype):
        found = fit(name, sample, dtype)
        return {**found, "step": found["step"] * (1 + 1e-7)}

    def stop(self, pool=None):
        raise KeyboardInterrupt

    place = dst if "://" in dst else tmp_path / dst
    try:
        with monkeypatch.context() as stopping:
            stopping.setattr(StoreWriter, "finish", stop)
            with pytest.raises(Interrupted):
                copy_store(store.path, place, codec="uniform")
        monkeypatch.setattr("tcsae.store.recode.fit", fit_a_bit_differently)
        copied = copy_store(store.path, place, codec="uniform", resume=True)
        monkeypatch.undo()
        monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))
        uninterrupted = copy_store(store.path, tmp_path / "whole", codec="uniform")
        assert (copied.id, copied.ratio) == (uninterrupted.id, uninterrupted.ratio)
    finally:
        if "://" in dst and fsspec.filesystem("memory").exists("/fits"):
            fsspec.filesystem("memory").rm("/fits", recursive=True)


@pytest.mark.parametrize("then", ["raw", "lossless", "int8"])
def test_a_copy_of_a_lossy_copy_states_the_error_of_both(store, tmp_path, then):
    first = copy_store(store.path, tmp_path / "first", codec="uniform")
    copy_store(tmp_path / "first", tmp_path / "second", codec=then)
    second = ActivationStore.open(tmp_path / "second")
    for hook in HOOKS:
        rows, again = store.rows(0, 1000, hook).double(), second.rows(0, 1000, hook).double()
        error = ((again - rows).square().sum() / (rows - rows.mean(dim=0)).square().sum()).item()
        stated = second.provenance.measured("relative_error")[hook]
        assert stated == pytest.approx(error, rel=0.05)
        assert stated >= first.relative_error[hook] > 0
    assert "as harvested" not in write_card(second)
    assert "as harvested" in write_card(store)


def test_mending_needs_the_space_of_what_is_missing_only(store, tmp_path, monkeypatch):
    copied = copy_store(store.path, tmp_path / "copy", codec="int8")
    monkeypatch.setattr("tcsae.store.recode.free_bytes", lambda path: 0)
    copy_store(store.path, tmp_path / "copy", codec="int8", resume=True)
    (tmp_path / "copy" / "activations" / HOOKS[1] / "c" / "2" / "0").unlink()
    with pytest.raises(DiskFull, match="expected [0-9,]+ bytes free") as caught:
        copy_store(store.path, tmp_path / "copy", codec="int8", resume=True)
    needed = int(str(caught.value).split("expected ")[1].split(" ")[0].replace(",", ""))
    monkeypatch.setattr("tcsae.store.recode.free_bytes", lambda path: needed)
    assert copy_store(store.path, tmp_path / "copy", codec="int8", resume=True).id == copied.id
    # one of four chunks, and as much of the margin of 2^20 bytes for tables
    layout = plan_recoding(store, None, "raw").layout
    assert needed < store_bytes(store.provenance, layout) // 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"format": "other"}, StoreNotFound, "format: expected .*, got 'other'", id="another format"
        ),
        pytest.param({"format_version": 9}, StoreCorrupt, "format 9, this tcsae reads", id="a newer one"),
        pytest.param({"id": None}, StoreCorrupt, "attributes lack id", id="no id"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["folder", "URL"])
def test_a_source_of_another_format_is_refused_wherever_it_is(
    store, tmp_path, changes, error, message, elsewhere
):
    source = "memory://odd/store.zarr" if elsewhere else store.path
    edit_root(store.path, **changes)
    if elsewhere:
        memory = fsspec.filesystem("memory")
        memory.pipe_file("/odd/store.zarr/zarr.json", (store.path / "zarr.json").read_bytes())
    try:
        with pytest.raises(error, match=message) as caught:
            copy_store(source, tmp_path / "copy")
    finally:
        if elsewhere:
            memory.rm("/odd", recursive=True)
    assert str(source) in str(caught.value)
    assert not (tmp_path / "copy").exists()


def test_the_folders_of_a_copy_are_synced_before_it_is_complete(store, tmp_path, monkeypatch):
    steps, write = [], LocalEnd.write

    def note(self, name, content):
        steps.append(name)
        write(self, name, content)

    monkeypatch.setattr(LocalEnd, "write", note)
    monkeypatch.setattr("tcsae.store.places.sync_folders", lambda path: steps.append(path))
    copy_store(store.path, tmp_path / "copy")
    assert steps[-2:] == [tmp_path / "copy", "zarr.json"]


def test_a_damaged_source_is_named_and_nothing_is_complete(store, tmp_path):
    chunk = store.path / "activations" / HOOKS[0] / "c" / "1" / "0"
    chunk.write_bytes(b"x" + chunk.read_bytes()[1:])
    with pytest.raises(StoreCorrupt, match=r"c/1/0: CRC-32C"):
        copy_store(store.path, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "zarr.json").read_text())["attributes"]["complete"] is False


def test_what_lies_at_the_destination_is_safe(store, make_store, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(StoreExists, match="not a store"):
            copy_store(store.path, tmp_path / "thesis", resume=resume)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis" / "thesis.tex").rename(tmp_path / "thesis" / "thesis.partial")
    with pytest.raises(StoreExists, match="not a store"):
        copy_store(store.path, tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.partial"]
    other = make_store(torch.zeros(50, 16), [50], name="other.zarr")
    with pytest.raises(StoreExists, match="a finished store"):
        copy_store(store.path, other.path)
    with pytest.raises(StoreMismatch, match=f"begun as a copy of {other.id}"):
        copy_store(store.path, other.path, resume=True)
    with pytest.raises(ConfigError, match="is the source itself"):
        copy_store(store.path, f"{store.path}/")
    before = contents(store.path)
    with pytest.raises(ConfigError, match="or lies in it"):
        copy_store(store.path, store.path / "copies" / "one.zarr")
    with pytest.raises(ConfigError, match="or lies in it"):
        copy_store("memory://lab/store.zarr", "memory://lab/store.zarr/copy")
    assert contents(store.path) == before


def test_memory_urls_go_both_ways(store, tmp_path):
    try:
        copy_store(store.path, "memory://lab/store.zarr")
        copy_store("memory://lab/store.zarr", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(store.path)
        compressed = copy_store("memory://lab/store.zarr", "memory://lab/small.zarr", codec="int8")
        assert compressed.ratio.keys() == set(HOOKS)
        opened = ActivationStore.open("memory://lab/small.zarr")
        assert opened.url == "memory://lab/small.zarr"
        torch.testing.assert_close(
            opened.rows(0, 1000, HOOKS[0]), store.rows(0, 1000, HOOKS[0]), atol=0.03, rtol=0
        )
        assert not list((tmp_path / "cache" / "staging").iterdir())
    finally:
        fsspec.filesystem("memory").rm("/lab", recursive=True)


def test_a_file_at_a_url_needs_a_name():
    with pytest.raises(ConfigError, match="memory://lab/: expected a file's name"):
        write_file("memory://lab/", b"text")


def test_an_unknown_protocol_says_what_to_install(store):
    with pytest.raises(ConfigError, match="gopher"):
        copy_store(store.path, "gopher://old/store.zarr")


def test_a_whole_copy_that_does_not_fit_is_refused_with_the_numbers_but_for_what_is_there(
    store, tmp_path, monkeypatch
):
    copy_store(store.path, tmp_path / "copy")
    monkeypatch.setattr("tcsae.store.transfer.free_bytes", lambda path: 1000)
    whole = sum(len(c) for name, c in contents(store.path).items() if "/c/" in name and "activ" in name)
    with pytest.raises(DiskFull, match=f"other: expected {whole:,} bytes free .* got 1,000; free some space"):
        copy_store(store.path, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert copy_store(store.path, tmp_path / "copy", resume=True).kept > 0


@pytest.mark.parametrize("elsewhere", [False, True], ids=["folder", "URL"])
def test_a_copy_of_a_compressed_store_needs_the_bytes_of_its_chunks_and_not_one_more(
    store, tmp_path, monkeypatch, elsewhere
):
    small = tmp_path / "small.zarr"
    copy_store(store.path, small, codec="lossless")
    whole = sum(len(c) for name, c in contents(small).items() if "/c/" in name and "activ" in name)
    source = "memory://exact/small.zarr" if elsewhere else small
    try:
        if elsewhere:
            copy_store(small, source)
        monkeypatch.setattr("tcsae.store.transfer.free_bytes", lambda path: whole - 1)
        with pytest.raises(DiskFull, match=f"copy: expected {whole:,} bytes free .* got {whole - 1:,};"):
            copy_store(source, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        monkeypatch.setattr("tcsae.store.transfer.free_bytes", lambda path: whole)
        copy_store(source, tmp_path / "copy")
        assert contents(tmp_path / "copy") == contents(small)
    finally:
        if elsewhere:
            fsspec.filesystem("memory").rm("/exact", recursive=True)


def test_where_the_sizes_cannot_be_listed_a_compressed_store_is_expected_by_its_ratio_with_a_margin(
    store, tmp_path, monkeypatch
):
    def refused(self, path, **options):
        raise PermissionError("no listing")

    copy_store(store.path, tmp_path / "small.zarr", codec="int8")
    effect = ActivationStore.open(tmp_path / "small.zarr").provenance.codec_effect
    # of each hook four chunks of 300 rows of 16 dimensions in float16 and a checksum, and a twentieth more
    expected = sum(int(4 * (300 * 16 * 2 + 4) / effect[hook]["ratio"] * 1.05) for hook in HOOKS)
    try:
        copy_store(tmp_path / "small.zarr", "memory://unlisted/small.zarr")
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "find", refused)
        monkeypatch.setattr("tcsae.store.transfer.free_bytes", lambda path: expected - 1)
        with pytest.raises(DiskFull, match=f"expected {expected:,} bytes free"):
            copy_store("memory://unlisted/small.zarr", tmp_path / "copy")
        monkeypatch.setattr("tcsae.store.transfer.free_bytes", lambda path: expected)
        copy_store("memory://unlisted/small.zarr", tmp_path / "copy")
    finally:
        monkeypatch.undo()
        fsspec.filesystem("memory").rm("/unlisted", recursive=True)


def test_a_recoded_copy_that_does_not_fit_is_refused_with_the_numbers(store, tmp_path, monkeypatch):
    # three chunks of 300 rows of 16 dimensions in float16 and a checksum for each of two hooks, and the tables
    chunks = 2 * 3 * (300 * 16 * 2 + 4)
    monkeypatch.setattr("tcsae.store.recode.free_bytes", lambda path: chunks)
    staging = str(tmp_path / "cache" / "staging")
    with pytest.raises(
        DiskFull, match=r"expected [\d,]+ bytes free for 850 rows of 2 hooks as raw"
    ) as caught:
        copy_store(store.path, "memory://lab/part.zarr", rows=(50, 900))
    assert staging in str(caught.value)
    assert f"got {chunks:,}; free some space or set TCSAE_CACHE" in str(caught.value)
    with pytest.raises(DiskFull, match="got [0-9,]+; free some space, or copy fewer") as caught:
        copy_store(store.path, tmp_path / "part.zarr", rows=(50, 900))
    needed = int(str(caught.value).split("expected ")[1].split(" ")[0].replace(",", ""))
    assert not (tmp_path / "part.zarr").exists()
    monkeypatch.setattr("tcsae.store.recode.free_bytes", lambda path: needed)
    copied = copy_store(store.path, tmp_path / "part.zarr", rows=(50, 900))
    assert copied.bytes <= needed


def test_a_compressed_copy_needs_as_much_as_it_measured(store):
    raw, small = (plan_recoding(store, None, codec) for codec in ("raw", "int8"))
    ratio = min(small.made.codec_effect[hook]["ratio"] for hook in HOOKS)
    chunks = 2 * 4 * (300 * 16 * 2 + 4)
    saved = store_bytes(raw.made, raw.layout) - store_bytes(small.made, small.layout)
    assert saved == pytest.approx(chunks * (1 - 1.05 / ratio), rel=0.02)
