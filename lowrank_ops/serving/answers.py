"""Completions as the answers to a request: rows of the engine, and their texts in OpenAI's formats."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from ..files import load_json
from .gate import in_turn
from .intake import raise_failure
from .load import Service
from .mixtures import Adapters
from .protocol import RequestError
from .requests import DrawingRequest
from .rows import Completion
from .sampling import Score
from .tools import Call, Calls

_FEW_NAMES = 64  # tokens whose texts are found at once on the event loop
_NAME = 16  # characters that are tokenised in the time in which the text of one token is found


class Answer:
    """The completions of one request, assembled on the event loop while the engine's thread draws tokens.

    Args:
        service: what serves it.
        asked: the request.
        adapter: its adapter, several with their strengths, or None for the base model.
        ids: the tokens of every prompt; each gets ``asked.n`` completions.
        max_tokens: limit of the tokens of a completion.
        logprobs: as :class:`lowrank_ops.serving.sampling.Sampler` takes it.
        grammar: makes a matcher for each completion.
        prefixes: for every prompt a text to put before its completions; with ``logprobs`` its tokens are scored too.
    """

    prefix, object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        service: Service,
        asked: DrawingRequest,
        adapter: Adapters,
        ids: list[list[int]],
        *,
        max_tokens: int,
        logprobs: int | None,
        grammar: Callable[[], Any],
        prefixes: Sequence[str] = (),
    ) -> None:
        self.service, self.asked, self.ids = service, asked, ids
        self.events: asyncio.Queue[tuple[int, str | None, int]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(index: int, text: str | None) -> None:
            event = index, text, len(self.rows[index].drawn)
            with suppress(RuntimeError):  # the loop is closed and nobody waits
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        def decode(tokens: list[int]) -> str:
            return service.tokenizer.decode(tokens, skip_special_tokens=True)

        self.rows = [
            Completion(
                adapter,
                ids[i // asked.n],
                decode=decode,
                on_text=lambda text, i=i: put(i, text),  # type: ignore[misc]
                max_tokens=max_tokens,
                stop=asked.stop,
                echo=bool(prefixes) and logprobs is not None,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=max(asked.top_k, 0),
                min_p=asked.min_p,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                logit_bias=asked.logit_bias,
                # Rows of one request get different seeds; the same seed gives the same answers again.
                seed=None if asked.seed is None else (asked.seed + i) % 2**63,
                logprobs=logprobs,
                grammar=grammar(),
            )
            for i in range(len(ids) * asked.n)
        ]
        for i, row in enumerate(self.rows):
            row.done.add_done_callback(lambda done, i=i: put(i, None))  # type: ignore[misc]
        self._prefixes = [prefixes[i // asked.n] if prefixes else "" for i in range(len(self.rows))]
        self._echoing = {i for i, row in enumerate(self.rows) if row.echo}  # whose answer lacks its prompt's scores
        self._scored = [0] * len(self.rows)  # how many tokens of a row have their log-probabilities in the answer
        self._offsets = [0] * len(self.rows)  # characters of those tokens
        self._begun: set[int] = set()  # rows of which a stream has sent something
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}

    # ---- formats ----

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _pieces(self, index: int, text: str | None, logprobs: Any, reason: str | None) -> Iterator[dict[str, Any]]:
        """The choices of stream events for one more piece of text, None for the end."""
        yield self._choice(index, text or "", logprobs, reason)

    def _format(self, index: int, scores: list[tuple[Score, int | None]]) -> Any:
        """Log-probabilities of tokens; each comes with the token before it."""
        offsets, names, tops = [], [], []
        for score, before in scores:
            name, at = self._token(before, score.token), self._offsets[index]
            names.append(name)
            offsets.append(at)
            # Special tokens have no text in an answer, unless the prompt was given with it.
            shown = score.token not in self.service.special or self._prefixes[index].startswith(name, at)
            self._offsets[index] += len(name) if shown else 0
            top = {self._token(before, token): value for token, value in score.top}
            tops.append(None if score.logprob is None else top)
        return {
            "tokens": names,
            "token_logprobs": [score.logprob for score, _ in scores],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    # ---- the same for all formats ----

    async def whole(self) -> dict[str, Any]:
        texts = list(self._prefixes)
        async for index, text, _ in self._events():
            texts[index] += text or ""
        choices = []
        for i, text in enumerate(texts):
            row = self.rows[i]
            choices.append(self._choice(i, text, await self._logprobs(i, len(row.drawn)), row.done.result()))
        return {**self.head, "object": self.object, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        options = self.asked.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        head = {**self.head, "object": self.piece_object}
        events, unsent = self._events(), list(self._prefixes)
        try:
            async for index, text, drawn in events:
                reason = None if text is not None else self.rows[index].done.result()
                if unsent[index]:
                    text, unsent[index] = unsent[index] + (text or ""), ""
                logprobs = await self._logprobs(index, drawn)
                for choice in self._pieces(index, text, logprobs, reason):
                    yield _event({**head, "choices": [choice], **usage})
        except RequestError as error:
            if not any(row.drawn for row in self.rows):
                raise
            yield _event(load_json(bytes(error.response().body)))
            return
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        if usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _events(self) -> AsyncIterator[tuple[int, str | None, int]]:
        """Yield a row's index, its new text or None at its end, and its number of tokens; leaving drops the rows."""
        left = len(self.rows)
        try:
            while left:
                index, text, drawn = await self.events.get()
                if text is None:
                    left -= 1
                    raise_failure(self.rows[index].done.exception(), self.rows[index])
                yield index, text, drawn
        finally:
            for row in self.rows:
                row.cancelled = True
            self.service.metrics.tokens.labels("completion").inc(sum(len(row.drawn) for row in self.rows))

    def _usage(self) -> dict[str, int]:
        prompt, drawn = sum(map(len, self.ids)), sum(len(row.drawn) for row in self.rows)
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    async def _logprobs(self, index: int, drawn: int) -> Any:
        """The log-probabilities of a row's tokens that the answer has not had so far."""
        row = self.rows[index]
        if row.sampler.logprobs is None:
            return None
        first, self._scored[index] = self._scored[index], drawn
        before: Sequence[int | None] = [row.ids[-1], *row.drawn][first:drawn]
        scores = row.sampler.scores[first:drawn]
        if index in self._echoing:
            self._echoing.remove(index)
            before, scores = [None, *row.ids[:-1], *before], row.prompt_scores + scores
        told = list(zip(scores, before, strict=True))
        if (names := len(told) * (1 + row.sampler.logprobs)) < _FEW_NAMES:
            return self._format(index, told)
        return await in_turn(_NAME * names, self._format, index, told)

    def _token(self, before: int | None, token: int) -> str:
        """The text of a token after another one, on which a space between them may depend."""
        decode = self.service.tokenizer.decode
        if before is None:
            return decode([token])
        known, both = decode([before]), decode([before, token])
        apart = known.endswith("\ufffd") or not both.startswith(known)
        return decode([token]) if apart else both[len(known) :]


