"""Stores elsewhere: a real S3 server and a real HTTP server on this machine, also ones that fail.

Every request has a time limit of a few seconds here, so that a server that hangs fails a test soon.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.chunks import map_chunk, read_chunk
from tcsae.store.claim import CLAIM, STALE_SECONDS, claimed
from tcsae.store.copy import copy_store
from tcsae.store.errors import ConfigError, RemoteError, StoreBusy, StoreCorrupt, StoreNotFound
from tcsae.store.remote import RemoteFolder, Transfer
from tcsae.tests.servers import Server, make_certificate, moto_server, relaying, serving

pytest.importorskip("aiohttp", reason="needs tcsae[http]")

HOOK = "blocks.0.hook_resid_post"
QUICK = Transfer(attempts=4, wait=0.05, timeout=2.0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(make_store):
    return make_store(torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)), [100] * 10)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def chunks_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("stores/*/activations/*/c/*/0"))


# HTTP


@pytest.fixture
def serve(store):
    def start(**faults) -> Server:
        return servers.enter_context(serving(store.path.parent, **faults))

    with ExitStack() as servers:
        yield start


def test_a_store_behind_http_reads_chunk_by_chunk(store, serve, cache):
    server = serve()
    opened = ActivationStore.open(f"{server.url}/store.zarr")
    assert opened.id == store.id
    assert chunks_in(cache) == []
    assert torch.equal(opened.rows(310, 320), store.rows(310, 320))
    assert [p.parts[-2] for p in chunks_in(cache)] == ["1"]
    assert torch.equal(opened.rows(0, 1000), store.rows(0, 1000))
    # a second process or day asks the server for the header only
    server.asked.clear()
    assert torch.equal(ActivationStore.open(f"{server.url}/store.zarr").rows(0, 1000), store.rows(0, 1000))
    assert server.asked == ["/store.zarr/zarr.json"]


def test_dropped_connections_are_tried_again(store, serve, tmp_path):
    server = serve(bad=2)
    copy_store(f"{server.url}/store.zarr", tmp_path / "copy", transfer=QUICK)
    assert contents(tmp_path / "copy") == contents(store.path)


def test_a_server_that_keeps_dropping_ends_in_one_line_and_the_copy_resumes(store, serve, tmp_path):
    flaky, good = serve(bad=99), serve()
    with pytest.raises(RemoteError, match="after 4 tries") as caught:
        copy_store(f"{flaky.url}/store.zarr", tmp_path / "copy", transfer=QUICK)
    assert "\n" not in str(caught.value)
    copy_store(f"{good.url}/store.zarr", tmp_path / "copy", transfer=QUICK, resume=True)
    assert contents(tmp_path / "copy") == contents(store.path)


def test_an_answer_that_does_not_come_is_given_up(store, serve):
    server = serve(bad=99, fault="late")
    folder = RemoteFolder(f"{server.url}/store.zarr", Transfer(attempts=2, wait=0.05, timeout=0.3))
    began = time.monotonic()
    with pytest.raises(RemoteError, match="after 2 tries"):
        folder.read(f"activations/{HOOK}/c/0/0")
    assert time.monotonic() - began < 5


def test_a_damaged_copy_in_the_cache_is_fetched_again(store, serve, cache):
    url = f"{serve().url}/store.zarr"
    ActivationStore.open(url).rows(0, 1000)
    chunk = chunks_in(cache)[2]
    chunk.write_bytes(b"x" * chunk.stat().st_size)
    for table in cache.glob("stores/*/tokens/c/0"):
        table.write_bytes(b"x")
    assert torch.equal(ActivationStore.open(url).rows(0, 1000), store.rows(0, 1000))


def test_a_chunk_that_is_damaged_at_the_server_is_named(store, serve):
    chunk = store.path / "activations" / HOOK / "c" / "1" / "0"
    chunk.write_bytes(b"x" + chunk.read_bytes()[1:])
    opened = ActivationStore.open(f"{serve().url}/store.zarr")
    opened.rows(0, 300)
    with pytest.raises(StoreCorrupt, match=r"c/1/0: CRC-32C"):
        opened.rows(300, 301)


def test_the_cache_keeps_below_its_limit_and_lets_the_oldest_go(store, serve, cache, monkeypatch):
    # a chunk has 9604 bytes and the tables about 15,000: with 40 kB there is room for two chunks
    monkeypatch.setenv("TCSAE_CACHE_GB", "0.00004")
    opened = ActivationStore.open(f"{serve().url}/store.zarr")
    assert torch.equal(opened.rows(0, 1000), store.rows(0, 1000))
    left = [p.parts[-2] for p in chunks_in(cache)]
    assert 1 <= len(left) <= 3
    assert "0" not in left
    assert "3" in left
    assert torch.equal(ActivationStore.open(opened.url).rows(0, 1000), store.rows(0, 1000))


@pytest.fixture
def few_resident(monkeypatch):
    """Maps are given up at every second chunk."""
    monkeypatch.setattr("tcsae.store.mapped.RESIDENT_BYTES", 9600)
    monkeypatch.setattr("tcsae.store.mapped.LOOK_BYTES", 0)
    monkeypatch.setattr("tcsae.store.mapped.file_pages", lambda: None)


def test_readers_that_share_a_cache_verify_each_chunk_once_each(store, serve, few_resident, monkeypatch):
    url = f"{serve().url}/store.zarr"
    one, other, expected = ActivationStore.open(url), ActivationStore.open(url), store.rows(0, 1000)
    verified = []

    def note(folder, made, hook, chunk, **more):
        verified.append(chunk)
        return read_chunk(folder, made, hook, chunk, **more)

    monkeypatch.setattr("tcsae.store.mapped.read_chunk", note)
    for _ in range(3):
        for start in range(0, 1000, 100):
            for reader in (one, other):
                assert torch.equal(reader.rows(start, start + 100), expected[start : start + 100])
    assert sorted(verified) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_chunk_that_is_removed_just_before_it_is_mapped_again_is_fetched_again(
    store, serve, few_resident, monkeypatch
):
    opened = ActivationStore.open(f"{serve().url}/store.zarr")
    for start in range(0, 1000, 100):
        opened.rows(start, start + 100)
    removed = []

    def remove_first(path, made):
        Path(path).unlink()
        removed.append(path)
        return map_chunk(path, made)

    monkeypatch.setattr("tcsae.store.mapped.map_chunk", remove_first)
    assert torch.equal(opened.rows(0, 100), store.rows(0, 100))
    assert len(removed) == 1


def test_a_gather_fetches_a_chunk_that_was_removed_again_and_counts_as_use(store, serve, cache):
    opened, wanted = ActivationStore.open(f"{serve().url}/store.zarr"), np.array([7, 999, 8, 350])
    assert torch.equal(opened.gather(wanted), store.gather(wanted))
    first, last = chunks_in(cache)[0], chunks_in(cache)[-1]
    changed = first.stat().st_mtime_ns
    later = changed + 3600 * 10**9
    os.utime(first, ns=(later, changed))
    last.unlink()
    assert torch.equal(opened.gather(wanted), store.gather(wanted))
    assert chunks_in(cache)[-1] == last
    assert first.stat().st_atime_ns < later


def test_a_chunk_that_is_mapped_again_counts_as_used(store, serve, cache, few_resident):
    opened = ActivationStore.open(f"{serve().url}/store.zarr")
    for start in range(0, 1000, 100):
        opened.rows(start, start + 100)
    first = chunks_in(cache)[0]
    changed = first.stat().st_mtime_ns
    later = (
        changed + 3600 * 10**9
    )  # a time that the kernel, which notes some reads by itself, leaves as it is
    os.utime(first, ns=(later, changed))
    opened.rows(0, 100)
    assert changed < first.stat().st_atime_ns < later
    assert first.stat().st_mtime_ns == changed


def test_nothing_at_the_address(serve):
    with pytest.raises(StoreNotFound, match="nothing there"):
        ActivationStore.open(f"{serve().url}/other.zarr")


def test_http_cannot_be_written_to(store, serve):
    with pytest.raises(ConfigError, match="cannot be written"):
        copy_store(store.path, f"{serve().url}/copy.zarr")


@pytest.mark.parametrize("url", ["s3://", "memory:///"])
def test_a_protocol_without_a_place_is_refused(store, url):
    with pytest.raises(ConfigError, match="expected more than a protocol"):
        copy_store(store.path, url)


READ_ALL = """
import sys
from tcsae.store import ActivationStore
print("ready", flush=True)
print(ActivationStore.open(sys.argv[1]).rows(0, 1000).double().sum().item())
"""


def test_two_processes_share_a_cache_and_fetch_each_chunk_once(store, serve):
    server = serve()
    command = [sys.executable, "-P", "-c", READ_ALL, f"{server.url}/store.zarr"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        here = ActivationStore.open(f"{server.url}/store.zarr").rows(0, 1000)
        assert float(other.communicate(timeout=60)[0]) == here.double().sum().item()
    assert torch.equal(here, store.rows(0, 1000))
    for chunk in range(4):
        assert server.asked.count(f"/store.zarr/activations/{HOOK}/c/{chunk}/0") == 1


def test_https_is_read_and_a_certificate_that_is_not_trusted_is_refused(store, serve, tmp_path):
    certificate = make_certificate(tmp_path / "here.pem")
    server = serve(certificate=certificate)
    assert server.url.startswith("https://")
    # whom to trust is read once in a process, so this one takes a process of its own
    command = [sys.executable, "-P", "-c", READ_ALL, f"{server.url}/store.zarr"]
    environment = os.environ | {"SSL_CERT_FILE": str(certificate)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[1]) == store.rows(0, 1000).double().sum().item()
    with pytest.raises(RemoteError, match="certificate verify failed"):
        copy_store(f"{server.url}/store.zarr", tmp_path / "copy", transfer=QUICK)
    assert not (tmp_path / "copy").exists()


OPEN_OFTEN = """
import sys
from tcsae.store import ActivationStore
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    ActivationStore.open(sys.argv[1])
"""


def test_processes_that_open_at_the_same_time_are_not_in_each_others_way(store, serve):
    command = [sys.executable, "-P", "-c", OPEN_OFTEN, f"{serve().url}/store.zarr"]
    others = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for other in others:
        assert other.stdout.readline() == "ready\n"
    for other in others:
        other.stdin.write("\n")
        other.stdin.flush()
    for other in others:
        said = other.communicate(timeout=120)[1]
        assert other.returncode == 0, said


# S3


@pytest.fixture(scope="module")
def s3():
    """The URL of an empty bucket."""
    with moto_server() as url:
        yield url


def test_s3_there_and_back_is_the_same_bytes(store, s3, tmp_path):
    sent = copy_store(store.path, f"{s3}/a/store.zarr", transfer=QUICK)
    assert sent.id == store.id
    copy_store(f"{s3}/a/store.zarr", tmp_path / "back", transfer=QUICK)
    assert contents(tmp_path / "back") == contents(store.path)
    again = copy_store(store.path, f"{s3}/a/store.zarr", resume=True, transfer=QUICK)
    assert again.kept == 4  # all its chunks


def test_s3_is_read_by_its_url_and_compressed_on_the_way(store, s3):
    copied = copy_store(store.path, f"{s3}/b/small.zarr", codec="lossless", documents=(2, 9), transfer=QUICK)
    opened = ActivationStore.open(f"{s3}/b/small.zarr")
    assert (opened.id, opened.provenance.codec) == (copied.id, "lossless")
    assert torch.equal(opened.rows(0, 700), store.rows(200, 900))


@pytest.mark.parametrize("fault", ["drop", "late"])
def test_s3_connections_that_drop_or_do_not_answer_are_tried_again(store, s3, tmp_path, monkeypatch, fault):
    patient = Transfer(attempts=4, wait=0.05, timeout=1.0)
    url = f"{s3}/{fault}/store.zarr"
    with (
        relaying(os.environ["AWS_ENDPOINT_URL"], bad=2, fault=fault) as relay,
        monkeypatch.context() as environment,
    ):
        environment.setenv("AWS_ENDPOINT_URL", relay.url)
        clear_instances()  # of file systems that lead past the relay
        copy_store(store.path, url, transfer=patient)
        assert relay.spoilt == 2
        relay.left = 2
        copy_store(url, tmp_path / "back", transfer=patient)
        assert relay.spoilt == 4
        assert contents(tmp_path / "back") == contents(store.path)
        relay.left = 10_000
        with pytest.raises(RemoteError, match=r"after 4 tries .*; run the same command again") as caught:
            copy_store(url, tmp_path / "half", transfer=patient)
        assert "\n" not in str(caught.value)
    clear_instances()
    copy_store(url, tmp_path / "half", resume=True, transfer=patient)
    assert contents(tmp_path / "half") == contents(store.path)


def clear_instances() -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


def test_a_bucket_that_does_not_exist_is_one_line(store, s3):
    with pytest.raises(RemoteError, match="no-such-bucket"):
        copy_store(store.path, "s3://no-such-bucket/store.zarr", transfer=QUICK)
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1")


def test_without_credentials_it_is_said_at_once(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    clear_instances()
    with pytest.raises(RemoteError, match=r"cannot read \(NoCredentialsError"):
        ActivationStore.open(f"{s3}/a/store.zarr")
    clear_instances()


# Two writers


@pytest.fixture
def quick_claims(monkeypatch):
    monkeypatch.setattr("tcsae.store.claim.RENEW_SECONDS", 0.05)
    monkeypatch.setattr("tcsae.store.claim.SETTLE_SECONDS", 0.0)


def put_claim(url: str, **changes: object) -> RemoteFolder:
    claim = {"owner": "another", "host": "elsewhere", "pid": 7, "seen": time.time()} | changes
    folder = RemoteFolder(url, QUICK)
    folder.write(CLAIM, json.dumps(claim).encode())
    return folder


def test_a_second_writer_to_a_url_is_refused_in_another_process(store, s3, tmp_path):
    url = f"{s3}/busy/store.zarr"
    with claimed(RemoteFolder(url, QUICK)):
        command = [sys.executable, "-P", "-m", "tcsae.cli", "store", "copy", str(store.path), url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"process {os.getpid()} on" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    # the first one has ended, so nothing is in the way any more, and no claim is left afterwards
    copy_store(store.path, url, transfer=QUICK)
    with pytest.raises(FileNotFoundError):
        RemoteFolder(url, QUICK).read(CLAIM)


def test_a_claim_that_a_killed_writer_left_is_taken_over_when_it_is_stale(store, s3):
    url = f"{s3}/stale/store.zarr"
    put_claim(url)
    with pytest.raises(StoreBusy, match=r"process 7 on elsewhere .* try again in 1\d\d s"):
        copy_store(store.path, url, transfer=QUICK)
    put_claim(url, seen=time.time() - STALE_SECONDS - 1)
    copy_store(store.path, url, transfer=QUICK)
    assert ActivationStore.open(url).id == store.id


def test_a_writer_that_was_taken_over_stops_before_it_completes_the_copy(store, s3, monkeypatch):
    url = f"{s3}/lost/store.zarr"
    write = RemoteFolder.write

    def lose_at_the_second_chunk(self, name, content):
        write(self, name, content)
        if name.endswith("c/1/0"):
            put_claim(url)

    monkeypatch.setattr(RemoteFolder, "write", lose_at_the_second_chunk)
    with pytest.raises(StoreBusy, match="process 7 on elsewhere"):
        copy_store(store.path, url, transfer=QUICK)
    monkeypatch.undo()
    assert json.loads(RemoteFolder(url, QUICK).read("zarr.json"))["attributes"]["complete"] is False
    assert json.loads(RemoteFolder(url, QUICK).read(CLAIM))["owner"] == "another"  # not deleted by the loser


def test_a_writer_whose_claim_is_gone_stops_before_it_completes_the_copy(store, s3, monkeypatch):
    # whoever took over has finished meanwhile, and has deleted its claim
    url = f"{s3}/gone/store.zarr"
    write = RemoteFolder.write

    def lose_at_the_second_chunk(self, name, content):
        write(self, name, content)
        if name.endswith("c/1/0"):
            self.remove(CLAIM)

    monkeypatch.setattr(RemoteFolder, "write", lose_at_the_second_chunk)
    with pytest.raises(StoreBusy, match=r"\.writer\.lock is gone: .* --resume"):
        copy_store(store.path, url, transfer=QUICK)
    monkeypatch.undo()
    assert json.loads(RemoteFolder(url, QUICK).read("zarr.json"))["attributes"]["complete"] is False


def test_a_claim_from_the_future_says_that_the_clocks_differ(s3):
    url = f"{s3}/future/store.zarr"
    folder = put_claim(url, seen=time.time() + 7200)
    with (
        pytest.raises(
            StoreBusy, match=r"last seen 7\d\d\d s from now: .* clocks differ; .* delete \.writer\.lock"
        ),
        claimed(folder),
    ):
        pass


def test_a_bucket_tells_the_sizes_of_its_files_and_http_does_not(store, serve, s3):
    copy_store(store.path, f"{s3}/sizes/store.zarr", transfer=QUICK)
    # three chunks of 300 rows of 16 dimensions in float16, and a fourth that is padded to that, with their checksums
    names = [f"activations/{HOOK}/c/{number}/0" for number in range(4)]
    folder = RemoteFolder(f"{s3}/sizes/store.zarr", QUICK)
    assert folder.sizes([*names, "zarr.json"]) == [9604] * 4 + [(store.path / "zarr.json").stat().st_size]
    assert folder.sizes([*names, "absent"]) is None
    assert RemoteFolder(f"{s3}/absent/store.zarr", QUICK).sizes(names) is None
    assert RemoteFolder(f"{serve().url}/store.zarr", QUICK).sizes(names) is None


@pytest.mark.parametrize("changes", [{"seen": float("inf")}, {"seen": float("nan")}, {"pid": float("inf")}])
def test_a_claim_that_no_writer_has_written_is_in_nobodys_way(s3, changes):
    folder = put_claim(f"{s3}/odd/store.zarr", **changes)
    with claimed(folder):
        assert json.loads(folder.read(CLAIM))["pid"] == os.getpid()


def test_a_writer_that_is_stopped_while_it_claims_leaves_no_claim(s3, monkeypatch):
    def stop(_seconds):
        raise KeyboardInterrupt

    folder = RemoteFolder(f"{s3}/early/store.zarr", QUICK)
    monkeypatch.setattr("tcsae.store.claim.time.sleep", stop)
    with pytest.raises(KeyboardInterrupt), claimed(folder):
        pass
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        folder.read(CLAIM)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_a_copy_that_is_stopped_says_how_to_go_on_and_leaves_no_claim(make_store, s3, stop):
    store = make_store(torch.zeros(500, 4), [500], rows_per_chunk=1, name="many.zarr")
    url = f"{s3}/{stop.name}/store.zarr"
    command = [sys.executable, "-P", "-m", "tcsae.cli", "store", "copy", str(store.path), url]
    # What a shell puts in the background inherits a SIGINT that is ignored; a terminal's command does not.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    chunk = f"activations/{HOOK}/c/2/0"
    while process.poll() is None:
        try:
            RemoteFolder(url, QUICK).read(chunk)
        except FileNotFoundError:
            time.sleep(0.01)
        else:
            break
    process.send_signal(stop)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    last = said.strip().splitlines()[-1]
    assert last == f"tcsae: {url}: interrupted; what is copied is kept, run the same command with --resume"
    assert "Traceback" not in said
    with pytest.raises(FileNotFoundError):
        RemoteFolder(url, QUICK).read(CLAIM)
    assert json.loads(RemoteFolder(url, QUICK).read("zarr.json"))["attributes"]["complete"] is False
    assert copy_store(store.path, url, resume=True, transfer=QUICK).kept >= 1


def test_a_renewal_sees_that_another_writer_has_taken_over(s3, quick_claims):
    url = f"{s3}/seen/store.zarr"

    def take_over(check) -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            put_claim(url)  # again and again: a renewal that is just being written goes over it
            time.sleep(0.02)
            check(False)

    with claimed(RemoteFolder(url, QUICK)) as check, pytest.raises(StoreBusy, match="process 7 on elsewhere"):
        take_over(check)


def test_a_working_writer_renews_its_claim(s3, quick_claims):
    folder = RemoteFolder(f"{s3}/renewed", QUICK)
    with claimed(folder):
        first = json.loads(folder.read(CLAIM))["seen"]
        until = time.monotonic() + 20
        while json.loads(folder.read(CLAIM))["seen"] == first:
            assert time.monotonic() < until
            time.sleep(0.02)
