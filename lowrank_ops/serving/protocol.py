"""Requests and errors in OpenAI's format, and the limits of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field


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
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse({"error": error}, self.status, headers)


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Args:
        max_inputs: texts in one request.
        max_tokens: limit of one input, and of a prompt with its completion.
        max_body_bytes: limit of a request's body.
    """

    max_inputs: int = 64
    max_tokens: int = 512
    max_body_bytes: int = 4 << 20


Ids = Annotated[list[int], Field(min_length=1)]
Input = str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]


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
