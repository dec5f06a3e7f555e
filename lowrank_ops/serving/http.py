"""Serve a model and a directory of adapters over HTTP in OpenAI's format, for ``lowrank-ops serve``.

``/v1/embeddings`` for encoders and ``/v1/completions`` for causal models, where ``model`` is the name of an adapter, or
of the base model for none; ``/v1/models``, ``/health`` and ``/metrics``. Rows of requests that arrive together run in
one forward (:mod:`lowrank_ops.serving.engine`). Any ASGI server can use :func:`load` and :func:`create_app`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from .engine import AdapterError, ClosedError, QueueFullError, UnknownAdapterError
from .load import Service
from .protocol import NEUTRAL, CompletionRequest, EmbeddingRequest, RequestError
from .rows import Completion, Embedding, Row

_LOG = logging.getLogger("lowrank_ops")
Scope = MutableMapping[str, Any]


def create_app(service: Service, drain_seconds: float = 60) -> FastAPI:
    """Create the application over a loaded model.

    At shutdown (lifespan) it finishes accepted requests within ``drain_seconds`` and stops the engine.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.closing = True
        await asyncio.to_thread(service.engine.close, drain_seconds)

    app = FastAPI(title="lowrank-ops serve", lifespan=lifespan)
    app.state.service = service
    app.add_middleware(_Gate, service=service)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return RequestError(400, "the body is not valid JSON").response()
        # Drop "body", and the members of a union that were tried.
        param = next((str(part) for part in first["loc"][1:2]), None)
        if param is None:
            return RequestError(
                400, "the body must be a JSON object, sent as Content-Type: application/json"
            ).response()
        message = first["msg"] if param != "input" and param != "prompt" else (
            "must be a text, a list of texts, a list of token ids or a list of these, none of them empty"
        )  # fmt: skip
        return RequestError(400, f"{param}: {message}", param).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return RequestError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return RequestError(500, "the server failed on this request").response()

    @app.get("/health")
    async def health() -> Response:
        if service.closing or not service.engine.alive:
            raise RequestError(503, "shutting down")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [service.name, *await asyncio.to_thread(service.engine.names)]
        return {"object": "list", "data": [{"id": n, "object": "model", "owned_by": "local"} for n in names]}

    @app.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest) -> Any:
        if service.engine.causal:
            raise RequestError(400, f"{service.name} is a causal model: use /v1/completions", "model")
        adapter = _adapter(service, asked.model)
        ids = await asyncio.to_thread(_ids, service, asked.input, "input", 0)
        rows = [Embedding(adapter, row) for row in ids]
        size = service.engine.model.config.hidden_size
        if asked.dimensions not in (None, size):
            raise RequestError(400, f"dimensions: this model has {size}, and they cannot be cut", "dimensions")
        _submit(service, rows)
        vectors = await _wait(rows, asked.model)
        data = []
        for i, vector in enumerate(vectors):
            value = vector.tolist()
            if asked.encoding_format == "base64":
                value = base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": i, "embedding": value})
        count = sum(map(len, ids))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": asked.model, "usage": usage}

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Any:
        if not service.engine.causal:
            raise RequestError(400, f"{service.name} is an encoder: use /v1/embeddings", "model")
        for name, neutral in NEUTRAL.items():
            if getattr(asked, name) not in neutral:
                raise RequestError(400, f"{name} is not supported", name)
        if asked.stream_options is not None and not asked.stream:
            raise RequestError(400, "stream_options is only for stream=true", "stream_options")
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        if "" in stops:
            raise RequestError(400, "stop: must not be empty", "stop")
        adapter = _adapter(service, asked.model)
        ids = await asyncio.to_thread(_ids, service, asked.prompt, "prompt", asked.max_tokens)
        answer = _Answer(service, asked, adapter, ids, stops)
        _submit(service, answer.rows)
        if not asked.stream:
            return await _unless_gone(request, answer.whole())
        # An error before the first token still gets its own status.
        stream = answer.stream()
        first = await anext(stream)
        return StreamingResponse(_chain(first, stream), media_type="text/event-stream")

    return app


