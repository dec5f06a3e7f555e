"""Errors in OpenAI's format, and the limits of requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastapi.responses import JSONResponse, Response


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
