"""The gate in front of the application: who may ask, how much each client may hold, and for how long.

A request passes the gate when its Host header and its key are right and its body has arrived whole, in time and within
the limits. The gate cancels a request whose client leaves or whose time is over, so no endpoint needs to look.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.middleware.trustedhost import TrustedHostMiddleware

from .load import Service
from .protocol import RequestError

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]
T = TypeVar("T")

OPEN = "/health"  # the only path that needs no key and no name, since probes of a supervisor have neither
LONG = 1 << 16  # characters or bytes from which parsing and tokenising are done in turns


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        keys: a request needs one of them as ``Authorization: Bearer KEY``; none: no request needs a key.
        hosts: allowed names in the Host header, ``"*.example.com"`` for all below a domain; none: any.
        origins: web pages that may ask from a browser, such as ``"https://example.com"``, or ``"*"``.
        plain_hosts: a name without a dot is allowed in the Host header too; no public web site has one.

    Raises:
        ValueError: a key or a host cannot occur in a request.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    plain_hosts: bool = False

    def __post_init__(self) -> None:
        for key in self.keys:
            if not key.isascii() or not key.isprintable() or not key or " " in key:
                raise ValueError("a key must be of printable ASCII characters without a space, and not empty")
        for host in self.hosts:
            if not _is_host(host):
                raise ValueError(
                    f"an allowed host must be a name or an address without scheme and port, *.example.com or *, got {host!r}"
                )


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return host == "*" or re.fullmatch(r"(\*\.)?[A-Za-z0-9._-]+", host) is not None
    return True


@dataclass
class Client:
    """What the requests of one client hold at the moment."""

    name: str
    requests: int = 0
    rows: int = 0
    bytes: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class _Request:
    """What one request holds; given back when it ends."""

    gate: Gate
    client: Client
    rows: int = 0
    bytes: int = 0

    def add_bytes(self, count: int) -> None:
        limits, gate = self.gate.service.limits, self.gate
        self.bytes += count
        self.client.bytes += count
        gate.bytes += count
        if self.bytes > limits.max_body_bytes:
            raise _too_large(limits.max_body_bytes)
        for held, most, whose in (
            (self.client.bytes, limits.client_body_bytes, "of this client"),
            (gate.bytes, limits.bodies_bytes, "of all clients"),
        ):
            if held > most:
                message = f"the bodies of the requests {whose} together must be at most {most} bytes; try again soon"
                raise RequestError(429, message, code="too_many_bytes")

    def end(self) -> None:
        self.client.requests -= 1
        self.client.rows -= self.rows
        self.client.bytes -= self.bytes
        self.gate.bytes -= self.bytes
        if not self.client.requests:
            del self.gate.clients[self.client.name]


_REQUEST: ContextVar[_Request] = ContextVar("lowrank_ops_request")


def count_rows(count: int) -> None:
    """Count rows for the client of the running request until the request ends.

    Raises:
        RequestError: 429, the client would have more than ``Limits.client_rows``.
    """
    request = _REQUEST.get(None)
    if request is None:
        return
    most = request.gate.service.limits.client_rows
    if request.client.rows + count > most:
        message = f"at most {most} inputs of one client may wait or run, got {request.client.rows + count}"
        raise RequestError(429, message, code="too_many_inputs")
    request.rows += count
    request.client.rows += count


async def in_turn(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """Run work off the event loop; long work, by its size in characters, runs in a thread that clients take in turns.

    A client has one such piece of work at a time, so that it delays another client by one piece at most.
    """
    request = _REQUEST.get(None)
    if request is None or size < LONG:
        return await asyncio.to_thread(work, *arguments)
    turn = request.client.turn
    await turn.acquire()
    running = asyncio.get_running_loop().run_in_executor(request.gate.long, work, *arguments)

    def ended(done: asyncio.Future[T]) -> None:
        turn.release()
        if not done.cancelled():
            done.exception()  # marks it as seen, if the request has ended meanwhile

    # A thread cannot be stopped, so the turn lasts until its end, even if the request ends earlier.
    running.add_done_callback(ended)
    return await asyncio.shield(running)


def client_name(address: str | None) -> str:
    """The name under which an address is counted: of IPv6 the network of 64 bits, which is one user's."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return address or ""
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)


