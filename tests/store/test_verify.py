"""`verify` reads everything, collects every problem and names each file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch

from tcsae.store.errors import ConfigError, Interrupted, StoreNotFound
from tcsae.store.verify import verify
from tcsae.tests.store.damage import HOOK, chunk, edit_documents, edit_root, flip, swap


@pytest.fixture
def path(make_store):
    return make_store(torch.randn(1000, 16, generator=torch.Generator().manual_seed(2)), [100] * 10).path


def write_with_crc(path: Path, values: np.ndarray) -> int:
    body = values.tobytes()
    checksum = google_crc32c.value(body)
    path.write_bytes(body + checksum.to_bytes(4, "little"))
    return checksum


def replant(store: Path, number: int, change) -> None:
    """Alter a chunk the careful way: its own CRC and the store's table fit the altered rows."""
    rows = np.frombuffer(chunk(store, number).read_bytes()[:-4], dtype="<f2").reshape(300, 16).copy()
    change(rows)
    table = store / "checksums" / HOOK / "c" / "0"
    checksums = np.frombuffer(table.read_bytes()[:-4], dtype="<u4").copy()
    checksums[number] = write_with_crc(chunk(store, number), rows)
    write_with_crc(table, checksums)


def edit_statistics(store: Path, **changes: object) -> None:
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["statistics"][HOOK].update(changes)
    (store / "zarr.json").write_text(json.dumps(root))


def flip_two(store: Path) -> None:
    for number in (1, 3):
        flip(chunk(store, number), 40)


def move_a_context(store: Path) -> None:
    """Let the second context begin five rows earlier, with a good checksum of the array's own."""
    path = store / "context_offsets" / "c" / "0"
    offsets = np.frombuffer(path.read_bytes()[:-4], "<i8").copy()
    offsets[1] -= 5
    write_with_crc(path, offsets)


def plant_index(store: Path, name: str, change) -> None:
    """Alter an index array the careful way: its own CRC and its SHA-256 fit the altered numbers."""
    path = store / name / "c" / "0"
    values = np.frombuffer(path.read_bytes()[:-4], "<i4" if name == "tokens" else "<i8").copy()
    change(values)
    write_with_crc(path, values)
    digests = json.loads((store / "zarr.json").read_text())["attributes"]["table_sha256"]
    edit_root(store, table_sha256=digests | {f"{name}/c/0": hashlib.sha256(path.read_bytes()).hexdigest()})


def fall(offsets: np.ndarray) -> None:
    offsets[3] = offsets[2] - 10


def end_early(offsets: np.ndarray) -> None:
    offsets[-1] -= 1


def span(offsets: np.ndarray) -> None:
    """Contexts begin at 0, 25, 50, 75, 100, and documents at 0, 100: the fourth context now ends at 105."""
    offsets[4] = 105


def below_zero(tokens: np.ndarray) -> None:
    tokens[7] = -1


def beyond(tokens: np.ndarray) -> None:
    tokens[7] = 100_000


def set_infinite(rows: np.ndarray) -> None:
    rows[:3, 2] = -np.inf


def set_nan(rows: np.ndarray) -> None:
    rows[5, 5] = np.nan


def scale(rows: np.ndarray) -> None:
    rows[:] *= 2


def fill_padding(rows: np.ndarray) -> None:
    rows[250] = 1


