"""Read a text as windows of tokens, as calibrating and evaluating take it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._cli import CommandError


def read_windows(tokenizer: Any, path: str | Path, option: str, length: int, tokens: int) -> Tensor:
    """The first tokens of a text, cut into windows of one length, int64 [count, length].

    Where the tokenizer begins a text with a token, such as ``<bos>``, every window begins with it.

    Args:
        tokenizer: of transformers.
        path: a file in UTF-8, or ``"-"`` for standard input.
        option: the option that named it, for messages.
        length: tokens of a window, at least 2.
        tokens: the most tokens to take, at least ``length``; a text that has fewer gives fewer windows.

    Raises:
        CommandError: there is no such text, it is no UTF-8, or it is too short for one window.
    """
    if length < 2 or tokens < length:
        raise CommandError(f"a window needs at least 2 tokens, and --tokens one window, got {length} and {tokens}")
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        text = raw.decode("utf-8-sig")  # editors of Windows put a mark before the text
    except OSError as error:
        raise CommandError(f"{option}: cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{option}: {path} is no text in UTF-8: {error}") from error
    first = first_tokens(tokenizer)
    own = length - len(first)
    # A token has at most a few dozen characters, so this is enough text for all windows.
    ids = tokenizer(text[: 64 * tokens], add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids) // own, tokens // length)
    if not count:
        raise CommandError(f"{option}: {path} has {len(ids)} tokens, and one window needs {own}")
    rows = torch.tensor(ids[: count * own]).view(count, own)
    return torch.cat([torch.tensor(first, dtype=torch.int64).expand(count, -1), rows], 1)


def first_tokens(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, or none."""
    ids = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
