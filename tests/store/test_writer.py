"""Writing: refused values, resuming, locks, and that interruption changes no byte."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tcsae.store import ActivationStore, StoreWriter
from tcsae.store.errors import (
    ActivationError,
    ConfigError,
    DiskFull,
    StoreBusy,
    StoreCorrupt,
    StoreExists,
    StoreIncomplete,
    StoreMismatch,
)
from tcsae.store.layout import Layout
from tcsae.tests.fixtures import hashes
from tcsae.tests.store.damage import flip, swap

HOOK = "blocks.0.hook_resid_post"
ROWS = torch.randn(1000, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plan(make_layout, make_provenance):
    return make_layout([10, 40, 25, 25] * 10, 25), make_provenance()


def write(writer: StoreWriter, chunks: list[int]) -> None:
    for chunk in chunks:
        start, stop = writer.rows_of(chunk)
        writer.write(HOOK, chunk, ROWS[start:stop])


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# Resuming


def test_an_interrupted_store_is_byte_identical_to_an_uninterrupted_one(plan, tmp_path):
    with StoreWriter.create(tmp_path / "whole", *plan) as writer:
        write(writer, [0, 1, 2, 3])
        writer.finish()
    with StoreWriter.create(tmp_path / "cut", *plan) as writer:
        write(writer, [2])
    with StoreWriter.resume(tmp_path / "cut", plan[1]) as writer:
        assert writer.missing() == [0, 1, 3]
        write(writer, [3, 0])
    with StoreWriter.resume(tmp_path / "cut", plan[1]) as writer:
        write(writer, writer.missing())
        writer.finish()
    assert digests(tmp_path / "whole") == digests(tmp_path / "cut")


def test_an_unfinished_store_does_not_open(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2, 3])
    with pytest.raises(StoreIncomplete, match="--resume"):
        ActivationStore.open(tmp_path / "s")


def test_finishing_without_every_chunk_is_refused(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 3])
        with pytest.raises(StoreCorrupt, match=r"c/2/0: chunk is missing"):
            writer.finish()


def test_a_damaged_chunk_counts_as_missing(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2, 3])
    chunk = tmp_path / "s" / "activations" / HOOK / "c" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[17] ^= 1
    chunk.write_bytes(content)
    with StoreWriter.resume(tmp_path / "s", plan[1]) as writer:
        assert writer.missing() == [1]


def test_a_chunk_in_anothers_place_counts_as_missing_once_the_store_is_complete(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2, 3])
        writer.finish()
    good = digests(tmp_path / "s")
    swap(tmp_path / "s")
    with StoreWriter.resume(tmp_path / "s", plan[1]) as writer:
        assert writer.missing() == [0, 1]
        write(writer, [0, 1])
        writer.finish()
    assert digests(tmp_path / "s") == good


def test_a_damaged_table_of_checksums_leaves_each_chunk_its_own(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2, 3])
        writer.finish()
    flip(tmp_path / "s" / "checksums" / HOOK / "c" / "0", 3)
    flip(chunk_file(tmp_path / "s", 2), 100)
    with StoreWriter.resume(tmp_path / "s", plan[1]) as writer:
        assert writer.missing() == [2]


def test_a_damaged_table_of_checksums_is_made_again_but_not_of_other_chunks(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2, 3])
        writer.finish()
        assert writer.is_finished
    before = hashes(tmp_path / "s")
    table = tmp_path / "s" / "checksums" / HOOK / "c" / "0"
    flip(table, 3)
    with StoreWriter.resume(tmp_path / "s", plan[1]) as writer:
        assert writer.complete
        assert not writer.is_finished
        writer.finish()
    assert hashes(tmp_path / "s") == before
    flip(table, 3)
    swap(tmp_path / "s")
    damaged = table.read_bytes()
    with StoreWriter.resume(tmp_path / "s", plan[1]) as writer:
        assert writer.missing() == []  # each chunk is whole by itself
        with pytest.raises(
            StoreCorrupt, match="id: .* when it was finished, .* of the chunks that are there"
        ):
            writer.finish()
    assert table.read_bytes() == damaged


def test_chunks_that_lie_where_a_store_was_deleted_in_part_are_not_taken_over(
    plan, make_provenance, tmp_path
):
    with StoreWriter.create(tmp_path / "s", plan[0], make_provenance(model="another")) as writer:
        for chunk in range(4):
            start, stop = writer.rows_of(chunk)
            writer.write(HOOK, chunk, -ROWS[start:stop])
        writer.finish()
    (tmp_path / "s" / "zarr.json").unlink()
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        assert writer.missing() == [0, 1, 2, 3]
        assert not list((tmp_path / "s" / "checksums").rglob("c"))


def test_a_folder_that_stands_in_the_place_of_chunks_by_a_link_keeps_what_it_has(plan, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("precious")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "activations").symlink_to(elsewhere)
    with StoreWriter.create(tmp_path / "s", *plan):
        pass
    assert [p.name for p in elsewhere.iterdir()] == ["thesis.tex"]


def test_a_plan_that_was_killed_halfway_is_begun_anew(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan):
        pass
    (tmp_path / "s" / "zarr.json").unlink()  # the last file that a plan writes
    (tmp_path / "s" / "documents.parquet.partial").write_bytes(b"half")
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2, 3])
        writer.finish()
    assert torch.equal(ActivationStore.open(tmp_path / "s").rows(0, 1000), ROWS.half())


def test_other_settings_are_refused_by_name(plan, make_provenance, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan):
        pass
    other = make_provenance(dtype="float32", model="another", created="2027-01-01")
    with (
        pytest.raises(
            StoreMismatch, match=r"model: begun with 'made-by-hand', now 'another'; dtype: .*'float32'"
        ),
        StoreWriter.resume(tmp_path / "s", other),
    ):
        pass


# What is in the way


def test_an_existing_store_is_not_overwritten(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan):
        pass
    with pytest.raises(StoreExists, match="--resume"), StoreWriter.create(tmp_path / "s", *plan):
        pass


def test_a_folder_with_other_things_is_not_touched(plan, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreExists, match="not a store"), StoreWriter.create(tmp_path / "s", *plan):
        pass
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "activations/layer3.npy",
            "activations/run/c/0/0.npy",
            "checksums/md5.txt",
            "truth/labels/zarr.json/a",
        ),
        *("tokens", "tokens/c/0/0/0", "mine.partial", "documents.parquet.old"),
    ],
)
def test_a_folder_that_holds_something_else_under_a_stores_names_is_not_touched(plan, tmp_path, name):
    precious = tmp_path / "s" / name
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with pytest.raises(StoreExists, match="not a store"), StoreWriter.create(tmp_path / "s", *plan):
        pass
    assert [p for p in (tmp_path / "s").rglob("*") if p.is_file()] == [precious]
    assert precious.read_text() == "precious"


HOLD_THE_LOCK = """
import sys
from pathlib import Path
from tcsae.store import StoreWriter
from tcsae.store.metadata import read_root
from tcsae.store.spec import Provenance
path = Path(sys.argv[1])
with StoreWriter.resume(path, Provenance.from_dict(read_root(path), "")):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan):
        pass
    other = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD_THE_LOCK, str(tmp_path / "s")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "holding\n"
        with pytest.raises(StoreBusy, match="another process"), StoreWriter.resume(tmp_path / "s", plan[1]):
            pass
        other.kill()
    with StoreWriter.resume(tmp_path / "s", plan[1]) as writer:
        assert writer.missing() == [0, 1, 2, 3]


