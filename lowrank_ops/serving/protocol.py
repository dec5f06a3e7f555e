"""Requests and errors in OpenAI's format, and the limits of a request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, PlainValidator


class RequestError(Exception):
    """An answer in OpenAI's error format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        # A client's text may contain half of a surrogate pair, which UTF-8 cannot encode.
        self.message, self.param = (t and t.encode(errors="replace").decode() for t in (message, param))
        self.status, self.code = status, code

    def response(self) -> Response:
        kind = (
            "invalid_request_error"
            if self.status < 429
            else "rate_limit_error"
            if self.status == 429
            else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {
            401: {"WWW-Authenticate": "Bearer"},
            408: {"Connection": "close"},
            429: {"Retry-After": "1"},
            503: {"Retry-After": "1"},
        }.get(self.status)
        return JSONResponse({"error": error}, self.status, headers)


@dataclass(frozen=True)
class Limits:
    """Limits of requests and clients. A client is an API key, or without keys an address.

    Args:
        max_inputs: texts in one request.
        max_tokens: limit of one input, and of a prompt with its completion.
        max_body_bytes: limit of a request's body.
        client_rows: inputs of one client that wait or run; 0: 8 times ``max_inputs``.
        client_body_bytes: bodies of one client together; 0: 48 times ``max_body_bytes``.
        bodies_bytes: bodies of all clients together; 0: 128 times ``max_body_bytes``.
        connections: connections to the process.
        client_connections: connections of one address to the process.
        read_seconds: time for a request's header; in its body, and in reading an answer, the longest pause.
        body_seconds: time for a request's body.
        request_seconds: time for an answer.
    """

    max_inputs: int = 64
    max_tokens: int = 512
    max_body_bytes: int = 4 << 20
    client_rows: int = 0
    client_body_bytes: int = 0
    bodies_bytes: int = 0
    connections: int = 1024
    client_connections: int = 512
    read_seconds: float = 30
    body_seconds: float = 120
    request_seconds: float = 600

    def resolved(self, longest: int, max_queue: int | None) -> Limits:
        """The same with numbers for the zeros that mean one, and at most ``longest`` tokens.

        Raises:
            ValueError: a limit is too small for another one.
        """
        derived = ("client_rows", "client_body_bytes", "bodies_bytes")
        for name, value in vars(self).items():
            if name.endswith("_seconds") and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value}")
            if value < (0 if name in derived else 1 if isinstance(value, int) else value):
                raise ValueError(f"{name} must be at least 1, got {value}")
        found = replace(
            self,
            max_tokens=min(self.max_tokens, longest),
            client_rows=self.client_rows or 8 * self.max_inputs,
            client_body_bytes=self.client_body_bytes or 48 * self.max_body_bytes,
            bodies_bytes=self.bodies_bytes or 128 * self.max_body_bytes,
        )
        for less, more in (
            ("max_inputs", "client_rows"),
            ("max_body_bytes", "client_body_bytes"),
            ("max_body_bytes", "bodies_bytes"),
        ):
            if getattr(found, less) > getattr(found, more):
                raise ValueError(f"{less} must be at most {more}, {getattr(found, more)}, got {getattr(found, less)}")
        if max_queue is not None and self.max_inputs > max_queue:
            raise ValueError(f"max_inputs must be at most max_queue, {max_queue}, got {self.max_inputs}")
        return found


def _check_input(value: Any) -> Any:
    """Check the form of an input; stops at the first wrong item, where a union would collect errors of all."""
    if isinstance(value, str) or _are_ids(value):
        return value
    if isinstance(value, list) and value and (set(map(type, value)) == {str} or all(map(_are_ids, value))):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of these, none of them empty")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


Ids = Annotated[list[int], Field(min_length=1)]
Forms = str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
Input = Annotated[Any, PlainValidator(_check_input, json_schema_input_type=Forms)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    user: str | None = None


class EmbeddingRequest(_Asked):
    """As in OpenAI's API; ``dimensions`` can only be the model's own."""

    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(_Asked):
    """As in OpenAI's API; unsupported options are accepted only with values that request nothing."""

    prompt: Input
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None


# Values of unsupported options that request nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (None, 1),
    "echo": (False,),
    "logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "suffix": (None, ""),
}
