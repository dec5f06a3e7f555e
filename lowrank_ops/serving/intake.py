"""From a request to rows of the engine, and the errors of rows as answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from .engine import AdapterError, ClosedError, QueueFullError, UnknownAdapterError, is_name
from .gate import count_rows, in_turn
from .grammar import GrammarError
from .load import Service
from .protocol import RequestError
from .rows import Row

_LOG = logging.getLogger("lowrank_ops")


def find_adapter(service: Service, name: str) -> str | None:
    """The adapter named by a request, None for the base model."""
    if name == service.name:
        return None
    if not is_name(name):
        raise RequestError(400, "model must be a name, not a path", "model")
    try:
        service.engine.find(name)
    except UnknownAdapterError:
        raise unknown(name) from None
    return name


def unknown(name: str) -> RequestError:
    """The answer for a name that no model and no adapter has."""
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
    ids = tokenized(service, given, param, more) if isinstance(given[0], str) else given
    for row in ids:
        check_ids(service, row, param, more)
    return ids


def tokenized(service: Service, texts: Sequence[str], param: str, more: int, special: bool = True) -> list[list[int]]:
    """The token ids of texts, with the tokenizer's special tokens or without; a text that cannot fit costs nothing."""
    most = service.limits.max_tokens
    if any(service.has_more(text, most) for text in texts):
        raise _too_long(service, param, f"more than {most}", more)
    try:
        return service.tokenize(texts, special)
    except (TypeError, ValueError):  # half of a surrogate pair, "\ud800"
        raise RequestError(400, f"{param}: not every input is valid Unicode", param) from None


def check_ids(service: Service, ids: Sequence[int], param: str, more: int) -> None:
    """Refuse token ids that the model does not have, none, or more than fit together with ``more`` further ones."""
    if not ids:
        raise RequestError(400, f"{param}: an input has no tokens", param)
    if len(ids) + more > service.limits.max_tokens:
        raise _too_long(service, param, str(len(ids)), more)
    if min(ids) < 0 or max(ids) >= service.vocabulary:
        raise RequestError(400, f"{param}: token ids must be in [0, {service.vocabulary})", param)


def _too_long(service: Service, param: str, count: str, more: int) -> RequestError:
    got = count + (f" and max_tokens {more}" if more else "")
    message = f"{param}: this model takes at most {service.limits.max_tokens} tokens, got {got}"
    return RequestError(400, message, param, "context_length_exceeded")


def submit(service: Service, rows: Sequence[Row]) -> None:
    count_rows(len(rows))
    try:
        service.engine.submit(rows)
    except QueueFullError:
        raise RequestError(429, "too many requests wait; try again soon", code="queue_full") from None
    except ClosedError:
        raise RequestError(503, "shutting down") from None
    except UnknownAdapterError as error:
        raise unknown(str(error)) from None
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
        raise_failure(result if isinstance(result, BaseException) else None, model)
    return results


def raise_failure(error: BaseException | None, model: str) -> None:
    """Raise the answer to a row's error, if it has one."""
    if isinstance(error, UnknownAdapterError):
        raise unknown(model)
    if isinstance(error, AdapterError):
        raise RequestError(500, f"the adapter {model!r} cannot be loaded; the server's log says why", "model")
    if isinstance(error, GrammarError):
        raise RequestError(400, f"response_format: {error}", "response_format")
    if error is not None:
        _LOG.error("a forward failed", exc_info=error)
        raise RequestError(500, "the model failed on this request")
