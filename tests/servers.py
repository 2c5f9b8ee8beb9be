"""Servers on this machine: moto's S3 in a process of its own, and a folder behind HTTP that can misbehave."""

from __future__ import annotations

import datetime
import functools
import http.server
import ipaddress
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


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
        scheme = "https" if isinstance(self.socket, ssl.SSLSocket) else "http"
        return f"{scheme}://127.0.0.1:{self.server_address[1]}"


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


@contextmanager
def serving(folder: Path, certificate: Path | None = None, **faults: object) -> Iterator[Server]:
    """Serve ``folder`` for the block; over TLS with a ``certificate`` of `make_certificate`."""
    server = Server(folder, **faults)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def make_certificate(path: Path) -> Path:
    """Write a key and a certificate for 127.0.0.1 that is signed by itself."""
    x509 = pytest.importorskip("cryptography.x509", reason="needs tcsae[dev]")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(here, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, form, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


class Relay(socketserver.ThreadingTCPServer):
    """Passes bytes on to a server; the first ``bad`` connections that ask for a chunk are cut, or get no answer."""

    daemon_threads = True

    def __init__(self, target: str, bad: int, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), RelayHandler)
        parts = urllib.parse.urlsplit(target)
        self.target = (parts.hostname, parts.port)
        self.left = bad
        self.fault = fault
        self.spoilt = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def spoils(self, request: bytes) -> bool:
        """Whether the connection that sends ``request`` is one of the bad ones."""
        with self.lock:
            bad = self.left > 0 and b"/activations/" in request.split(b"\r\n", 1)[0]
            self.left -= bad
            self.spoilt += bad
            return bad

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class RelayHandler(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(self.server.target) as onward:
            back = threading.Thread(target=self.pass_on, args=(onward, self.request), daemon=True)
            back.start()
            with suppress(OSError):
                while piece := self.request.recv(1 << 16):
                    if self.server.spoils(piece):
                        if self.server.fault == "late":
                            self.server.stopping.wait(10)
                        break
                    onward.sendall(piece)
            for end in (self.request, onward):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            back.join(timeout=5)

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)


@contextmanager
def relaying(target: str, bad: int, fault: str = "drop") -> Iterator[Relay]:
    """Put a `Relay` before the server at ``target`` for the block."""
    relay = Relay(target, bad, fault)
    thread = threading.Thread(target=relay.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield relay
    finally:
        relay.stopping.set()
        relay.shutdown()
        relay.server_close()
        thread.join(timeout=5)


@contextmanager
def moto_server() -> Iterator[str]:
    """Run moto's S3 server for the block: yields the URL of an empty bucket; the environment leads to it."""
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
