"""The task of ``lowrank-ops demo --chat``: a language model reads a function and says in a sentence what it does.

The functions are those of the standard library, the sentence is the first paragraph of a docstring. Whole top-level
modules are held out for the test.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lowrank_ops as lo

from .._data import Pair
from ..text import first_tokens
from .task import descend

QUESTION_TOKENS = 64
ANSWER_TOKENS = 24
# Texts in a forward without gradients.
CHUNK = 16


class Example(NamedTuple):
    """A question and its answer, as texts and as tokens."""

    question: str
    answer: str
    question_ids: list[int]
    answer_ids: list[int]


def ask(code: str) -> str:
    """The text that asks what a function does; the model goes on with the answer."""
    return f"{code}\n\n# What it does:"


def source(pair: Pair) -> str:
    """A function without its docstring."""
    return f"{pair.definition}\n{textwrap.indent(pair.body, '    ')}"


def examples(tokenizer: Any, pairs: Sequence[Pair]) -> list[Example]:
    """The functions whose question and answer are short, each with the token that ends the answer."""
    answers = [" ".join(pair.docstring.partition("\n\n")[0].split()) for pair in pairs]
    questions = [ask(source(pair)) for pair in pairs]
    first, end = first_tokens(tokenizer), tokenizer.eos_token_id
    of_questions, of_answers = (
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for texts in (questions, [f" {answer}" for answer in answers])
    )
    made = (
        Example(question, answer, first + ids, [*more, end])
        for question, answer, ids, more in zip(questions, answers, of_questions, of_answers, strict=True)
    )
    return [e for e in made if len(e.question_ids) <= QUESTION_TOKENS and 4 <= len(e.answer_ids) <= ANSWER_TOKENS]


def answer_loss(model: nn.Module, batch: Sequence[Example], pad: int) -> Tensor:
    """The sum over the answers' tokens of −log p(token | question and answer so far).

    Questions begin with padding, so that all answers end at the last column and only the last logits are computed.
    """
    rows = [example.question_ids + example.answer_ids for example in batch]
    longest, most = max(map(len, rows)), max(len(example.answer_ids) for example in batch)
    ids = torch.full((len(rows), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full((len(rows), most), -100)
    for n, (row, example) in enumerate(zip(rows, batch, strict=True)):
        ids[n, longest - len(row) :] = torch.tensor(row)
        mask[n, longest - len(row) :] = 1
        labels[n, most - len(example.answer_ids) :] = torch.tensor(example.answer_ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=most + 1
    ).logits  # fmt: skip
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, test: Sequence[Example], pad: int) -> float:
    """The mean loss of a token of the answers, in nats."""
    ordered = sorted(test, key=lambda example: len(example.question_ids))
    chunks = [ordered[n : n + CHUNK] for n in range(0, len(ordered), CHUNK)]
    total = sum(float(answer_loss(model, chunk, pad)) for chunk in chunks)
    return total / sum(len(example.answer_ids) for example in test)


def train(
    model: nn.Module,
    training: Sequence[Example],
    pad: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model's adapters on questions and answers; return the loss of every step, a mean over answers' tokens."""
    batches = _batches(training, batch_size, random.Random(seed))

    def loss() -> Tensor:
        batch = next(batches)
        return answer_loss(model, batch, pad) / sum(len(example.answer_ids) for example in batch)

    return descend(lo.adapter_parameters(model), loss, steps, learning_rate, on_step=on_step)


def _batches(training: Sequence[Example], size: int, generator: random.Random) -> Iterator[list[Example]]:
    """Yield batches of texts of similar length endlessly; each pass has new ones and drops the remainder."""
    order = list(training)
    while True:
        generator.shuffle(order)
        order.sort(key=lambda example: len(example.question_ids) + len(example.answer_ids))
        first = generator.randrange(len(order) % size + 1)
        batches = [order[start : start + size] for start in range(first, len(order) - size + 1, size)]
        generator.shuffle(batches)
        yield from batches