# A chunk is synced while the next one is made


def chunk_file(store: Path, chunk: int) -> Path:
    return store / "activations" / HOOK / "c" / str(chunk) / "0"


@pytest.fixture
def full_disk(monkeypatch):
    """A function after which the next sync finds the disk full: what a real one, which needs a mount, gives."""
    sync = os.fsync

    def fill():
        def full(*_):
            monkeypatch.setattr("tcsae.store.atomic.os.fsync", sync)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("tcsae.store.atomic.os.fsync", full)

    return fill


def test_a_full_disk_leaves_nothing_half_written(plan, tmp_path, full_disk):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0])
        writer.wait()
        before = digests(tmp_path / "s")
        full_disk()
        write(writer, [1])
        with pytest.raises(DiskFull, match=r"c/1/0: the disk is full; .* --resume"):
            writer.wait()
        assert digests(tmp_path / "s") == before
        assert writer.missing() == [1, 2, 3]


def test_a_failed_sync_is_told_once_by_the_next_write_whose_own_chunk_is_kept(
    plan, tmp_path, full_disk, monkeypatch
):
    monkeypatch.setattr("tcsae.store.writer.UNSETTLED", 1)
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0])
        writer.wait()
        full_disk()
        write(writer, [1])
        with pytest.raises(DiskFull, match="c/1/0"):
            write(writer, [2])
        write(writer, [3, 1])
        writer.finish()
    assert torch.equal(ActivationStore.open(tmp_path / "s").rows(0, 1000), ROWS.half())


