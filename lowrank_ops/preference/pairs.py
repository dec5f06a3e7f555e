"""Read pairs of answers from JSONL files in TRL's layout, and report every bad row by its number."""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..files import load_json, load_row


class Message(NamedTuple):
    """One message of a conversation; ``fields`` is the JSON of the whole message."""

    role: str
    content: str | None  # None beside tool calls
    fields: str

    def as_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = load_json(self.fields)
        return fields

    def beyond(self) -> list[str]:
        """The names of the fields beside role and content."""
        return [name for name in self.as_dict() if name not in ("role", "content")]


Messages = tuple[Message, ...]
Prompt = str | tuple[str, ...]  # a text, or the JSON of each message
COLUMNS = ("prompt", "chosen", "rejected", "margin", "label", "tools", "chat_template_kwargs")

# Arguments of transformers' apply_chat_template that are no variables of the template; a file must not bring a template.
TEMPLATE_ARGUMENTS = {
    *(
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    ),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens", "messages"),
}


class RewardError(Exception):
    """An error the user can fix; the message says how."""


@dataclass(frozen=True)
class PreferencePair:
    """One row: texts, or conversations as messages; prompt is None if the answers contain everything."""

    where: str  # "row 3", or "more.jsonl row 3"
    prompt: str | Messages | None
    chosen: str | Messages
    rejected: str | Messages
    margin: float = 0.0
    label: float = 1.0
    tools: tuple[str, ...] = ()  # what the answers may call, each as JSON
    template_kwargs: str = "{}"  # further arguments of the chat template, as JSON
    unread: tuple[str, ...] = ()  # the row's columns that have no meaning here


def read_pairs(paths: Sequence[str | Path], named: bool = False) -> tuple[list[PreferencePair], dict[str, str]]:
    """Read pairs from JSONL files; return them and the bad rows as where -> fault.

    A row has ``chosen`` and ``rejected``, both texts or both lists of messages ``{"role", "content"}``, and may have a
    ``prompt`` of the same type, a ``margin`` and a ``label`` in [0, 1], the probability that ``chosen`` is better
    (default 1). Equal answers need the label 0.5. A message keeps all its fields, such as ``tool_calls``, and a row of
    messages may have ``tools`` (a list) and ``chat_template_kwargs`` (an object) for the chat template. Rows are
    numbered as lines of the file from 1; blank lines are skipped.

    Args:
        named: put the file's name before a row's number, as is always done for several files.

    Raises:
        RewardError: a file cannot be read or holds no row.
    """
    pairs: list[PreferencePair] = []
    bad: dict[str, str] = {}
    for path in map(Path, paths):
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise RewardError(f"cannot read {path}: {error.strerror or error}") from error
        if not any(line.strip() for line in lines):
            raise RewardError(f"{path} holds no pairs")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path.name} row {number}" if named or len(paths) > 1 else f"row {number}"
            try:
                pairs.append(_pair(where, line))
            except ValueError as error:
                bad[where] = str(error)
    return pairs, bad


def _pair(where: str, line: bytes) -> PreferencePair:
    row = load_row(line)
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise ValueError(f"lacks {' and '.join(map(repr, missing))}; it has {', '.join(map(repr, row)) or 'nothing'}")
    prompt = None if row.get("prompt") is None else _text("prompt", row["prompt"])
    chosen, rejected = (_text(column, row[column]) for column in ("chosen", "rejected"))
    kinds = {isinstance(text, str) for text in (prompt, chosen, rejected) if text is not None}
    if len(kinds) > 1:
        raise ValueError("mixes texts with lists of messages; all must be of one type")
    for column, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(column)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{column!r} must be a {kind.__name__}, got {type(value).__name__}")
        if value and isinstance(chosen, str):
            raise ValueError(f"has {column!r} beside texts; only a row of messages can use it")
    if own := sorted(TEMPLATE_ARGUMENTS & (row.get("chat_template_kwargs") or {}).keys()):
        raise ValueError(f"has {own[0]!r} in 'chat_template_kwargs', which is for variables of the template alone")
    margin = _number("margin", row.get("margin"), 0.0)
    if not math.isfinite(margin):
        raise ValueError(f"'margin' must be finite, got {margin}")
    label = _number("label", row.get("label"), 1.0)
    if not 0 <= label <= 1:
        raise ValueError(f"'label' must be in [0, 1], got {label}")
    if chosen == rejected and (row.get("label") is None or label != 0.5):
        raise ValueError("is a tie ('chosen' and 'rejected' are equal) without the 'label' 0.5")
    return PreferencePair(
        where,
        prompt,
        chosen,
        rejected,
        margin,
        label,
        tools=tuple(map(json.dumps, row.get("tools") or ())),
        template_kwargs=json.dumps(row.get("chat_template_kwargs") or {}),
        unread=tuple(column for column in row if column not in COLUMNS),
    )


