"""The server of ``lowrank-ops serve`` on many machines: a Ray Serve deployment with model multiplexing.

    pip install "lowrank-ops[ray]"
    python examples/ray_serve.py MODEL_DIR --adapters DIR --replicas 4

A front reads ``model`` from a request and asks for a replica by that name; Ray sends it to a replica that has used the
adapter before, if there is one. Each replica runs the whole application (``lowrank_ops.server.create_app``) over its
own copy of the model, so requests with different adapters still share forwards, and answers equal a single server's.
Both directories must be at the same path on every machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

# How many adapters Ray assigns to a replica; the pool decides by bytes which are in memory.
ADAPTERS_PER_REPLICA = 256
MAX_BODY_BYTES = 4 << 20


@serve.deployment(max_ongoing_requests=256)
class Replica:
    """A copy of the model with the application around it."""

    def __init__(self, model: str, adapters: str | None, options: dict[str, Any]) -> None:
        from lowrank_ops import server

        self.service = server.load(model, adapters, **options)
        self.app = server.create_app(self.service)

    @serve.multiplexed(max_num_models_per_replica=ADAPTERS_PER_REPLICA)
    async def adapter(self, name: str) -> str:
        """Tell Ray that the adapter belongs to this replica; the engine loads it with its first row."""
        return name

    async def call(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> AsyncIterator[Any]:
        """Yield the application's answer to a request: its status and headers, then its body in pieces."""
        if name := serve.get_multiplexed_model_id():
            await self.adapter(name)
        sent: asyncio.Queue[Any] = asyncio.Queue()
        given, left = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not given.is_set():
                given.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": headers, "client": None, "server": None,
        }  # fmt: skip
        work = asyncio.create_task(self.app(scope, receive, sent.put))
        work.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    where = (b"x-replica", serve.get_replica_context().replica_id.unique_id.encode())
                    yield message["status"], [where, *message["headers"]]
                elif message.get("body"):
                    yield message["body"]
        finally:
            left.set()

    def check_health(self) -> None:
        if not self.service.engine.alive:
            raise RuntimeError("the engine has stopped")

    async def __del__(self) -> None:
        await asyncio.to_thread(self.service.engine.close)


@serve.deployment(max_ongoing_requests=1024)
class Front:
    """Send each request to a replica by the adapter it names."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self.replicas = replicas.options(method_name="call", stream=True)

    async def __call__(self, request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                error = {"message": f"the body must be at most {MAX_BODY_BYTES} bytes", "type": "invalid_request_error"}
                return JSONResponse({"error": error | {"param": None, "code": None}}, 413)
        pieces = self.replicas.options(multiplexed_model_id=_model(body)).remote(
            request.method, request.url.path, request.headers.raw, body
        )
        status, headers = await anext(pieces)
        response = StreamingResponse(pieces, status)
        response.raw_headers = headers
        return response


def _model(body: bytes) -> str:
    """Read the adapter's name, "" if there is none; the application checks it."""
    try:
        name = json.loads(body)["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    # Names that no adapter can have would only fill Ray's table of replicas.
    return name if isinstance(name, str) and name.isascii() and name.isprintable() and len(name) <= 128 else ""


def application(model: str, adapters: str | None, replicas: int = 1, **options: Any) -> serve.Application:
    """Make the application for ``serve.run``.

    Args:
        replicas: copies of the model; Ray places them where there is room.
        options: options of :func:`lowrank_ops.server.load`.
    """
    return Front.bind(Replica.options(num_replicas=replicas).bind(model, adapters, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("--adapters", metavar="DIR")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--pool-mb", type=int, default=1024)
    arguments = parser.parse_args()
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(
        application(arguments.model, arguments.adapters, arguments.replicas, capacity_bytes=arguments.pool_mb << 20)
    )
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
