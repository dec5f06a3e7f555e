"""The inputs of requests: what each asks for, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor


class Row:
    """One input of a request.

    Args:
        adapter: a name in the pool or its directory, None for the model alone.
        ids: its tokens, at least one.

    Attributes:
        done: resolves with the result or the error.
        cancelled: set if the client has gone; the row is dropped before the next forward.
    """

    def __init__(self, adapter: str | None, ids: Sequence[int]) -> None:
        self.adapter, self.ids = adapter, list(ids)
        self.done: Future[Any] = Future()
        self.cancelled = False

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Embedding(Row):
    """e = v / |v|, v = the mean of the last hidden states over the row's tokens; ``done`` gives it as a Tensor [hidden]."""


class Completion(Row):
    """Draw tokens one by one; ``done`` gives the reason of the end, ``"stop"`` or ``"length"``.

    Args:
        max_tokens: limit of drawn tokens.
        temperature: 0 takes the most probable token; otherwise p = softmax(logits / temperature).
        top_p: draw from the fewest most probable tokens whose probabilities sum to it.
        seed: seed of the row's own generator, so that results do not depend on the batch; None for a different one
        every time.
        stop: texts that end the completion and are cut off.
        decode: token ids -> text.
        on_text: called in the model's thread with each new piece of text.
    """

    def __init__(
        self,
        adapter: str | None,
        ids: Sequence[int],
        *,
        decode: Callable[[list[int]], str],
        on_text: Callable[[str], None],
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        super().__init__(adapter, ids)
        self.max_tokens, self.temperature, self.top_p, self.stop = max_tokens, temperature, top_p, tuple(stop)
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.drawn: list[int] = []
        self._decode, self._on_text = decode, on_text
        # Tokens from _start on are decoded again with new ones; the text of tokens before _read is already in _held.
        self._start = self._read = 0
        self._held = ""  # text that may be the beginning of a stop

    def choose(self, logits: Tensor) -> int:
        """Choose the next token from logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        p = (logits.float().cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(descending=True, stable=True)
            ordered[ordered.cumsum(0) - ordered >= self.top_p] = 0
            p = torch.zeros_like(p).scatter_(0, order, ordered)
        return int(torch.multinomial(p, 1, generator=self.generator))

    def take(self, token: int, ends: frozenset[int]) -> bool:
        """Add a token; tell whether the completion has ended, in which case ``done`` is set."""
        if token in ends:
            return self._end("stop")
        self.drawn.append(token)
        if self._add(last=False):
            return self._end("stop", flush=False)
        if len(self.drawn) >= self.max_tokens:
            return self._end("length")
        return False

    def _end(self, reason: str, flush: bool = True) -> bool:
        if flush and self._add(last=True):
            reason = "stop"
        self.done.set_result(reason)
        return True

    def _add(self, last: bool) -> bool:
        """Pass on the text that the tokens yield; tell whether it met a stop.

        A few earlier tokens are decoded again with the new ones, because the text of a token depends on its neighbours;
        an incomplete character decodes to U+FFFD and waits.
        """
        text = self._decode(self.drawn[self._start :])
        if last or not text.endswith("\ufffd"):
            self._held += text[len(self._decode(self.drawn[self._start : self._read])) :]
            self._start, self._read = self._read, len(self.drawn)
        found = [at for at in (self._held.find(stop) for stop in self.stop) if at >= 0]
        keep = 0 if last or found else _overlap(self._held, self.stop)
        send = self._held[: min(found)] if found else self._held[: len(self._held) - keep]
        self._held = "" if found else self._held[len(send) :]
        if send:
            self._on_text(send)
        return bool(found)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest ending of the text that begins one of the stops."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def padded(rows: Sequence[Row], pad: int, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows to token ids and an attention mask, [rows, longest] each."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad, device="cpu")
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device="cpu")
    for i, row in enumerate(rows):
        where = slice(longest - len(row.ids), longest) if left else slice(len(row.ids))
        ids[i, where], mask[i, where] = torch.tensor(row.ids, device="cpu"), 1
    return ids.to(device), mask.to(device)