class _Answer:
    """The completions of one request, assembled on the event loop while the engine's thread draws tokens."""

    def __init__(
        self, service: Service, asked: CompletionRequest, adapter: str | None, ids: list[list[int]], stops: list[str]
    ) -> None:
        self.service, self.asked, self.ids = service, asked, ids
        self.events: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(index: int, text: str | None) -> None:
            with suppress(RuntimeError):  # the loop is closed and nobody waits
                loop.call_soon_threadsafe(self.events.put_nowait, (index, text))

        def decode(tokens: list[int]) -> str:
            return service.tokenizer.decode(tokens, skip_special_tokens=True)

        self.rows = [
            Completion(
                adapter,
                row,
                decode=decode,
                on_text=lambda text, i=i: put(i, text),  # type: ignore[misc]
                max_tokens=asked.max_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                # Rows of one request get different seeds; the same seed gives the same answers again.
                seed=None if asked.seed is None else (asked.seed + i) % 2**63,
                stop=stops,
            )
            for i, row in enumerate(ids)
        ]
        for i, row in enumerate(self.rows):
            row.done.add_done_callback(lambda done, i=i: put(i, None))  # type: ignore[misc]
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self.head["model"] = asked.model

    async def _events(self) -> AsyncIterator[tuple[int, str | None]]:
        """Yield pieces of text as they come, and None at the end of each row; leaving early drops the rows."""
        left = len(self.rows)
        try:
            while left:
                index, text = await self.events.get()
                if text is None:
                    left -= 1
                    _raise(self.rows[index].done.exception(), self.asked.model)
                yield index, text
        finally:
            for row in self.rows:
                row.cancelled = True
            self.service.metrics.tokens.labels("completion").inc(sum(len(row.drawn) for row in self.rows))

    def _usage(self) -> dict[str, int]:
        prompt, drawn = sum(map(len, self.ids)), sum(len(row.drawn) for row in self.rows)
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def _choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    async def whole(self) -> dict[str, Any]:
        texts = [""] * len(self.rows)
        async for index, text in self._events():
            texts[index] += text or ""
        choices = [self._choice(i, text, self.rows[i].done.result()) for i, text in enumerate(texts)]
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        options = self.asked.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        events = self._events()
        try:
            async for index, text in events:
                reason = None if text is not None else self.rows[index].done.result()
                yield _event({**self.head, "choices": [self._choice(index, text or "", reason)], **usage})
        except RequestError as error:
            if not any(row.drawn for row in self.rows):
                raise
            yield _event(json.loads(bytes(error.response().body)))
            return
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        if usage:
            yield _event({**self.head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Any]) -> Any:
    """Await the answer, but cancel it when the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise RequestError(499, "the client has left")
        return await work
    finally:
        work.cancel()
        watch.cancel()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def _adapter(service: Service, name: str) -> str | None:
    """The adapter named by a request, None for the base model."""
    if name == service.name:
        return None
    if not name or set(name) & {"/", "\\", "\0"} or name in (".", ".."):
        raise RequestError(400, "model must be a name, not a path", "model")
    try:
        service.engine.find(name)
    except UnknownAdapterError:
        raise _unknown(name) from None
    return name


def _unknown(name: str) -> RequestError:
    return RequestError(404, f"the model {name[:128]!r} does not exist", "model", "model_not_found")


def _ids(service: Service, given: Any, param: str, more: int) -> list[list[int]]:
    """The token ids of every input; ``more`` further tokens must fit after each."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    limits = service.limits
    if len(given) > limits.max_inputs:
        raise RequestError(400, f"{param}: at most {limits.max_inputs} inputs, got {len(given)}", param)
    try:
        ids = service.tokenize(given) if isinstance(given[0], str) else given
    except (TypeError, ValueError):  # half of a surrogate pair, "\ud800"
        raise RequestError(400, f"{param}: not every input is valid Unicode", param) from None
    for row in ids:
        if not row:
            raise RequestError(400, f"{param}: an input has no tokens", param)
        if len(row) + more > limits.max_tokens:
            got = f"{len(row)}" + (f" and max_tokens {more}" if more else "")
            message = f"{param}: this model takes at most {limits.max_tokens} tokens, got {got}"
            raise RequestError(400, message, param, "context_length_exceeded")
        if min(row) < 0 or max(row) >= service.vocabulary:
            raise RequestError(400, f"{param}: token ids must be in [0, {service.vocabulary})", param)
    return ids


def _submit(service: Service, rows: Sequence[Row]) -> None:
    try:
        service.engine.submit(rows)
    except QueueFullError:
        raise RequestError(429, "too many requests wait; try again soon", code="queue_full") from None
    except ClosedError:
        raise RequestError(503, "shutting down") from None
    except UnknownAdapterError as error:
        raise _unknown(str(error)) from None
    service.metrics.tokens.labels("prompt").inc(sum(len(row.ids) for row in rows))


async def _wait(rows: Sequence[Row], model: str) -> list[Any]:
    """Wait for the results of all rows; a client that leaves cancels them."""
    try:
        results = await asyncio.gather(*(asyncio.wrap_future(row.done) for row in rows), return_exceptions=True)
    except asyncio.CancelledError:
        for row in rows:
            row.cancelled = True
        raise
    for result in results:
        _raise(result if isinstance(result, BaseException) else None, model)
    return results


def _raise(error: BaseException | None, model: str) -> None:
    if isinstance(error, UnknownAdapterError):
        raise _unknown(model)
    if isinstance(error, AdapterError):
        raise RequestError(500, f"the adapter {model!r} cannot be loaded; the server's log says why", "model")
    if error is not None:
        _LOG.error("a forward failed", exc_info=error)
        raise RequestError(500, "the model failed on this request")


class _Gate:
    """Wrap the application: refuse requests that are too large or too late, count and time the others."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics, began = self.service.metrics, time.perf_counter()
        # Use only existing paths as labels, so that clients cannot invent labels.
        paths = ("/v1/embeddings", "/v1/completions", "/v1/models", "/health", "/metrics")
        path = scope["path"] if scope["path"] in paths else "other"
        status, read, most = 500, 0, self.service.limits.max_body_bytes
        too_large = f"the body must be at most {most} bytes"

        async def counted_receive() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, too_large)
            return message

        async def noted_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        work = path in ("/v1/embeddings", "/v1/completions")
        metrics.running.inc(work)
        try:
            length = dict(scope["headers"]).get(b"content-length", b"")
            if self.service.closing and work:
                await RequestError(503, "shutting down").response()(scope, receive, noted_send)
            elif length.isdigit() and int(length) > most:
                await RequestError(413, too_large).response()(scope, receive, noted_send)
            else:
                await self.app(scope, counted_receive, noted_send)
        finally:
            metrics.running.dec(work)
            metrics.requests.labels(path, str(status)).inc()
            metrics.seconds.labels(path).observe(time.perf_counter() - began)


# ---- the process ----


class Server(uvicorn.Server):
    """At the first signal refuse new requests with 503, finish accepted ones, then stop. At the second stop at once."""

    def __init__(self, service: Service, host: str, port: int, drain_seconds: float) -> None:
        app = create_app(service, drain_seconds)
        super().__init__(uvicorn.Config(app, host, port, access_log=False, timeout_graceful_shutdown=5))
        self.service, self.drain_seconds = service, drain_seconds

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
