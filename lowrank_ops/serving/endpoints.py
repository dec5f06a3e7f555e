"""The endpoints for models: completions, chat, embeddings, tokens and the list of models."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, StreamingResponse

from . import chat
from .answers import Answer, ChatAnswer
from .engine import UnknownAdapterError
from .gate import in_turn
from .grammar import EXTRA, GrammarError
from .intake import check_ids, find_adapter, find_adapters, submit, token_ids, tokenized, wait
from .load import Service
from .mixtures import Adapters
from .parse import BoundedRoute
from .protocol import RequestError
from .requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    DrawingRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    Message,
    NamedTool,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from .rows import Embedding
from .tools import Calls, Format

_LOG = logging.getLogger("lowrank_ops")


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
        adapter = find_adapters(service, asked)
        ids = await token_ids(service, asked.input, "input", 0)
        rows = [Embedding(adapter, row) for row in ids]
        size = service.engine.pooling.size(service.engine.model.config.hidden_size)
        if asked.dimensions not in (None, size):
            raise RequestError(400, f"dimensions: this model has {size}, and they cannot be cut", "dimensions")
        submit(service, rows)
        vectors = await wait(rows)
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
        adapter = _check(service, asked)
        if asked.best_of not in (None, asked.n):
            raise RequestError(400, f"best_of must equal n, {asked.n}, got {asked.best_of}", "best_of")
        if not asked.max_tokens and not asked.echo:
            raise RequestError(400, "max_tokens must be at least 1, or 0 with echo, got 0", "max_tokens")
        ids = await token_ids(service, asked.prompt, "prompt", asked.max_tokens)
        options: dict[str, Any] = {"max_tokens": asked.max_tokens, "logprobs": asked.logprobs}
        if asked.echo:
            texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
            given = isinstance(texts[0], str)
            options["prefixes"] = texts if given else [service.tokenizer.decode(row) for row in ids]
        return await _answer(service, Answer, asked, adapter, ids, **options)

    @router.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest) -> Any:
        adapter = _check(service, asked)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RequestError(400, "top_logprobs is only for logprobs=true", "top_logprobs")
        limit = asked.max_completion_tokens or asked.max_tokens
        if asked.max_tokens not in (None, limit):
            raise RequestError(400, "max_tokens is the old name of max_completion_tokens: give one", "max_tokens")
        tools = [] if asked.tool_choice == "none" else asked.tools
        ids = await _rendered(service, asked.messages, tools, True, limit or 1)
        check_ids(service, ids, "messages", limit or 1)
        limit = limit or service.limits.max_tokens - len(ids)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        format = chat.format_for(service, tools)
        names = [tool["function"]["name"] for tool in tools]
        calls = None if format is None else partial(Calls, format, names)
        kind = partial(ChatAnswer, calls=calls)
        forced = None if asked.tool_choice in ("none", "auto") else _forced(service, asked, format)
        return await _answer(service, kind, asked, adapter, [ids], forced, max_tokens=limit, logprobs=logprobs)

    @router.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Any:
        if asked.model is not None:
            find_adapter(service, asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError(400, "prompt: either a prompt or messages are needed", "prompt")
        if asked.messages is not None:
            ids = await _rendered(service, asked.messages, asked.tools, asked.add_generation_prompt, 0)
        else:
            prompt = asked.prompt or ""
            special = asked.add_special_tokens
            ids = (await in_turn(len(prompt), tokenized, service, [prompt], "prompt", 0, special))[0]
        names = service.tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": service.limits.max_tokens, "tokens": ids, "token_strs": names}

    @router.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> Any:
        if asked.model is not None:
            find_adapter(service, asked.model)
        if asked.tokens and not 0 <= min(asked.tokens) <= max(asked.tokens) < service.vocabulary:
            raise RequestError(400, f"tokens: token ids must be in [0, {service.vocabulary})", "tokens")
        return {"prompt": await in_turn(len(asked.tokens), service.tokenizer.decode, asked.tokens)}

    if service.engine.source is not None:
        _add_changes(router, service)
    return router


def _add_changes(router: APIRouter, service: Service) -> None:
    """The endpoints that load and unload adapters."""

    @router.post("/v1/load_lora_adapter")
    async def load_adapter(asked: LoadAdapterRequest) -> Any:
        name = asked.lora_name
        if name == service.name:
            raise RequestError(400, f"lora_name {name!r} is the base model's", "lora_name")
        try:
            await asyncio.to_thread(service.engine.add, name, asked.lora_path, asked.load_inplace)
        except Exception as error:
            message, param = str(error), str(error).split(" ")[0]
            if param not in ("lora_name", "lora_path"):  # text of the reader, which names files of the server
                _LOG.error("adapter %r cannot be loaded: %s", name, error)
                message, param = "lora_path: the adapter cannot be loaded; the server's log says why", "lora_path"
            raise RequestError(400, message, param) from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_adapter(asked: UnloadAdapterRequest) -> Any:
        try:
            service.engine.remove(asked.lora_name)
        except UnknownAdapterError:
            message = f"no adapter {asked.lora_name[:128]!r} was loaded over HTTP"
            raise RequestError(404, message, "lora_name", "model_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def _check(service: Service, asked: DrawingRequest) -> Adapters:
    """Check what all completions have in common; return the adapters."""
    if not service.engine.causal:
        raise RequestError(400, f"{service.name} is an encoder: use /v1/embeddings", "model")
    if asked.stream_options is not None and not asked.stream:
        raise RequestError(400, "stream_options is only for stream=true", "stream_options")
    if max(asked.logit_bias, default=0) >= service.vocabulary:
        raise RequestError(400, f"logit_bias: token ids must be in [0, {service.vocabulary})", "logit_bias")
    return find_adapters(service, asked)


async def _answer(
    service: Service,
    kind: Callable[..., Answer],
    asked: DrawingRequest,
    adapter: Adapters,
    ids: list[list[int]],
    forced: tuple[str, dict[str, Any], str, str] | None = None,
    **options: Any,
) -> Any:
    most = service.limits.max_inputs
    if len(ids) * asked.n > most:
        raise RequestError(400, f"n: at most {most} completions in a request, got {len(ids) * asked.n}", "n")
    grammar = await _grammar(service, _wanted(asked) if forced is None else forced)
    answer = kind(service, asked, adapter, ids, grammar=grammar, **options)
    submit(service, answer.rows)
    if not asked.stream:
        return await answer.whole()
    # An error before the first token still gets its own status.
    stream = answer.stream()
    first = await anext(stream)
    return StreamingResponse(_chain(first, stream), media_type="text/event-stream")


async def _chain(first: str, rest: Any) -> Any:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()


def _wanted(asked: DrawingRequest) -> tuple[str, dict[str, Any], str, str] | None:
    """The field that asks for a grammar, its JSON schema, and the texts around the JSON; None if text is free."""
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema: dict[str, Any] = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
    return "response_format", schema, "", ""


def _forced(service: Service, asked: ChatRequest, format: Format | None) -> tuple[str, dict[str, Any], str, str]:
    """The same for a call of a tool that the client insists on."""
    named = asked.tool_choice.function.name if isinstance(asked.tool_choice, NamedTool) else None
    tools = [tool for tool in asked.tools if named in (None, tool["function"]["name"])]
    if not tools:
        raise RequestError(400, "tool_choice: tools has no such tool", "tool_choice")
    if format is None:
        message = (
            f"tool_choice: the format in which {service.name} calls tools is not known, so that calls cannot be forced"
        )
        raise RequestError(400, message, "tool_choice")
    if _wanted(asked) is not None:
        raise RequestError(400, "tool_choice: a call and a response_format cannot both be forced", "tool_choice")
    return "tool_choice", format.schema(tools), format.begin, format.end


async def _grammar(service: Service, wanted: tuple[str, dict[str, Any], str, str] | None) -> Callable[[], Any]:
    """What makes a matcher for each completion, or None if text is free."""
    if wanted is None:
        return lambda: None
    field, schema, begin, end = wanted
    try:
        matcher = await in_turn(len(json.dumps(schema)), service.grammars.make, schema, begin, end)
    except ImportError:
        raise RequestError(400, f"{field}: the server needs llguidance for it: {EXTRA}", field) from None
    except GrammarError as error:
        raise RequestError(400, f"{field}: {error}", field) from None
    return matcher.copy


async def _rendered(
    service: Service, messages: list[Message], tools: list[dict[str, Any]], answer: bool, more: int
) -> list[int]:
    """The tokens of messages in the model's chat template; ``more`` further tokens must fit."""

    def work() -> list[int]:
        text = chat.render(service, messages, tools, answer)
        return tokenized(service, [text], "messages", more, special=False)[0]

    return await in_turn(sum(len(message.content or "") for message in messages), work)
