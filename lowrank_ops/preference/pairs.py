"""Read pairs of answers from JSONL files in TRL's layout, and report every bad row by its number."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Messages = tuple[tuple[str, str], ...]  # (role, content) of each


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


def read_pairs(paths: Sequence[str | Path], named: bool = False) -> tuple[list[PreferencePair], dict[str, str]]:
    """Read pairs from JSONL files; return them and the bad rows as where -> fault.

    A row has ``chosen`` and ``rejected``, both texts or both lists of messages ``{"role", "content"}``, and may have a
    ``prompt`` of the same type, a ``margin`` and a ``label`` in [0, 1], the probability that ``chosen`` is better
    (default 1). Equal answers need the label 0.5. Rows are numbered as lines of the file from 1; blank lines are
    skipped.

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
    try:
        row = json.loads(line)
    except ValueError as error:  # includes UnicodeDecodeError
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {type(row).__name__}")
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise ValueError(f"lacks {' and '.join(map(repr, missing))}; it has {', '.join(map(repr, row)) or 'nothing'}")
    prompt = None if row.get("prompt") is None else _text("prompt", row["prompt"])
    chosen, rejected = (_text(column, row[column]) for column in ("chosen", "rejected"))
    kinds = {isinstance(text, str) for text in (prompt, chosen, rejected) if text is not None}
    if len(kinds) > 1:
        raise ValueError("mixes texts with lists of messages; all must be of one type")
    margin = _number("margin", row.get("margin"), 0.0)
    if not math.isfinite(margin):
        raise ValueError(f"'margin' must be finite, got {margin}")
    label = _number("label", row.get("label"), 1.0)
    if not 0 <= label <= 1:
        raise ValueError(f"'label' must be in [0, 1], got {label}")
    if chosen == rejected and (row.get("label") is None or label != 0.5):
        raise ValueError("is a tie ('chosen' and 'rejected' are equal) without the 'label' 0.5")
    return PreferencePair(where, prompt, chosen, rejected, margin, label)


def _text(column: str, value: Any) -> str | Messages:
    if isinstance(value, str):
        if column != "prompt" and not value.strip():
            raise ValueError(f"{column!r} is empty")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{column!r} must be a text or a list of messages, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{column!r} is empty")
    for message in value:
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(f"{column!r} has a message that is not {{'role': text, 'content': text}}")
    if column != "prompt" and not any(message["content"].strip() for message in value):
        raise ValueError(f"{column!r} is empty")
    return tuple((message["role"], message["content"]) for message in value)


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

    Raises:
        RewardError: one side would be empty.
    """
    by_prompt: dict[Any, list[PreferencePair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.chosen if pair.prompt is None else pair.prompt, []).append(pair)
    order = sorted(by_prompt, key=lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest())
    held: list[PreferencePair] = []
    while order and len(held) < holdout * len(pairs):
        held += by_prompt[order.pop()]
    kept = set(order)
    trained = [pair for pair in pairs if (pair.chosen if pair.prompt is None else pair.prompt) in kept]
    if not held or not trained:
        raise RewardError(
            f"{len(pairs)} pairs with {len(by_prompt)} different prompts cannot be divided into some to train on and "
            "some to measure on; give more, or --eval FILE"
        )
    return trained, held


def listed(bad: dict[str, str], most: int | None = None) -> str:
    """List the bad rows, one line each, up to ``most``."""
    lines = [f"  {where} {what}" for where, what in list(bad.items())[:most]]
    if most is not None and len(bad) > most:
        lines.append(f"  and {len(bad) - most} more")
    return "\n".join(lines)
