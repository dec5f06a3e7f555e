"""Bodies and texts, bounded before they cost: JSON of few parts, and texts that cannot fit refused without tokenising."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from .gate import in_turn

PARTS = 1 << 14  # members of objects and lists in a body, apart from its inputs; a wrong body has an error for each
INPUTS = ("input", "prompt")  # their own check stops at the first error


class BoundedRoute(APIRoute):
    """A route whose body is parsed by :func:`parse`, a long one in turns (:func:`lowrank_ops.serving.gate.in_turn`)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return bounded


class _Request(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return await in_turn(len(body), parse, body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None  # of all errors FastAPI passes on this one as it is


def parse(body: bytes) -> Any:
    """Parse JSON, with NaN and Infinity as Python writes them, so that the check of their field can name it.

    Raises:
        ValueError: it is not JSON in UTF-8, is nested in more than 200 levels, or apart from the lists of its inputs has
            more than ``PARTS`` members.
    """
    try:
        value = from_json(body)
    except ValueError:
        raise ValueError("the body is not valid JSON") from None
    if isinstance(value, dict):
        _check_parts(value)
    return value


def _check_parts(body: dict[str, Any]) -> None:
    parts, todo = len(body), [value for key, value in body.items() if key not in INPUTS]
    while parts <= PARTS and todo:
        value = todo.pop()
        if isinstance(value, (dict, list)):
            parts += len(value)
            if parts <= PARTS:
                todo += value.values() if isinstance(value, dict) else value
    if parts > PARTS:
        raise ValueError(f"the body has more than {PARTS} keys and items, those of input and prompt not counted")
