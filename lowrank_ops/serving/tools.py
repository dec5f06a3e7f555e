"""Calls of tools: found in the text of an answer, and forced by a grammar, in the formats that models write them in."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Format:
    """How a family of models writes calls.

    Args:
        begin, end: what stands around the JSON of a call; empty if the answer is JSON as a whole.
        arguments: the key of the arguments beside ``name``.
        many: whether the answer is a list of calls.
    """

    begin: str = ""
    end: str = ""
    arguments: str = "arguments"
    many: bool = False

    def schema(self, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The JSON schema of a call of one of the tools."""
        calls = []
        for tool in tools:
            function = tool["function"]
            given = function.get("parameters") or {"type": "object"}
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, self.arguments: given},
                    "required": ["name", self.arguments],
                    "additionalProperties": False,
                }
            )
        one = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return {"type": "array", "items": one, "minItems": 1} if self.many else one


_FORMATS = {
    "<tool_call>": Format("<tool_call>\n", "\n</tool_call>"),  # Hermes and Qwen
    "[TOOL_CALLS]": Format(many=True),  # Mistral; the mark is a special token, which has no text
    "<|python_tag|>": Format(arguments="parameters"),  # Llama 3
    '"parameters": dictionary': Format(arguments="parameters"),  # Llama 3.2
}
# Marks of formats that look alike and are not JSON.
_OTHERS = ("<function=", "<arg_key>", "[ARGS]")


def format_of(template: str) -> Format | None:
    """The format that a chat template teaches; None if it is not known."""
    if any(mark in template for mark in _OTHERS):
        return None
    return next((format for mark, format in _FORMATS.items() if mark in template), None)


@dataclass
class Call:
    """A call of a tool; ``arguments`` is JSON."""

    name: str
    arguments: str

    def entry(self) -> dict[str, Any]:
        """As in OpenAI's answers."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class Calls:
    """Take the calls of tools out of a text that comes in pieces.

    What is not the JSON of a call of a known tool stays text. White space around calls is dropped.

    Args:
        format: of the model.
        names: of the tools.
    """

    def __init__(self, format: Format, names: Collection[str]) -> None:
        self._format, self._names = format, frozenset(names)
        self._held = ""  # what may belong to a call
        self._ended = False  # whether the last thing was a call
        self.found = 0  # calls so far

    def add(self, piece: str, last: bool = False) -> tuple[str, list[Call]]:
        """Add a piece, the ``last`` one or not; return text that surely belongs to no call, and the complete calls."""
        self._held += piece
        text, calls = self._tagged(last) if self._format.begin else self._bare(last)
        self.found += len(calls)
        return text, calls

    def _tagged(self, last: bool) -> tuple[str, list[Call]]:
        begin, end = self._format.begin.strip(), self._format.end.strip()
        text, calls = "", []
        if self._ended:
            self._held = self._held.lstrip()
        while (at := self._held.find(begin)) >= 0:
            stop = self._held.find(end, at)
            if stop < 0 and not last:
                break
            inside = self._held[at + len(begin) : stop if stop >= 0 else None]
            found = self._parsed(inside.strip())
            beyond = stop + len(end) if stop >= 0 else len(self._held)
            text += self._held[:at].rstrip() if found else self._held[:beyond]
            calls += found or []
            self._ended, self._held = bool(found), self._held[beyond:]
            if found:
                self._held = self._held.lstrip()
        if last:
            text, self._held = text + self._held, ""
        elif at < 0:
            # White space, and what may be the beginning of a mark, may belong to a call.
            sure = len(self._held)
            for size in range(min(len(begin) - 1, sure), 0, -1):
                if self._held.endswith(begin[:size]):
                    sure -= size
                    break
            sure = len(self._held[:sure].rstrip())
            text, self._held, self._ended = text + self._held[:sure], self._held[sure:], self._ended and not sure
        return text, calls

    def _bare(self, last: bool) -> tuple[str, list[Call]]:
        if not last and self._held.lstrip()[:1] in ("", "{", "["):
            return "", []
        held, self._held = self._held, ""
        calls = self._parsed(held.strip()) if last else None
        return ("", calls) if calls else (held, [])

    def _parsed(self, text: str) -> list[Call] | None:
        """The calls that a text is, one after the other or in a list; None if it is something else."""
        calls, decoder, at = [], json.JSONDecoder(), 0
        while at < len(text):
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                return None
            for call in value if isinstance(value, list) else [value]:
                name = call.get("name") if isinstance(call, dict) else None
                if not isinstance(name, str) or name not in self._names:
                    return None
                given = call.get("arguments", call.get("parameters", {}))
                arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
                calls.append(Call(name, arguments))
            at += len(text[at:]) - len(text[at:].lstrip("; \n"))
        return calls or None