def _text(column: str, value: Any) -> str | Messages:
    if isinstance(value, str):
        if column != "prompt" and not value.strip():
            raise ValueError(f"{column!r} is empty")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{column!r} must be a text or a list of messages, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{column!r} is empty")
    messages = tuple(_message(column, message) for message in value)
    if column != "prompt" and not any((m.content or "").strip() or m.beyond() for m in messages):
        raise ValueError(f"{column!r} is empty")
    return messages


def _message(column: str, message: Any) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    calls = isinstance(message, dict) and message.get("tool_calls")
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls)):
        raise ValueError(f"{column!r} has a message that is not {{'role': text, 'content': text}}")
    held = {name: value for name, value in message.items() if value is not None or name == "content"}
    return Message(role, content, json.dumps(held, sort_keys=True))


def _number(column: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{column!r} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def split_pairs(
    pairs: Sequence[PreferencePair], holdout: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Divide pairs into training pairs and a share of about ``holdout`` to measure on; equal prompts stay on one side.

    Where a row has no prompt of its own, its prompt is what its two answers begin with: the same messages, or the same
    words. If one such prompt begins another one, they stay on one side too.

    Raises:
        RewardError: one side would be empty.
    """
    prompts = _prompts(pairs)
    by_prompt: dict[Prompt, list[PreferencePair]] = {}
    for pair, prompt in zip(pairs, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(pair)
    order = sorted(by_prompt, key=lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest())
    held: list[PreferencePair] = []
    while order and len(held) < holdout * len(pairs):
        held += by_prompt[order.pop()]
    kept = set(order)
    trained = [pair for pair, prompt in zip(pairs, prompts, strict=True) if prompt in kept]
    if not held or not trained:
        raise RewardError(
            f"{len(pairs)} pairs with {len(by_prompt)} different prompts cannot be divided into some to train on and "
            "some to measure on; give more, or --eval FILE"
        )
    return trained, held


def _prompts(pairs: Sequence[PreferencePair]) -> list[Prompt]:
    """The prompt of each pair; the shortest of several that begin each other stands for all of them."""
    own = [_prompt(pair) for pair in pairs]
    first: dict[type, list[Any]] = {str: [], tuple: []}
    for kind, shortest in first.items():
        shared = {p for p, pair in zip(own, pairs, strict=True) if type(p) is kind and not isinstance(pair.prompt, str)}
        for prompt in sorted(shared):  # a prompt stands before those that it begins
            if not (shortest and prompt[: len(shortest[-1])] == shortest[-1]):
                shortest.append(prompt)

    def stand_in(prompt: Any) -> Prompt:
        shortest = first[type(prompt)]
        at = bisect_right(shortest, prompt) - 1
        found: Prompt = shortest[at] if at >= 0 and prompt[: len(shortest[at])] == shortest[at] else prompt
        return found

    return [stand_in(prompt) for prompt in own]


def _prompt(pair: PreferencePair) -> Prompt:
    """The pair's prompt, or what both answers begin with: the messages before the first that differs, or the words."""
    if isinstance(pair.prompt, str):
        return pair.prompt.strip()
    if pair.prompt is not None:
        return tuple(message.fields for message in pair.prompt)
    equal = 0
    for a, b in zip(pair.chosen, pair.rejected, strict=False):
        if a != b:
            break
        equal += 1
    if isinstance(pair.chosen, str):
        words = re.match(r".*\s", pair.chosen[:equal], re.DOTALL)
        return (words and words.group().strip()) or pair.chosen.strip()
    answers = min(len(pair.chosen), len(pair.rejected)) - 1
    return tuple(message.fields for message in pair.chosen[: min(equal, answers)] or pair.chosen)


def listed(bad: dict[str, str], most: int | None = None) -> str:
    """List the bad rows, one line each, up to ``most``."""
    lines = [f"  {where} {what}" for where, what in list(bad.items())[:most]]
    if most is not None and len(bad) > most:
        lines.append(f"  and {len(bad) - most} more")
    return "\n".join(lines)
