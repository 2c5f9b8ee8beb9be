"""Stores elsewhere: a real S3 server and a real HTTP server on this machine, also ones that fail.

Every request has a time limit of a few seconds here, so that a server that hangs fails a test soon.
"""

from __future__ import annotations

import functools
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from tcsae.store import ActivationStore
from tcsae.store.copy import copy_store
from tcsae.store.errors import ConfigError, RemoteError, StoreCorrupt, StoreNotFound
from tcsae.store.remote import RemoteFolder, Transfer

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


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; the first ``bad`` answers of each chunk are dropped half-way, or come late."""

    def __init__(self, folder: Path, bad: int = 0, fault: str = "drop") -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.bad = bad
        self.fault = fault
        self.asked: list[str] = []
        self.stopping = threading.Event()

    def handle_error(self, request, client_address):
        """A client that gave up on a late answer is what these tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        self.server.asked.append(self.path)
        if "/c/" in self.path and self.server.asked.count(self.path) <= self.server.bad:
            if self.server.fault == "late":
                self.server.stopping.wait(10)
                return
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(store):
    servers = []

    def start(**faults) -> Server:
        server = Server(store.path.parent, **faults)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


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


def test_nothing_at_the_address(serve):
    with pytest.raises(StoreNotFound, match="nothing there"):
        ActivationStore.open(f"{serve().url}/other.zarr")


def test_http_cannot_be_written_to(store, serve):
    with pytest.raises(ConfigError, match="cannot be written"):
        copy_store(store.path, f"{serve().url}/copy.zarr")


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


# S3


@pytest.fixture(scope="module")
def s3():
    """Moto's server in a process of its own, with an empty bucket called lab."""
    pytest.importorskip("s3fs", reason="needs tcsae[s3]")
    pytest.importorskip("moto.server", reason="needs tcsae[dev]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    names = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in names.items():
            environment.setenv(name, value)
        try:
            _wait_for(url, server)
            urllib.request.urlopen(urllib.request.Request(f"{url}/lab", method="PUT"), timeout=10).close()
            yield "s3://lab"
        finally:
            server.terminate()
            server.wait(timeout=10)


def _wait_for(url: str, server: subprocess.Popen) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("moto's server did not start within 30 s")


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


def test_a_bucket_that_does_not_exist_is_one_line(store, s3):
    with pytest.raises(RemoteError, match="no-such-bucket"):
        copy_store(store.path, "s3://no-such-bucket/store.zarr", transfer=QUICK)
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1")
