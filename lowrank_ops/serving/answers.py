"""From a request to rows of the engine, and from their results to an answer in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from .engine import AdapterError, ClosedError, QueueFullError, UnknownAdapterError
from .gate import count_rows, in_turn
from .load import Service
from .protocol import CompletionRequest, RequestError
from .rows import Completion, Row

_LOG = logging.getLogger("lowrank_ops")


class Answer:
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


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def find_adapter(service: Service, name: str) -> str | None:
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


async def token_ids(service: Service, given: Any, param: str, more: int) -> list[list[int]]:
    """The token ids of every input; ``more`` further tokens must fit after each."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    limits = service.limits
    if len(given) > limits.max_inputs:
        raise RequestError(400, f"{param}: at most {limits.max_inputs} inputs, got {len(given)}", param)
    return await in_turn(sum(map(len, given)), _token_ids, service, given, param, more)


def _token_ids(service: Service, given: Any, param: str, more: int) -> list[list[int]]:
    most = service.limits.max_tokens

    def refuse(count: str) -> RequestError:
        got = count + (f" and max_tokens {more}" if more else "")
        message = f"{param}: this model takes at most {most} tokens, got {got}"
        return RequestError(400, message, param, "context_length_exceeded")

    if isinstance(given[0], str):
        if any(service.has_more(text, most) for text in given):
            raise refuse(f"more than {most}")
        try:
            given = service.tokenize(given)
        except (TypeError, ValueError):  # half of a surrogate pair, "\ud800"
            raise RequestError(400, f"{param}: not every input is valid Unicode", param) from None
    for row in given:
        if not row:
            raise RequestError(400, f"{param}: an input has no tokens", param)
        if len(row) + more > most:
            raise refuse(str(len(row)))
        if min(row) < 0 or max(row) >= service.vocabulary:
            raise RequestError(400, f"{param}: token ids must be in [0, {service.vocabulary})", param)
    return given


def submit(service: Service, rows: Sequence[Row]) -> None:
    count_rows(len(rows))
    try:
        service.engine.submit(rows)
    except QueueFullError:
        raise RequestError(429, "too many requests wait; try again soon", code="queue_full") from None
    except ClosedError:
        raise RequestError(503, "shutting down") from None
    except UnknownAdapterError as error:
        raise _unknown(str(error)) from None
    service.metrics.tokens.labels("prompt").inc(sum(len(row.ids) for row in rows))


async def wait(rows: Sequence[Row], model: str) -> list[Any]:
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