class ChatAnswer(Answer):
    """The same for chat completions."""

    prefix, object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *arguments: Any, calls: Callable[[], Calls] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._calls = [calls() if calls else None for _ in self.rows]  # what takes calls of tools out of the texts

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        text, made, reason = self._called(index, text, reason, last=True)
        if made:
            message |= {"content": text or None, "tool_calls": [call.entry() for call in made]}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _called(self, index: int, text: str, reason: str | None, last: bool) -> tuple[str, list[Call], str | None]:
        """The text without calls, the calls, and the reason of the end, which is a call where a row has ended with one."""
        if (calls := self._calls[index]) is None:
            return text, [], reason
        text, made = calls.add(text, last)
        return text, made, "tool_calls" if calls.found and reason == "stop" else reason

    def _pieces(self, index: int, text: str | None, logprobs: Any, reason: str | None) -> Iterator[dict[str, Any]]:
        def piece(delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
            return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

        if index not in self._begun:
            self._begun.add(index)
            yield piece({"role": "assistant", "content": ""})
        before = calls.found if (calls := self._calls[index]) else 0
        plain, made, reason = self._called(index, text or "", reason, text is None)
        delta: dict[str, Any] = {"content": plain} if plain else {}
        if made:
            delta["tool_calls"] = [{"index": before + i, **call.entry()} for i, call in enumerate(made)]
        if text is None and delta:  # the end says nothing else
            yield piece(delta, logprobs)
            delta, logprobs = {}, None
        if text is None or delta or logprobs:
            yield piece(delta, logprobs, reason)

    def _format(self, index: int, scores: list[tuple[Score, int | None]]) -> Any:
        def entry(before: int | None, token: int, value: float | None) -> dict[str, Any]:
            text = self._token(before, token)
            return {"token": text, "logprob": value, "bytes": _bytes(self.service.tokenizer, token, text)}

        content = []
        for score, before in scores:
            top = [entry(before, token, value) for token, value in score.top]
            content.append({**entry(before, score.token, score.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@cache
def byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable bytes themselves, others from U+0100 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _bytes(tokenizer: Any, token: int, text: str) -> list[int]:
    """The bytes of a token: of its text, unless that is a part of a character."""
    if "\ufffd" in text:
        name, letters = tokenizer.convert_ids_to_tokens(token), byte_letters()
        if name and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return [int(name[3:5], 16)]
        if name and all(letter in letters for letter in name):
            return [letters[letter] for letter in name]
    return list(text.encode(errors="replace"))
