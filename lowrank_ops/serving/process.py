"""The process of ``lowrank-ops serve``: uvicorn with limits of connections, TLS, and an end that finishes requests."""

from __future__ import annotations

import asyncio
import functools
import http
import resource
import ssl
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .gate import Access, client_name
from .http import create_app
from .load import ServeError, Service
from .protocol import RequestError

SWEEP_SECONDS = 1.0
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")


class Server(uvicorn.Server):
    """At the first signal refuse new requests with 503, finish accepted ones, then stop. At the second stop at once.

    Args:
        service: what :func:`lowrank_ops.serving.load.load` returned.
        host: address to listen at.
        port: 0 takes a free one.
        drain_seconds: time for accepted requests after the first signal.
        access: who may ask; with no ``hosts``, and an address of this machine alone, the names of this machine.
        certificate: file of the TLS certificate and its chain, in PEM; None: no TLS.
        key: file of the certificate's key; None: it is in the certificate's file.
        proxies: addresses of proxies in front, whose X-Forwarded-For names the client; with them only the proxy limits
            the connections of each client.

    Raises:
        ServeError: the certificate or its key cannot be used.
    """

    def __init__(
        self,
        service: Service,
        host: str = "127.0.0.1",
        port: int = 8000,
        drain_seconds: float = 60,
        access: Access | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        proxies: Sequence[str] = (),
    ) -> None:
        access = access or Access()
        if not access.hosts and host in LOCAL:
            # A page of another site whose name leads to 127.0.0.1 could ask otherwise.
            access = replace(access, hosts=LOCAL, plain_hosts=True)
        self.service, self.drain_seconds = service, drain_seconds
        self.clients: Counter[str] = Counter()
        config = uvicorn.Config(
            create_app(service, drain_seconds, access),
            host,
            port,
            http=functools.partial(_Connection, self, bool(proxies)),  # type: ignore[arg-type]
            ws="none",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies),
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise ServeError(f"--tls-certificate {certificate} with --tls-key {key} cannot be used: {error}") from error
        super().__init__(config)

    def run(self, *arguments: Any) -> None:
        # Connections beyond the limit of open files would wait without an answer.
        wanted, (soft, hard) = self.service.limits.connections + 256, resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        super().run(*arguments)

    async def startup(self, *arguments: Any, **named: Any) -> None:
        await super().startup(*arguments, **named)
        self._sweeping = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for connection in list(self.server_state.connections):
                if isinstance(connection, _Connection):
                    connection.check(time.monotonic())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.closing:
            super().handle_exit(sig, frame)
            return
        self.service.closing = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        began = time.monotonic()
        while self._running() and time.monotonic() - began < self.drain_seconds:
            time.sleep(0.05)
        self.should_exit = True

    def _running(self) -> float:
        return self.service.metrics.registry.get_sample_value("lowrank_ops_requests_running") or 0


class _Connection(H11Protocol):
    """A connection that is refused beyond the limits, and closed when its peer neither sends nor reads.

    uvicorn times only a connection that has had an answer; here every connection is looked at once in SWEEP_SECONDS.
    """

    def __init__(self, server: Server, proxied: bool, **named: Any) -> None:
        super().__init__(**named)
        self._owner, self._proxied = server, proxied
        self._name = ""
        self._since = self._moved = time.monotonic()
        self._heard, self._unsent = float("-inf"), 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limits, clients = self._owner.service.limits, self._owner.clients
        self._name = client_name(self.client[0] if self.client else None)
        clients[self._name] += 1
        if clients.total() > limits.connections:
            self._refuse(RequestError(503, f"at most {limits.connections} connections", code="too_many_connections"))
        elif clients[self._name] > limits.client_connections and not self._proxied:
            message = f"at most {limits.client_connections} connections of one client"
            self._refuse(RequestError(429, message, code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        clients = self._owner.clients
        clients[self._name] -= 1
        if not clients[self._name]:
            del clients[self._name]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        super().data_received(data)

    def check(self, now: float) -> None:
        """Close the connection if its peer has been silent in a request, or has read nothing of an answer, for too long."""
        most = self._owner.service.limits.read_seconds
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._moved = now
        self._unsent = unsent
        if now - self._moved > most:
            self.transport.abort()
        elif self._is_answering():
            self._since = now  # the gate times a body that comes, and the answer
            if self.cycle.more_body and not self.flow.read_paused and now - self._heard > most:
                self.transport.close()
        elif now - self._since > most:
            if self.transport.is_closing():
                self.transport.abort()
            elif now - self._heard < most / 2 and self.conn.our_state is h11.IDLE:
                self._refuse(RequestError(408, f"a header must arrive within {most:g} seconds", code="timeout"))
            else:  # nobody listens, or the rest of a body does not come after its answer
                self.transport.close()

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestError(400, "this is not HTTP, or its header is too large"))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: RequestError) -> None:
        """Answer outside of any request, and close."""
        if not self._is_answering():
            answer = error.response()
            head = [f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}".encode(), b"connection: close"]
            head += [name + b": " + value for name, value in answer.raw_headers if name != b"connection"]
            self.transport.write(b"\r\n".join([*head, b"", bytes(answer.body)]))
        self.transport.close()
