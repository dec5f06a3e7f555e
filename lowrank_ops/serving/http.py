"""Serve a model and a directory of adapters over HTTP in OpenAI's format, for ``lowrank-ops serve``.

``/v1/embeddings`` for encoders, ``/v1/completions`` and ``/v1/chat/completions`` for causal models, where ``model`` is the
name of an adapter, or of the base model for none; the list of models, ``/health`` and ``/metrics``. Rows of requests that
arrive together run in one forward (:mod:`lowrank_ops.serving.engine`). Any ASGI server can use :func:`load` and
:func:`create_app`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .endpoints import make_router
from .gate import Access, Gate
from .health import Health
from .load import Service
from .protocol import RequestError


def create_app(service: Service, drain_seconds: float = 60, access: Access | None = None) -> FastAPI:
    """Create the application over a loaded model.

    At shutdown (lifespan) it finishes accepted requests within ``drain_seconds`` and stops the engine. ``access`` says
    who may ask; without it everybody may.
    """
    access = access or Access()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.closing = True
        await asyncio.to_thread(service.engine.close, drain_seconds)

    app = FastAPI(title="lowrank-ops serve", lifespan=lifespan)
    app.state.service = service
    works = Health(service)
    router = make_router(service)
    paths = {"/health", "/metrics", *(route.path for route in router.routes)}  # type: ignore[attr-defined]
    app.add_middleware(Gate, service=service, access=access, paths=paths)
    if access.origins:
        # Outside of the gate, because a browser asks first without a key, and must be able to read refusals.
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=["Authorization"]
        )

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
        return RequestError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param).response()

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
        if not await works.is_good():
            raise RequestError(503, "the model fails on every request")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    app.include_router(router)
    return app
