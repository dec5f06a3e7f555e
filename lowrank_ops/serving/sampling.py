"""Draw the next token from a model's logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-5  # below it logits / temperature overflows, and the most probable token has all of p anyway
_AT_ONCE = 32  # rows of logits that are float32 at once
_MOST_LIKELY = 1024  # candidates among which top_p is looked for before all tokens are sorted


@dataclass(frozen=True)
class Score:
    """A token and the log-probabilities log softmax(z) of the model's logits z before it.

    Attributes:
        token: its id.
        logprob: its log-probability; None for the first token of a text.
        top: ids and log-probabilities of the most probable tokens, in descending order.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Sampler:
    """Draw tokens of one completion from the model's logits z [vocabulary].

        z' = z + bias - presence · [c > 0] - frequency · c,   c[t] = how often the completion has token t so far
        p  = softmax(z' / temperature)

    p is cut three times: to the ``top_k`` most probable tokens; of those to the fewest whose share reaches ``top_p``; of
    those to tokens with p >= min_p · max p. A token is drawn in proportion to what is left. With a grammar, tokens that
    it does not allow have z' = -inf.

    Args:
        temperature: below 1e-5 the most probable token is taken.
        top_p: in (0, 1].
        top_k: 0 for all tokens.
        min_p: in [0, 1].
        presence_penalty, frequency_penalty: see above; the prompt does not count.
        logit_bias: token id -> bias.
        seed: seed of the completion's own generator; None for a different one every time.
        logprobs: how many of the most probable tokens ``scores`` has beside each drawn one; None keeps no scores.
        grammar: a :class:`lowrank_ops.serving.grammar.Matcher`.

    Attributes:
        scores: a :class:`Score` for each drawn token, of the logits before bias, penalties, grammar and temperature.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        grammar: Any = None,
    ) -> None:
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        self.presence_penalty, self.frequency_penalty = presence_penalty, frequency_penalty
        self.logprobs, self.grammar = logprobs, grammar
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.scores: list[Score] = []
        self._bias = (torch.tensor(list(logit_bias)), torch.tensor(list(logit_bias.values()))) if logit_bias else None
        self._counts: Counter[int] | None = Counter() if presence_penalty or frequency_penalty else None

    def choose(self, logits: Tensor) -> int:
        """Choose the next token from logits [vocabulary]."""
        z = logits
        if self._bias or self._counts or self.grammar:
            z = self._adjust(logits.float().cpu())
        token = int(z.argmax()) if self.temperature < LEAST_TEMPERATURE else self._draw(z)
        if self.logprobs is not None:
            self.scores += scores_of(logits[None], [token], self.logprobs)
        if self._counts is not None:
            self._counts[token] += 1
        if self.grammar is not None:
            self.grammar.take(token)
        return token

    def _adjust(self, logits: Tensor) -> Tensor:
        z = logits.clone()
        if self._bias:
            z[self._bias[0]] += self._bias[1]
        if self._counts:
            ids, counts = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            z[ids] -= self.presence_penalty + self.frequency_penalty * counts
        if self.grammar is not None:
            z[~self.grammar.allowed(len(z))] = -torch.inf
        return z

    def _draw(self, z: Tensor) -> int:
        p = (z.float().cpu() / self.temperature).softmax(-1)
        index = None
        if 0 < self.top_k < len(p):
            p, index = p.topk(self.top_k)
            p = p / p.sum()
        elif self.top_p < 1:
            likely, found = p.topk(min(len(p), _MOST_LIKELY))
            p, index = (likely, found) if likely.sum() >= self.top_p else p.sort(descending=True)
        if self.top_p < 1:
            count = int((p.cumsum(0) - p < self.top_p).sum())
            p = p[: max(count, 1)]  # a top_p that float32 rounds to 0 keeps one
        if self.min_p > 0:
            p = p.where(p >= self.min_p * p.max(), 0)
        # The first token at which the sum of p passes a random share of it; torch.multinomial draws a number per token.
        sums = p.double().cumsum(0)
        share = torch.rand(1, dtype=torch.float64, generator=self.generator) * sums[-1]
        if not bool(share < sums[-1]):
            raise RuntimeError("the model's logits are not finite numbers")
        drawn = int(torch.searchsorted(sums, share, right=True))
        return drawn if index is None else int(index[drawn])


def scores_of(logits: Tensor, tokens: Sequence[int], count: int) -> list[Score]:
    """The scores of tokens, each by its row of logits [tokens, vocabulary], with the ``count`` most probable ones."""
    scores: list[Score] = []
    given = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    for z, few in zip(logits.split(_AT_ONCE), given.split(_AT_ONCE), strict=True):
        z = z.float()
        totals = z.logsumexp(-1, keepdim=True)
        values = (z.gather(1, few[:, None]) - totals)[:, 0]
        best, ids = z.topk(min(count, z.shape[1]))
        tops = zip(ids.tolist(), (best - totals).tolist(), strict=True)
        for token, value, top in zip(few.tolist(), values.tolist(), tops, strict=True):
            scores.append(Score(token, value, list(zip(*top, strict=True))))
    return scores
