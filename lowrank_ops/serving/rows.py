"""The inputs of requests: what each asks for, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from .mixtures import Adapters, mixture
from .sampling import Sampler, Score, scores_of
from .stops import Stops


class Row:
    """One input of a request.

    Args:
        adapter: a name in the pool or its directory, several with their strengths, or None for the model alone.
        ids: its tokens, at least one.

    Attributes:
        done: resolves with the result or the error.
        echo: whether the logits of all its tokens are needed.
        mixture: the names with their strengths, and names: these alone, sorted.
        cancelled: set if the client has gone; the row is dropped before the next forward.
    """

    echo = False

    def __init__(self, adapter: Adapters, ids: Sequence[int]) -> None:
        self.adapter, self.ids, self.mixture = adapter, list(ids), mixture(adapter, "adapter")
        self.names = tuple(name for name, _ in self.mixture)
        self.done: Future[Any] = Future()
        self.cancelled = False

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Embedding(Row):
    """An embedding; ``done`` gives it as a Tensor [size], pooled as :class:`lowrank_ops.serving.pooling.Pooling` says."""


class Completion(Row):
    """Draw tokens one by one; ``done`` gives the reason of the end, ``"stop"`` or ``"length"``.

    Args:
        max_tokens: limit of drawn tokens; 0 ends the completion with its prompt.
        stop: texts that end the completion and are cut off.
        decode: token ids -> text.
        on_text: called in the model's thread with each new piece of text.
        echo: compute ``prompt_scores``, for which the whole prompt is read and no earlier text can serve; needs
            ``logprobs``.
        sampling: arguments of :class:`lowrank_ops.serving.sampling.Sampler`. Each row has its own generator, so that
            results do not depend on the batch.

    Attributes:
        drawn: the tokens so far.
        prompt_scores: with ``echo`` the scores of the prompt's tokens, as far as it has been read.
    """

    def __init__(
        self,
        adapter: Adapters,
        ids: Sequence[int],
        *,
        decode: Callable[[list[int]], str],
        on_text: Callable[[str], None],
        max_tokens: int = 16,
        stop: Sequence[str] = (),
        echo: bool = False,
        **sampling: Any,
    ) -> None:
        super().__init__(adapter, ids)
        self.max_tokens, self.echo, self.sampler = max_tokens, echo, Sampler(**sampling)
        self.prompt_scores = [Score(self.ids[0], None, [])] if echo else []
        self.drawn: list[int] = []
        self._decode, self._on_text, self._stops = decode, on_text, Stops(stop)
        # Tokens from _start on are decoded again with new ones; the text of tokens before _read has been passed on.
        self._start = self._read = 0

    def score(self, logits: Tensor) -> None:
        """Score the next tokens of the prompt by the logits [tokens, vocabulary] before them."""
        first = len(self.prompt_scores)
        tokens = self.ids[first : first + len(logits)]
        self.prompt_scores += scores_of(logits[: len(tokens)], tokens, self.sampler.logprobs or 0)

    def choose(self, logits: Tensor) -> int:
        """Choose the next token from logits [vocabulary]."""
        return self.sampler.choose(logits)

    def take(self, token: int, ends: frozenset[int]) -> bool:
        """Add a token; tell whether the completion has ended, in which case ``done`` is set."""
        if not self.max_tokens:  # the scores of the prompt are all that was asked for
            return self._end("length")
        if token in ends:
            return self._end("stop")
        self.drawn.append(token)
        if self._add(last=False):
            return self._end("stop", flush=False)
        if self.sampler.grammar is not None and self.sampler.grammar.ended:
            return self._end("stop")
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
        text, found = self._decode(self.drawn[self._start :]), False
        send = ""
        if last or not text.endswith("\ufffd"):
            send, found = self._stops.add(text[len(self._decode(self.drawn[self._start : self._read])) :])
            self._start, self._read = self._read, len(self.drawn)
        if last and not found:
            send += self._stops.held
        if send:
            self._on_text(send)
        return found


def padded(rows: Sequence[Row], pad: int, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows to token ids and an attention mask, [rows, longest] each."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad, device="cpu")
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device="cpu")
    for i, row in enumerate(rows):
        where = slice(longest - len(row.ids), longest) if left else slice(len(row.ids))
        ids[i, where], mask[i, where] = torch.tensor(row.ids, device="cpu"), 1
    return ids.to(device), mask.to(device)
