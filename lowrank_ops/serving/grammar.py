"""Completions that follow a JSON schema, by llguidance (an optional extra)."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

EXTRA = 'pip install "lowrank-ops[json]"'


class GrammarError(ValueError):
    """A schema that cannot be followed; the message says why."""


class Grammars:
    """Make matchers for the tokens of one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocabulary: the number of token ids of the model.
        ends: token ids that end a completion.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        self._given = tokenizer, vocabulary, sorted(ends)
        self._lock, self._tokens = threading.Lock(), None

    def make(self, schema: dict[str, Any], begin: str = "", end: str = "") -> Matcher:
        """Create a matcher of the JSON values that a schema describes, between two texts; takes a second the first time.

        Raises:
            ImportError: llguidance is not installed.
            GrammarError: the tokenizer is not a fast one; the schema is wrong, too large, or has a part that llguidance
                cannot follow.
        """
        from llguidance import LLMatcher

        with self._lock:
            if self._tokens is None:
                self._tokens = self._read_tokens()
        # Without spaces of free number a model could go on with spaces for ever.
        compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            if begin:
                value = json.dumps(schema | {"x-guidance": compact})
                grammar = LLMatcher.grammar_from_lark(
                    f"start: {json.dumps(begin)} value {json.dumps(end)}\nvalue: %json {value}"
                )
            else:
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=compact)
        except ValueError as error:
            raise GrammarError(str(error)) from None
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return Matcher(matcher)

    def _read_tokens(self) -> Any:
        import llguidance.hf

        tokenizer, vocabulary, ends = self._given
        if not getattr(tokenizer, "is_fast", False):
            raise GrammarError("this model's tokenizer is not a fast one")
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends or None)


class Matcher:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        """A second one for another completion, before any token."""
        return Matcher(self._matcher.deep_copy())

    def allowed(self, vocabulary: int) -> Tensor:
        """Bools [vocabulary]: the tokens that may come next.

        Raises:
            GrammarError: the schema needs more work for a token than llguidance allows.
        """
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
        return torch.nn.functional.pad(allowed, (0, max(0, vocabulary - len(allowed))))[:vocabulary]

    def take(self, token: int) -> None:
        """Go on by a token."""
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Tell whether the text is complete and nothing may follow."""
        return bool(self._matcher.is_stopped())
