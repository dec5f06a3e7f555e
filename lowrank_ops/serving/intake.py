"""From a request to rows of the engine, and the errors of rows as answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from .engine import AdapterError, ClosedError, QueueFullError, UnknownAdapterError, is_name
from .gate import count_rows, in_turn
from .grammar import GrammarError
from .load import Service
from .mixtures import Adapters
from .protocol import RequestError
from .rows import Row

_LOG = logging.getLogger("lowrank_ops")


def find_adapters(service: Service, asked: Any) -> Adapters:
    """The adapter that a request names as its model, or those that it names beside the base model; None for none."""
    if asked.adapters is None:
        return find_adapter(service, asked.model)
    if asked.model != service.name:
        message = f"adapters: model must be the base model, {service.name!r}, beside them, got {asked.model[:128]!r}"
        raise RequestError(400, message, "model")
    for adapter in asked.adapters:
        find_adapter(service, adapter.name, "adapters")
    return {adapter.name: adapter.strength for adapter in asked.adapters}


def find_adapter(service: Service, name: str, param: str = "model") -> str | None:
    """The adapter of a name, None for the base model."""
    if name == service.name and param == "model":
        return None
    if not is_name(name):
        raise RequestError(400, f"{param} must be a name, not a path", param)
    try:
        service.engine.find(name)
    except UnknownAdapterError:
        raise unknown(name, param) from None
    return name


def unknown(name: str, param: str = "model") -> RequestError:
    """The answer for a name that no model and no adapter has."""
    what = "model" if param == "model" else "adapter"
    return RequestError(404, f"the {what} {name[:128]!r} does not exist", param, "model_not_found")


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
        raise unknown(str(error), _param(rows[0])) from None
    service.metrics.tokens.labels("prompt").inc(sum(len(row.ids) for row in rows))


async def wait(rows: Sequence[Row]) -> list[Any]:
    """Wait for the results of all rows; a client that leaves cancels them."""
    try:
        results = await asyncio.gather(*(asyncio.wrap_future(row.done) for row in rows), return_exceptions=True)
    except asyncio.CancelledError:
        for row in rows:
            row.cancelled = True
        raise
    for result in results:
        raise_failure(result if isinstance(result, BaseException) else None, rows[0])
    return results


def _param(row: Row) -> str:
    """The field of a request that names the adapters of its rows."""
    return "adapters" if isinstance(row.adapter, Mapping) else "model"


def raise_failure(error: BaseException | None, row: Row) -> None:
    """Raise the answer to a row's error, if it has one."""
    if isinstance(error, UnknownAdapterError):
        raise unknown(str(error), _param(row))
    if isinstance(error, AdapterError):
        raise RequestError(500, f"the adapter {str(error)!r} cannot be loaded; the server's log says why", _param(row))
    if isinstance(error, GrammarError):
        raise RequestError(400, f"response_format: {error}", "response_format")
    if error is not None:
        _LOG.error("a forward failed", exc_info=error)
        raise RequestError(500, "the model failed on this request")
