"""The demo's task: a real 4-bit model with a low-rank adapter learns to find a function by its docstring.

A sentence encoder embeds a function's docstring and, separately, the function's body. Its linear layers become NF4 with
an adapter, which is trained so that the two embeddings meet. Whole top-level modules are held out for the test.

:func:`embed`, :func:`evaluate` and :func:`train` are plain functions that can be used separately.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lo

from .._cli import CommandError
from .._data import Pair

EVAL_TOKENS = 128
# Training uses shorter texts than the test: steps are shorter, and the gained rank is the same.
TRAIN_TOKENS = 64
TEMPERATURE = 0.05
# Number of texts of similar length in a forward; small, so that little of a batch is padding.
CHUNK = 16


def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int = EVAL_TOKENS) -> Tensor:
    """e = v / |v|, v = the mean of the last hidden states over a text's tokens.

    Texts of similar length share a chunk, so that little padding is computed.

    Args:
        texts: any number above 0; each is cut after ``max_tokens`` tokens.

    Returns:
        [len(texts), hidden], rows of length 1, differentiable.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=token_limit(model, max_tokens))["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    device = next(model.parameters()).device
    chunks = []
    for start in range(0, len(order), CHUNK):
        rows = [ids[i] for i in order[start : start + CHUNK]]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        chunks.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    return torch.cat(chunks)[back.to(device)]


def embed_pairs(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> Tensor:
    """Embed all docstrings and all bodies, [2, len(pairs), hidden], without gradients."""
    with torch.no_grad():
        queries = embed(model, tokenizer, [pair.docstring for pair in pairs])
        bodies = embed(model, tokenizer, [pair.body for pair in pairs])
    return torch.stack([queries, bodies])


def mean_reciprocal_rank(queries: Tensor, candidates: Tensor) -> float:
    """mean over i of 1 / #{j : ⟨q_i, c_j⟩ >= ⟨q_i, c_i⟩}: 1 if every query finds its own candidate first.

    A tie counts against the query, and so does NaN: a model that maps all texts to one point scores 1/n, not 1.

    Args:
        queries, candidates: [n, hidden]; candidate i is the answer to query i.
    """
    scores = queries @ candidates.T
    ranks = (~(scores < scores.diagonal().unsqueeze(1))).sum(1)
    return float((1 / ranks.double()).mean())


def evaluate(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """The mean reciprocal rank of each docstring's own body among the bodies of all pairs."""
    return mean_reciprocal_rank(*embed_pairs(model, tokenizer, pairs))


def train(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    steps: int = 60,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model's adapters: loss = ½ (CE(S) + CE(Sᵀ)), S[i, j] = ⟨docstring_i, body_j⟩ / TEMPERATURE.

    The other bodies of the batch are wrong matches for a docstring, and the reverse. The model keeps its mode: in eval
    mode the encoder's own dropout is off, which learns more in few steps.

    Args:
        model: after :func:`lowrank_ops.adapt`.
        pairs: at least ``batch_size``.
        on_step: called after each step with its number from 1 and its loss.

    Returns:
        the loss of every step.

    Raises:
        CommandError: the loss is not finite.
    """
    batches = _batches(pairs, batch_size, random.Random(seed))

    def loss() -> Tensor:
        batch = next(batches)
        texts = [pair.docstring for pair in batch] + [pair.body for pair in batch]
        queries, bodies = embed(model, tokenizer, texts, TRAIN_TOKENS).chunk(2)
        scores = queries @ bodies.T / TEMPERATURE
        answers = torch.arange(len(batch), device=scores.device)
        return (nn.functional.cross_entropy(scores, answers) + nn.functional.cross_entropy(scores.T, answers)) / 2

    return descend(lo.adapter_parameters(model), loss, steps, learning_rate, on_step=on_step)


def descend(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    *,
    warm_up: float = 0.1,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Minimise a loss with AdamW; the learning rate rises over a first part of the steps and falls to 0 along a cosine.

    Args:
        loss: gives the loss of the next batch.
        warm_up: the share of the steps over which the rate rises.
        on_step: called after each step with its number from 1 and its loss.

    Returns:
        the loss of every step.

    Raises:
        CommandError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rising, losses = max(1, int(steps * warm_up)), []
    for step in range(1, steps + 1):
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - rising) / max(1, steps - rising + 1)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(step / rising, decay)
        losses.append(take_step(optimizer, parameters, loss()))
        if not math.isfinite(losses[-1]):
            raise CommandError(f"the loss became {losses[-1]} in step {step}; a lower --learning-rate may help")
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


def take_step(optimizer: Any, parameters: Sequence[nn.Parameter], loss: Tensor) -> float:
    """One step of training, with the gradient cut to length 1; return the loss before it."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


def training_tokens(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], *, steps: int, batch_size: int, seed: int
) -> int:
    """Count the tokens that :func:`train` uses with these arguments, without padding."""
    limit = token_limit(model, TRAIN_TOKENS)
    batches = _batches(pairs, batch_size, random.Random(seed))
    texts = [text for _ in range(steps) for pair in next(batches) for text in (pair.docstring, pair.body)]
    return sum(len(ids) for ids in tokenizer(texts, truncation=True, max_length=limit)["input_ids"])


def token_limit(model: nn.Module, max_tokens: int) -> int:
    return min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens))


def _batches(pairs: Sequence[Pair], size: int, generator: random.Random) -> Iterator[list[Pair]]:
    """Yield batches of a fixed size endlessly; each pass over the pairs has a new order and drops the remainder."""
    order = list(pairs)
    while True:
        generator.shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {id(tensor): tensor.nbytes for source in (model.parameters(), model.buffers()) for tensor in source}
    return sum(tensors.values())