def test_a_failed_sync_of_one_of_several_chunks_is_told_when_all_have_settled(plan, tmp_path, full_disk):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        full_disk()
        write(writer, [0, 1, 2])
        with pytest.raises(DiskFull, match=r"c/[012]/0: the disk is full"):
            writer.wait()
        lacking = writer.missing()
        assert len(lacking) == 2
        write(writer, lacking)
        writer.finish()
    assert torch.equal(ActivationStore.open(tmp_path / "s").rows(0, 1000), ROWS.half())


def test_finishing_tells_that_the_last_chunk_could_not_be_synced(plan, tmp_path, full_disk):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2])
        writer.wait()
        full_disk()
        write(writer, [3])
        with pytest.raises(DiskFull, match="c/3/0"):
            writer.finish()


def test_the_end_of_the_block_tells_that_the_last_chunk_could_not_be_synced(plan, tmp_path, full_disk):
    def begin() -> None:
        with StoreWriter.create(tmp_path / "s", *plan) as writer:
            full_disk()
            write(writer, [0])

    with pytest.raises(DiskFull, match="c/0/0"):
        begin()
    assert not list((tmp_path / "s").rglob("*.partial"))


@pytest.fixture
def synced(monkeypatch):
    """The paths that were synced, in order."""
    paths, sync = [], os.fsync

    def note(descriptor):
        paths.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr("tcsae.store.atomic.os.fsync", note)
    return paths


@pytest.fixture
def slow_disk(monkeypatch):
    """Every sync waits until the event is set."""
    ready, sync = threading.Event(), os.fsync

    def slow(descriptor):
        assert ready.wait(60)
        sync(descriptor)

    ready.set()
    monkeypatch.setattr("tcsae.store.atomic.os.fsync", slow)
    yield ready
    ready.set()


def test_every_folder_is_synced_before_the_root_group_says_that_the_store_is_complete(plan, tmp_path, synced):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2, 3])
        writer.wait()
        synced.clear()
        writer.finish()
    # each after the last file in it was renamed, which follows on the sync of that file
    last = max(i for i, path in enumerate(synced) if path.name == "0.partial")
    until = synced.index(tmp_path / "s" / "zarr.json.partial")
    folders = {path for path in (tmp_path / "s").rglob("*") if path.is_dir()} | {tmp_path / "s"}
    assert folders <= set(synced[last:until])


def test_writing_returns_before_the_sync_and_the_rows_may_then_be_changed(plan, tmp_path, slow_disk):
    rows = ROWS[:300].half()
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        slow_disk.clear()
        writer.write(HOOK, 0, rows)
        rows.zero_()
        assert not chunk_file(tmp_path / "s", 0).exists()
        slow_disk.set()
        writer.wait()
        assert chunk_file(tmp_path / "s", 0).exists()
        write(writer, [1, 2, 3])
        writer.finish()
    assert torch.equal(ActivationStore.open(tmp_path / "s").rows(0, 1000), ROWS.half())


