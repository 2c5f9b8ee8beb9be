"""Reading: views, copies across chunks, gathers, documents, splits and what is refused."""

from __future__ import annotations

import inspect
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tcsae.store import ActivationStore, split_of
from tcsae.store.dataset import Documents
from tcsae.store.errors import ConfigError, StoreCorrupt, StoreNotFound, UnknownName
from tcsae.store.mapped import file_pages

LENGTHS = [10, 40, 25, 25] * 10


@pytest.fixture
def rows():
    return torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture
def store(make_store, rows):
    return make_store(rows.float(), LENGTHS)


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        pytest.param(0, 16, id="inside the first chunk"),
        pytest.param(290, 300, id="up to a chunk's end"),
        pytest.param(290, 310, id="across a border"),
        pytest.param(100, 1000, id="over four chunks to the store's end"),
        pytest.param(500, 500, id="no rows"),
    ],
)
def test_rows_are_the_rows_written(store, rows, start, stop):
    assert torch.equal(store.rows(start, stop), rows[start:stop])


def test_rows_within_a_chunk_share_memory_with_the_map(store):
    first, second = store.rows(10, 20), store.rows(15, 20)
    assert first[5].data_ptr() == second[0].data_ptr()


def test_writing_to_a_view_leaves_the_file_as_it_was(store, rows):
    store.rows(0, 5).zero_()
    assert torch.equal(ActivationStore.open(store.path).rows(0, 5), rows[:5])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 1001), (7, 3)])
def test_a_range_outside_the_store_is_an_index_error(store, start, stop):
    with pytest.raises(IndexError, match="of 1000"):
        store.rows(start, stop)


def test_gather_keeps_the_order_asked_for(store, rows):
    wanted = torch.tensor([999, 0, 299, 300, 0, 650])
    assert torch.equal(store.gather(wanted), rows[wanted])
    assert torch.equal(store.gather(wanted.numpy()), rows[wanted])


def test_gather_outside_the_store_is_an_index_error(store):
    with pytest.raises(IndexError, match="of 1000"):
        store.gather(torch.tensor([5, 1000]))


@pytest.mark.parametrize("wanted", [np.ones(1000, dtype=bool), np.array([0.0, 3.5])], ids=["mask", "floats"])
def test_a_gather_of_what_are_no_row_numbers_is_refused(store, wanted):
    gather = inspect.unwrap(ActivationStore.gather)  # past the test run's type checker
    with pytest.raises(TypeError, match="expected their numbers"):
        gather(store, wanted)


def test_a_split_that_there_is_not_is_no_empty_one(store):
    documents_in = inspect.unwrap(ActivationStore.documents_in)
    with pytest.raises(ConfigError, match="split: expected one of train, test or all, got 'validation'"):
        documents_in(store, "validation")


def test_a_document_is_its_rows(store, rows):
    assert torch.equal(store.document(1), rows[10:50])


@pytest.mark.parametrize("index", [-1, -2, 40])
def test_a_document_that_is_not_there_is_an_index_error(store, index):
    with pytest.raises(IndexError, match=f"document {index} of 40"):
        store.document(index)


def test_contexts_know_their_document(store):
    # document 1 has 40 rows, so contexts 1 and 2
    assert store.document_of_context[:6].tolist() == [0, 1, 1, 2, 3, 4]


def test_splits_are_disjoint_cover_and_depend_on_the_id_alone(store):
    train, test = store.documents_in("train"), store.documents_in("test")
    assert sorted([*train, *test]) == list(range(40))
    assert [split_of(f"document-{i}") for i in test] == ["test"] * len(test)
    contexts = store.contexts_in("test")
    assert set(store.document_of_context[contexts]) == set(test)


def test_about_a_tenth_of_documents_is_held_out():
    share = np.mean([split_of(f"some corpus/{i}") == "test" for i in range(20_000)])
    assert share == pytest.approx(0.1, abs=0.007)  # 3 standard errors


def test_a_hook_must_be_named_when_there_are_several(make_store):
    store = make_store(torch.randn(30, 4), [30], hooks=("blocks.0.hook_out", "blocks.1.hook_out"))
    with pytest.raises(UnknownName, match=r"blocks\.0\.hook_out, blocks\.1\.hook_out"):
        store.rows(0, 1)
    with pytest.raises(UnknownName, match=r"did you mean: blocks\.\d\.hook_out"):
        store.rows(0, 1, "blocks.7.hook_out")


def test_what_is_not_a_store_is_said_to_be_none(tmp_path):
    with pytest.raises(StoreNotFound, match="no such folder"):
        ActivationStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreNotFound, match="no finished plan"):
        ActivationStore.open(tmp_path)