PLANTED = [
    pytest.param(flip_two, [r"c/1/0: CRC-32C", r"c/3/0: CRC-32C"], id="two flipped bits are both named"),
    pytest.param(lambda s: chunk(s, 2).unlink(), ["c/2/0: chunk is missing"], id="a missing chunk"),
    pytest.param(
        lambda s: chunk(s, 2).write_bytes(b"12"), ["c/2/0: expected 9604 bytes, got 2"], id="a cut-off chunk"
    ),
    pytest.param(swap, ["c/0/0: CRC-32C", "c/1/0: CRC-32C"], id="two swapped chunks"),
    pytest.param(
        lambda s: replant(s, 1, set_nan),
        ["c/1/0: 1 rows hold NaN", "id does not fit"],
        id="a NaN with good checksums",
    ),
    pytest.param(
        lambda s: replant(s, 1, set_infinite),
        ["c/1/0: 3 rows hold NaN or infinite", "id does not fit"],
        id="infinite values with good checksums",
    ),
    pytest.param(
        lambda s: plant_index(s, "document_offsets", fall),
        ["document_offsets must rise, but entry 3 is 190 after 200"],
        id="offsets that fall",
    ),
    pytest.param(
        lambda s: plant_index(s, "document_offsets", end_early),
        ["document_offsets must run from 0 to 1000, got [0]..[999]"],
        id="offsets that do not cover",
    ),
    pytest.param(
        lambda s: plant_index(s, "context_offsets", span),
        ["the context of rows [75, 105) spans two documents: one begins at row 100"],
        id="a context in two documents",
    ),
    pytest.param(
        lambda s: plant_index(s, "tokens", below_zero), ["tokens run from -1 to 999"], id="a token below 0"
    ),
    pytest.param(
        lambda s: plant_index(s, "tokens", beyond),
        ["tokens run from 0 to 100000; the vocabulary has 100000", "id does not fit"],
        id="a token outside the vocabulary",
    ),
    pytest.param(
        lambda s: replant(s, 1, scale),
        ["id does not fit", "mean_square_norm", "mean: differs"],
        id="altered rows with good checksums",
    ),
    pytest.param(
        lambda s: replant(s, 3, fill_padding),
        ["c/3/0: the padding", "id does not fit"],
        id="rows in the padding",
    ),
    pytest.param(
        lambda s: edit_statistics(s, mean_square_norm=1.0), ["mean_square_norm: 1.0 in"], id="a wrong scale"
    ),
    pytest.param(lambda s: edit_statistics(s, n_outliers=3), ["n_outliers: 3 in"], id="a wrong count"),
    pytest.param(
        lambda s: edit_root(s, vocab_size=500),
        ["tokens run from 0 to 999", "id does not"],
        id="a token too large",
    ),
    pytest.param(
        lambda s: edit_root(s, context_length=20),
        ["leaves room for 19", "id does not"],
        id="a context too long",
    ),
    pytest.param(lambda s: edit_root(s, model="x"), ["id does not fit"], id="another model's name"),
    pytest.param(lambda s: edit_root(s, complete=False), ["the harvest has not finished"], id="not complete"),
    pytest.param(
        lambda s: edit_documents(s, "id", ["document-0"] * 2 + [f"document-{i}" for i in range(2, 10)]),
        ["'document-0' occurs more than once"],
        id="one id twice",
    ),
    pytest.param(
        lambda s: edit_documents(s, "n_tokens", [100] * 9 + [99]),
        ["n_tokens of 'document-9'"],
        id="a wrong length",
    ),
    pytest.param(
        lambda s: edit_documents(s, "split", ["test"] * 10), ["split of 'document-"], id="a wrong split"
    ),
    pytest.param(
        lambda s: edit_documents(s, "topic", ["even"] * 10),
        ["documents.parquet: SHA-256"],
        id="another topic, which nothing else tells",
    ),
    pytest.param(
        move_a_context,
        ["context_offsets/c/0: SHA-256"],
        id="other contexts, with a good checksum of their own",
    ),
]


@pytest.mark.parametrize(("plant", "expected"), PLANTED)
def test_what_is_planted_is_found(path, plant, expected):
    plant(path)
    found = verify(path).problems
    for message in expected:
        assert any(message in problem for problem in found), found
    assert all(str(path) in problem and "\n" not in problem for problem in found), found


def spoil_documents(store: Path) -> None:
    (store / "documents.parquet").write_bytes(b"x")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_documents, "documents.parquet: cannot be read"),
        (lambda s: plant_index(s, "document_offsets", fall), "document_offsets must rise"),
        (lambda s: (s / "tokens" / "c" / "0").unlink(), "tokens/c/0: chunk is missing"),
        (lambda s: edit_root(s, d_model=8), "does not fit the group's attributes"),
    ],
    ids=["no table of documents", "offsets that fall", "no tokens", "a wrong width"],
)
def test_damaged_tables_do_not_hide_bad_chunks(path, spoil, said):
    spoil(path)
    flip(chunk(path, 1), 40)
    chunk(path, 2).unlink()
    chunk(path, 3).write_bytes(chunk(path, 0).read_bytes())
    found = verify(path)
    assert found.chunks == 4
    for message in (said, "c/1/0: CRC-32C", "c/2/0: chunk is missing", "c/3/0: CRC-32C"):
        assert any(message in problem for problem in found.problems), found.problems
    assert not any("c/0/0" in problem for problem in found.problems if "activations" in problem)


def test_a_good_store_has_no_problems(path):
    found = verify(path)
    assert found.problems == ()
    assert (found.chunks, found.rows) == (4, 1000)


def test_workers_find_the_same(path):
    flip_two(path)
    assert verify(path, workers=2).problems == verify(path).problems


def test_no_workers_are_refused(path):
    with pytest.raises(ConfigError, match="workers: expected at least 1, got 0"):
        verify(path, workers=0)


def test_what_is_no_store_cannot_be_verified(tmp_path):
    with pytest.raises(StoreNotFound):
        verify(tmp_path)


def test_a_url_is_refused_with_the_way_to_verify_it():
    with pytest.raises(ConfigError, match=r"s3://lab/a.zarr: .*tcsae store copy"):
        verify("s3://lab/a.zarr")


def test_workers_that_were_started_in_another_folder_find_a_store_named_from_here(path, monkeypatch):
    from dask.distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        dashboard_address=":0",  # None would take port 8787, which another cluster may have
        memory_limit=0,
        silence_logs=logging.CRITICAL,
    ) as cluster:
        monkeypatch.chdir(path.parent)
        found = verify(path.name, scheduler=cluster.scheduler_address)
    assert (found.problems, found.chunks) == ((), 4)


def test_a_verification_that_is_stopped_says_so_in_one_line(path, monkeypatch):
    def stop(task):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("tcsae.store.verify.look", stop)
    with pytest.raises(Interrupted, match="interrupted; nothing was changed, run the same command again"):
        verify(path)
    assert signal.getsignal(signal.SIGTERM) == before
