"""Connections of the command's process: half requests, slow and absent clients, their number, TLS."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_helpers import Held, wait_for

httpx = pytest.importorskip("httpx")
process = pytest.importorskip("lowrank_ops.serving.process")
from lowrank_ops.serving.load import ServeError, load  # noqa: E402


@contextmanager
def running(made: Any, **options: Any) -> Iterator[tuple[Any, int]]:
    """The process of the command, in a thread."""
    server = process.Server(made, port=0, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def live(causal_model: str) -> Iterator[Any]:
    made = load(causal_model, None, capacity_bytes=1 << 20, name="base", max_queue=64)
    with running(made) as (server, port):
        yield SimpleNamespace(service=made, server=server, port=port, limits=made.limits)


@pytest.fixture
def connect(live: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Opens connections that have sent something; limits and the interval of the sweep are the test's."""
    monkeypatch.setattr(process, "SWEEP_SECONDS", 0.05)
    opened = []

    def open_one(sent: bytes) -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", live.port), timeout=20))
        opened[-1].sendall(sent)
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()
    live.service.limits = live.limits
    wait_for(lambda: not live.server.clients)


def read_all(connection: socket.socket) -> bytes:
    got = b""
    try:
        while piece := connection.recv(65536):
            got += piece
    except ConnectionResetError:
        pass
    return got


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 0),
        (HEAD + b"X: ", 0),
        (HEAD + b"Content-Length: 10\r\n\r\n{", 0),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n", 0),
        (b"\x16\x03\x01 not HTTP\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000, 400),
        (HEAD + b"Content-Length: 99999999\r\n\r\n", 413),
        (HEAD.replace(b"localhost", b"evil.example") + b"Content-Length: 10\r\n\r\n{", 400),
    ],
    ids=[
        "nothing",
        "half a header",
        "half a body",
        "half a chunk",
        "no HTTP",
        "a huge header",
        "a huge body",
        "a host",
    ],
)
def test_half_requests_end(live: Any, connect: Any, sent: bytes, status: int) -> None:
    live.service.limits = replace(live.limits, read_seconds=0.3)
    head, _, body = read_all(connect(sent)).partition(b"\r\n\r\n")
    if not status:
        assert head == b""  # nobody listens
        return
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.1\r\n", HEAD + b"Content-Length: 1000\r\n\r\n"])
def test_what_trickles_ends(live: Any, connect: Any, sent: bytes) -> None:
    live.service.limits = replace(live.limits, read_seconds=0.4, body_seconds=0.4)
    one = connect(sent)
    one.settimeout(0.05)
    got = b""
    for _ in range(200):
        try:
            one.sendall(b"X: a\r\n")
            got += one.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            break
        if got:
            break
    assert got.startswith(b"HTTP/1.1 408 "), got


def test_every_request_of_a_connection_has_its_own_time(live: Any, connect: Any) -> None:
    one = connect(b"")
    wait_for(lambda: live.server.server_state.connections)
    (connection,) = live.server.server_state.connections
    times = [connection._since]
    for _ in range(5):
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert one.recv(65536).startswith(b"HTTP/1.1 200 ")
        wait_for(lambda: not connection._is_answering())
        times.append(connection._since)
    assert len(set(times)) == 6


def test_a_client_that_reads_nothing_ends(live: Any, connect: Any) -> None:
    live.service.limits = replace(live.limits, read_seconds=0.3)
    one = connect(b"")
    one.setblocking(False)
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    try:
        for _ in range(20_000):
            one.send(ask)
    except BlockingIOError:
        pass
    wait_for(lambda: not live.server.clients)


def test_connections_of_a_client(live: Any, connect: Any) -> None:
    live.service.limits = replace(live.limits, client_connections=2)
    first, second = connect(b""), connect(b"")
    wait_for(lambda: live.server.clients.total() == 2)
    assert read_all(connect(b"")).startswith(b"HTTP/1.1 429 ")
    live.service.limits = replace(live.limits, connections=2)
    assert read_all(connect(b"")).startswith(b"HTTP/1.1 503 ")
    first.close()
    wait_for(lambda: live.server.clients.total() == 1)
    connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    second.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert read_all(second).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_a_client_that_left_leave_the_queue(live: Any, connect: Any, stream: bool) -> None:
    held = Held(live.service.engine)

    def send(count: int) -> socket.socket:
        body = json.dumps({"model": "base", "prompt": ["a"] * count, "max_tokens": 2, "stream": stream}).encode()
        return connect(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    try:
        first = send(1)
        assert held.entered.wait(30)
        gone = send(64)
        wait_for(lambda: live.service.engine.queued == 64)
        gone.close()
        wait_for(lambda: live.service.engine.queued == 0)
        last = send(64)
        wait_for(lambda: live.service.engine.queued == 64)
        last.close()
        first.close()
    finally:
        held.release()
    wait_for(lambda: not live.service.engine.queued and not live.service.engine._running)


def test_tls(small_model: str, tmp_path: Path, live: Any) -> None:
    make_certificate(tmp_path)
    for certificate, key in (("none.pem", None), ("key.pem", "certificate.pem"), ("certificate.pem", None)):
        with pytest.raises(ServeError, match="--tls-certificate"):
            process.Server(live.service, certificate=tmp_path / certificate, key=key and tmp_path / key)
    made = load(small_model, None, capacity_bytes=1 << 20)
    files = {"certificate": tmp_path / "certificate.pem", "key": tmp_path / "key.pem"}
    with running(made, **files) as (_, port):
        context = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
        assert httpx.get(f"https://localhost:{port}/health", verify=context).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/health")


def make_certificate(folder: Path) -> None:
    from datetime import UTC, datetime, timedelta

    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    (folder / "certificate.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