def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a name in UTF-8"):
        ActivationStore.open(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.zarr"))


def test_a_store_can_be_sent_to_a_spawned_process(store, rows):
    # method of an importable class, so that the fresh interpreter finds what it is to call
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert torch.equal(
            pool.submit(ActivationStore.rows, store, 250, 350).result(timeout=120), rows[250:350]
        )


def test_more_chunks_than_maps_are_kept_are_read_all_the_same(make_store, monkeypatch):
    monkeypatch.setattr("tcsae.store.mapped.MAX_MAPPED_CHUNKS", 2)
    values = torch.arange(100.0)[:, None].expand(100, 4)
    store = make_store(values, [100], rows_per_chunk=10)
    assert torch.equal(store.rows(0, 100).float(), values)
    assert torch.equal(store.gather(torch.arange(99, -1, -1)).float(), values.flip(0))


@pytest.fixture
def few_resident(monkeypatch):
    """Maps are given up after every third chunk of 40 bytes; to touch a chunk costs what its bytes are."""
    monkeypatch.setattr("tcsae.store.mapped.RESIDENT_BYTES", 120)
    monkeypatch.setattr("tcsae.store.mapped.LOOK_BYTES", 0)
    monkeypatch.setattr("tcsae.store.mapped.TOUCHED_BYTES", 0)
    monkeypatch.setattr("tcsae.store.mapped.file_pages", lambda: None)


@pytest.fixture
def ten_chunks(make_store):
    """Ten chunks of ten rows of two numbers."""
    return make_store(torch.arange(100.0)[:, None].expand(100, 2), [100], rows_per_chunk=10)


def n_mapped(store) -> int:
    return Path("/proc/self/maps").read_text().count(f"{store.path}/activations/")


def test_a_store_larger_than_what_may_be_resident_is_read_all_the_same(few_resident, ten_chunks):
    for _ in range(2):
        for start in range(0, 100, 5):
            assert ten_chunks.rows(start, start + 5)[:, 1].tolist() == list(range(start, start + 5))
        assert n_mapped(ten_chunks) <= 4
    assert ten_chunks.gather(np.arange(99, -1, -1))[:, 0].tolist() == list(range(99, -1, -1))


def test_the_environment_says_how_much_may_be_resident(few_resident, make_store, monkeypatch):
    monkeypatch.setenv("TCSAE_RESIDENT_GB", "0.0000004")  # 400 bytes: ten chunks
    store = make_store(torch.arange(100.0)[:, None].expand(100, 2), [100], rows_per_chunk=10)
    for start in range(0, 100, 10):
        store.rows(start, start + 10)
    assert n_mapped(store) == 10


@pytest.mark.parametrize("wrong", ["much", "0", "-1", "nan", "inf"])
def test_a_bound_that_is_no_number_of_gigabytes_is_refused(ten_chunks, monkeypatch, wrong):
    monkeypatch.setenv("TCSAE_RESIDENT_GB", wrong)
    with pytest.raises(
        ConfigError, match=f"TCSAE_RESIDENT_GB: expected gigabytes, more than 0, got '{wrong}'"
    ):
        ActivationStore.open(ten_chunks.path)


def test_pages_that_are_resident_count_whatever_was_read_to_bring_them_in(make_store, monkeypatch):
    # Two rows are read of each chunk; file pages that become resident meanwhile are a whole chunk each time.
    resident = iter(range(1000, 100_000, 40))
    monkeypatch.setattr("tcsae.store.mapped.RESIDENT_BYTES", 120)
    monkeypatch.setattr("tcsae.store.mapped.LOOK_BYTES", 0)
    monkeypatch.setattr("tcsae.store.mapped.TOUCHED_BYTES", 0)
    monkeypatch.setattr("tcsae.store.mapped.file_pages", lambda: next(resident))
    store = make_store(torch.arange(100.0)[:, None].expand(100, 2), [100], rows_per_chunk=10)
    for start in range(0, 100, 10):
        assert store.rows(start, start + 2)[:, 0].tolist() == [start, start + 1]
        assert n_mapped(store) <= 6


def test_what_linux_says_is_resident_of_files_grows_with_what_is_touched_of_a_map(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(2**25))
    before, mapped = file_pages(), np.memmap(path, mode="r")
    assert int(mapped.sum()) == 0
    assert file_pages() - before >= 2**25


def test_a_view_outlives_the_map_that_it_was_taken_from(few_resident, ten_chunks):
    view = ten_chunks.rows(0, 5)
    view[0] = -1
    for _ in ten_chunks.chunks(np.random.default_rng(0)):
        pass
    assert view[:, 0].tolist() == [-1, 1, 2, 3, 4]
    assert ten_chunks.rows(0, 1)[0, 0] == 0


def test_a_chunk_that_is_mapped_again_is_verified_again_only_if_its_file_is_another(few_resident, ten_chunks):
    for start, stop in ten_chunks.chunk_rows():
        ten_chunks.rows(start, stop)
    path = ten_chunks.path / "activations" / ten_chunks.hooks[0] / "c" / "0" / "0"
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(StoreCorrupt, match="c/0/0: CRC-32C"):
        ten_chunks.rows(0, 1)
    path.write_bytes(good)
    assert ten_chunks.rows(1, 2)[0, 0] == 1


def test_a_gather_maps_nothing_and_keeps_no_file_open(ten_chunks):
    before = len(list(Path("/proc/self/fd").iterdir()))
    wanted = np.random.default_rng(0).permutation(100)
    assert ten_chunks.gather(wanted)[:, 1].tolist() == wanted.tolist()
    assert n_mapped(ten_chunks) == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_gather_into_given_memory_fills_all_of_it(store, rows):
    wanted = np.array([5, 6, 7, 299, 300, 301, 6, 999, 0])
    out = torch.full((9, 16), torch.nan, dtype=torch.float16)
    assert store.gather(wanted, out=out) is out
    assert torch.equal(out, rows[wanted])
    assert store.gather(np.array([], dtype=np.int64)).shape == (0, 16)


def test_a_gather_into_memory_that_does_not_fit_is_refused_and_writes_nothing(store):
    wanted = np.arange(4)
    wide = torch.zeros(4, 20, dtype=torch.float16)
    for out in (wide[:, :16], torch.zeros(4, 16), torch.zeros(5, 16, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"expected \(4, 16\) of torch.float16, contiguous"):
            store.gather(wanted, out=out)
    assert not wide.any()


def test_token_ids_of_rows_come_through_a_map_that_is_given_up_again(store, monkeypatch):
    monkeypatch.setattr("tcsae.store.reader.FEW_BYTES", 0)

    def n_maps():
        return Path("/proc/self/maps").read_text().count(f"{store.path}/tokens/")

    before, wanted = n_maps(), np.array([999, 3, 3, 500])
    assert store.tokens_at(wanted).tolist() == [int(store.tokens[row]) for row in wanted]
    assert n_maps() == before


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        pytest.param(lambda good: good[:30], "expected 44 bytes, got 30", id="cut short"),
        pytest.param(lambda good: bytes([good[0] ^ 1]) + good[1:], "CRC-32C", id="a flipped bit"),
    ],
)
def test_a_gather_names_a_chunk_that_was_damaged_after_it_was_verified(ten_chunks, spoil, match):
    ten_chunks.gather(np.arange(100))
    path = ten_chunks.path / "activations" / ten_chunks.hooks[0] / "c" / "3" / "0"
    good = path.read_bytes()
    path.write_bytes(spoil(good))
    assert ten_chunks.gather(np.arange(30))[29, 0] == 29
    with pytest.raises(StoreCorrupt, match=f"c/3/0: {match}"):
        ten_chunks.gather(np.arange(25, 35))
    path.write_bytes(good)
    assert ten_chunks.gather(np.arange(25, 35))[:, 0].tolist() == list(range(25, 35))