def test_a_chunk_that_is_written_twice_in_a_row_has_the_second_bytes(plan, tmp_path, slow_disk):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        slow_disk.clear()
        writer.write(HOOK, 0, -ROWS[:300])
        threading.Timer(0.2, slow_disk.set).start()
        write(writer, [0, 1, 2, 3])
        writer.finish()
    assert torch.equal(ActivationStore.open(tmp_path / "s").rows(0, 1000), ROWS.half())


@pytest.mark.parametrize("ask", [StoreWriter.finish, StoreWriter.missing])
def test_whoever_looks_at_the_chunks_waits_for_the_last_one(plan, tmp_path, slow_disk, ask):
    with StoreWriter.create(tmp_path / "s", *plan) as writer:
        write(writer, [0, 1, 2])
        writer.wait()
        slow_disk.clear()
        write(writer, [3])
        threading.Timer(0.2, slow_disk.set).start()
        assert not ask(writer)


def test_an_error_in_the_block_is_the_one_told_and_leaves_whole_chunks_only(plan, tmp_path, slow_disk):
    def begin() -> None:
        with StoreWriter.create(tmp_path / "s", *plan) as writer:
            write(writer, [0])
            writer.wait()
            slow_disk.clear()
            write(writer, [1])
            threading.Timer(0.2, slow_disk.set).start()
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        begin()
    assert not list((tmp_path / "s").rglob("*.partial"))
    with StoreWriter.resume(tmp_path / "s", plan[1]) as writer:
        assert writer.missing() == [2, 3]


def test_a_writer_made_directly_has_each_chunk_in_place_when_it_returns(plan, tmp_path):
    with StoreWriter.create(tmp_path / "s", *plan):
        worker = StoreWriter(tmp_path / "s", *plan)
        for chunk in range(4):
            write(worker, [chunk])
            assert chunk_file(tmp_path / "s", chunk).exists()


# Refused values


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        pytest.param(float("nan"), "float32", "the model gave nan", id="not a number"),
        pytest.param(float("inf"), "bfloat16", "the model gave inf", id="infinite"),
        pytest.param(70_000.0, "float16", "70000 overflows float16", id="beyond float16's 65504"),
    ],
)
def test_a_bad_value_is_named_and_nothing_is_written(
    make_layout, make_provenance, tmp_path, value, dtype, message
):
    rows = ROWS.clone()
    rows[320, 3] = value
    with StoreWriter.create(
        tmp_path / "s", make_layout([300, 700], 25), make_provenance(dtype=dtype)
    ) as writer:
        with pytest.raises(ActivationError, match=rf"document 'document-1', token 20 \(row 320\): {message}"):
            writer.write(HOOK, 1, rows[300:600])
        assert not list((tmp_path / "s" / "activations" / HOOK).glob("c/*/*"))


def test_values_that_bfloat16_holds_are_no_overflow(make_layout, make_provenance, tmp_path):
    rows = torch.full((30, 16), 70_000.0)
    with StoreWriter.create(
        tmp_path / "s", make_layout([30], 25), make_provenance(dtype="bfloat16")
    ) as writer:
        writer.write(HOOK, 0, rows)
        writer.finish()
    assert ActivationStore.open(tmp_path / "s").rows(0, 1)[0, 0] == torch.tensor(70_000.0).bfloat16()


# Layouts that cannot be


@pytest.mark.parametrize(
    ("documents", "contexts", "message"),
    [
        pytest.param([0, 5], [0, 5], "must run from 0 to 10", id="rows left over"),
        pytest.param([0, 6, 6, 10], [0, 6, 10], "must rise", id="an empty document"),
        pytest.param(
            [0, 6, 10], [0, 5, 10], r"rows \[5, 10\) spans two documents", id="a context in two documents"
        ),
    ],
)
def test_offsets_that_do_not_fit_are_refused(make_layout, documents, contexts, message):
    table = make_layout([1] * (len(documents) - 1), 5).documents
    with pytest.raises(ConfigError, match=message):
        Layout(np.arange(10, dtype=np.int32), np.array(documents), np.array(contexts), table)
