"""The endpoints under /v1: completions, embeddings and the list of models."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from .answers import Answer, chain, find_adapter, submit, token_ids, wait
from .load import Service
from .parse import BoundedRoute
from .protocol import NEUTRAL, CompletionRequest, EmbeddingRequest, RequestError
from .rows import Embedding


def make_router(service: Service) -> APIRouter:
    """Create the endpoints over a loaded model."""
    router = APIRouter(route_class=BoundedRoute)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [service.name, *await asyncio.to_thread(service.engine.names)]
        return {"object": "list", "data": [{"id": n, "object": "model", "owned_by": "local"} for n in names]}

    @router.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest) -> Any:
        if service.engine.causal:
            raise RequestError(400, f"{service.name} is a causal model: use /v1/completions", "model")
        adapter = find_adapter(service, asked.model)
        ids = await token_ids(service, asked.input, "input", 0)
        rows = [Embedding(adapter, row) for row in ids]
        size = service.engine.model.config.hidden_size
        if asked.dimensions not in (None, size):
            raise RequestError(400, f"dimensions: this model has {size}, and they cannot be cut", "dimensions")
        submit(service, rows)
        vectors = await wait(rows, asked.model)
        data = []
        for i, vector in enumerate(vectors):
            value = vector.tolist()
            if asked.encoding_format == "base64":
                value = base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": i, "embedding": value})
        count = sum(map(len, ids))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": asked.model, "usage": usage}

    @router.post("/v1/completions")
    async def completions(asked: CompletionRequest) -> Any:
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
        adapter = find_adapter(service, asked.model)
        ids = await token_ids(service, asked.prompt, "prompt", asked.max_tokens)
        answer = Answer(service, asked, adapter, ids, stops)
        submit(service, answer.rows)
        if not asked.stream:
            return await answer.whole()
        # An error before the first token still gets its own status.
        stream = answer.stream()
        first = await anext(stream)
        return StreamingResponse(chain(first, stream), media_type="text/event-stream")

    return router