def test_mapped_chunks_hold_no_file_open(ten_chunks):
    before = len(list(Path("/proc/self/fd").iterdir()))
    views = [ten_chunks.rows(start, start + 1) for start in range(0, 100, 10)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(views) == n_mapped(ten_chunks) == 10


def test_windows_lie_in_one_context_and_every_one_is_as_likely(store, rows):
    seen: dict[int, int] = {}
    for start, window in itertools.islice(store.windows(20, np.random.default_rng(0)), 4000):
        assert torch.equal(window, rows[start : start + 20])
        seen[start] = seen.get(start, 0) + 1
    # of each 100 rows, contexts [10, 35), [50, 75) and [75, 100) have 6 windows of 20 each: 180 in all
    expected = {100 * block + first + i for block in range(10) for first in (10, 50, 75) for i in range(6)}
    assert set(seen) == expected
    assert 4 <= min(seen.values()) <= max(seen.values()) <= 45  # 22 expected


def test_equal_generators_give_equal_windows_and_contexts_select(store):
    def starts(contexts=None):
        drawn = store.windows(20, np.random.default_rng(7), contexts=contexts)
        return [start for start, _ in itertools.islice(drawn, 50)]

    assert starts() == starts()
    assert set(starts(np.array([1]))) <= set(range(10, 16))


@pytest.mark.parametrize("length", [0, 26])
def test_windows_that_no_context_holds_are_refused(store, length):
    with pytest.raises(ConfigError, match="contexts have 1 to 25"):
        next(store.windows(length, np.random.default_rng(0)))


def test_chunks_come_once_each_in_an_order_of_the_generator(store, rows):
    first = list(store.chunks(np.random.default_rng(1)))
    assert sorted(start for start, _ in first) == [0, 300, 600, 900]
    assert [len(chunk) for start, chunk in sorted(first, key=lambda c: c[0])] == [300, 300, 300, 100]
    assert all(torch.equal(chunk, rows[start : start + len(chunk)]) for start, chunk in first)
    assert [s for s, _ in first] == [s for s, _ in store.chunks(np.random.default_rng(1))]
    orders = {tuple(s for s, _ in store.chunks(np.random.default_rng(seed))) for seed in range(8)}
    assert len(orders) > 1


def test_a_data_loader_reads_documents_in_spawned_workers(store, rows):
    # Documents is importable, as what a spawned worker gets must be; a test module is not
    loader = torch.utils.data.DataLoader(
        Documents(store), batch_size=None, num_workers=1, multiprocessing_context="spawn", timeout=120
    )
    assert torch.equal(torch.cat(list(loader)), rows)