class Gate:
    """ASGI middleware; counts and times requests for the metrics."""

    def __init__(self, app: Application, service: Service, access: Access, paths: Set[str]) -> None:
        self.app, self.service, self.access, self.paths = app, service, access, paths
        self.clients: dict[str, Client] = {}
        self.bytes = 0
        self.long = ThreadPoolExecutor(1, "lowrank-ops-long")
        self._keys = [hashlib.sha256(key.encode()).digest() for key in access.keys]

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics, began = self.service.metrics, time.perf_counter()
        path = scope["path"]
        # Use only existing paths as labels, so that clients cannot invent labels.
        label = path if path in self.paths else "other"
        status, ended = 499, False  # what the metrics show if the client leaves before an answer begins

        async def noted_send(message: Any) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                ended = True
            await send(message)

        work = path.startswith("/v1/") and scope["method"] == "POST"
        metrics.running.inc(work)
        try:
            name = await self._admit(scope, work)
            await self._pass(name, scope, receive, noted_send, lambda: ended)
        except RequestError as error:
            if status == 499:
                await error.response()(scope, receive, noted_send)
        except Exception:
            status = 500
            raise
        finally:
            metrics.running.dec(work)
            metrics.requests.labels(label, str(status)).inc()
            metrics.seconds.labels(label).observe(time.perf_counter() - began)

    async def _admit(self, scope: Scope, work: bool) -> str:
        """Check what the header of a request says; return the name of its client."""
        headers = dict(scope["headers"])
        is_open = scope["path"] == OPEN
        if self.access.hosts and not is_open and not await self._is_allowed_host(scope):
            raise RequestError(400, "the name in the Host header is not one of this server (--allowed-host)")
        client = scope.get("client") or (None,)
        name = client_name(client[0])
        if self._keys and not is_open:
            number = self._key_number(headers.get(b"authorization", b""))
            if number is None:
                message = "a valid key is needed, as Authorization: Bearer KEY"
                raise RequestError(401, message, code="invalid_api_key")
            name = f"key {number}"
        if self.service.closing and work:
            raise RequestError(503, "shutting down")
        length, most = headers.get(b"content-length", b""), self.service.limits.max_body_bytes
        if length.isdigit() and int(length) > most:
            raise _too_large(most)
        return name

    async def _is_allowed_host(self, scope: Scope) -> bool:
        passed = False
        name = dict(scope["headers"]).get(b"host", b"")
        if self.access.plain_hosts and name and not set(name) & set(b".["):
            return True

        async def accept(*_: Any) -> None:
            nonlocal passed
            passed = True

        async def ignore(message: Any) -> None:
            pass

        # Starlette's middleware decides; its own answer is plain text, so it is dropped.
        hosts = TrustedHostMiddleware(accept, self.access.hosts, www_redirect=False)
        await hosts(scope, ignore, ignore)  # type: ignore[arg-type]
        return passed

    def _key_number(self, authorization: bytes) -> int | None:
        """The index of the key in a header; compares all keys, so that the time tells nothing about them."""
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        found = [i for i, known in enumerate(self._keys) if hmac.compare_digest(given, known)]
        return found[0] if found and scheme.lower() == b"bearer" else None

    async def _pass(self, name: str, scope: Scope, receive: Any, send: Any, ended: Callable[[], bool]) -> None:
        """Read the body, and run the application until it answers, the client leaves or the time is over."""
        client = self.clients.setdefault(name, Client(name))
        client.requests += 1
        request = _Request(self, client)
        token = _REQUEST.set(request)
        limits = self.service.limits
        try:
            try:
                async with asyncio.timeout(limits.body_seconds):
                    body = await _body(receive, request)
            except TimeoutError:
                message = f"the body must arrive within {limits.body_seconds:g} seconds"
                raise RequestError(408, message, code="timeout") from None
            if body is None:  # the client has left
                return
            left = asyncio.create_task(_leaves(receive))
            answer = asyncio.ensure_future(self.app(scope, _given(body, left), send))
            try:
                tasks: set[asyncio.Future[Any]] = {answer, left}
                await asyncio.wait(tasks, timeout=limits.request_seconds, return_when=asyncio.FIRST_COMPLETED)
                if answer.done() or ended():
                    await answer
                elif not left.done():
                    message = f"the answer took more than {limits.request_seconds:g} seconds"
                    raise RequestError(504, message, code="timeout")
            finally:
                for task in (answer, left):
                    task.cancel()
                await asyncio.gather(answer, left, return_exceptions=True)
        finally:
            _REQUEST.reset(token)
            request.end()


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"the body must be at most {most} bytes")


async def _body(receive: Any, request: _Request) -> bytes | None:
    """The whole body, or None if the client leaves."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        request.add_bytes(len(message.get("body", b"")))
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


async def _leaves(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _given(body: bytes, left: asyncio.Task[None]) -> Callable[[], Awaitable[Any]]:
    """A ``receive`` that gives the body at once, and then waits until the client leaves."""
    rest: list[bytes] = [body]

    async def receive() -> Any:
        if rest:
            return {"type": "http.request", "body": rest.pop(), "more_body": False}
        await asyncio.shield(left)
        return {"type": "http.disconnect"}

    return receive
