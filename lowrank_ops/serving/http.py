"""Serve a model and a directory of adapters over HTTP in OpenAI's format, for ``lowrank-ops serve``.

``/v1/embeddings`` for encoders and ``/v1/completions`` for causal models, where ``model`` is the name of an adapter, or
of the base model for none; ``/v1/models``, ``/health`` and ``/metrics``. Rows of requests that arrive together run in
one forward (:mod:`lowrank_ops.serving.engine`). Any ASGI server can use :func:`load` and :func:`create_app`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from .endpoints import make_router
from .load import Service
from .protocol import RequestError

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

    app.include_router(make_router(service))
    return app


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
