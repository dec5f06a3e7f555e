"""Train and evaluate reward models on pairs of answers.

:func:`encode`, :func:`rewards`, :func:`train` and :func:`evaluate` are plain functions that can be used separately;
``lowrank-ops reward`` runs them one after another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..files import load_json
from .loss import bradley_terry_loss
from .pairs import Messages, PreferencePair, RewardError
from .reward import RewardModel

# Number of texts of similar length in a forward; small, so that little of a batch is padding.
CHUNK = 16
BINS = 5  # bins of the confidence, from 1/2 to 1


@dataclass(frozen=True)
class Encoded:
    """A tokenized pair: the tokenizer's output for each answer, without padding."""

    pair: PreferencePair
    chosen: dict[str, list[int]]
    rejected: dict[str, list[int]]


def max_tokens(model: nn.Module, tokenizer: Any, asked: int) -> int:
    """The limit of a text's length: as requested, but at most what the model and its tokenizer take."""
    limits = (asked, getattr(model.config, "max_position_embeddings", asked), tokenizer.model_max_length)
    return int(min(limits))


def encode(
    tokenizer: Any, pairs: Sequence[PreferencePair], limit: int, causal: bool
) -> tuple[list[Encoded], dict[str, str]]:
    """Tokenize pairs; return them and the pairs longer than ``limit`` as where -> length.

    A decoder reads the prompt, the answer and an end-of-text token; an encoder whose tokenizer has a separator reads
    prompt and answer as two segments. The tokenizer's chat template writes conversations; without a template each
    message becomes a line ``role: content``. A pair is bad too where a field of a message or of the row, such as
    ``tool_calls`` or ``tools``, leaves no trace in the text.
    """
    made, bad = [], {}
    for pair in pairs:
        try:
            sides = [_tokens(tokenizer, pair, answer, causal) for answer in (pair.chosen, pair.rejected)]
        except ValueError as error:
            bad[pair.where] = str(error)
            continue
        lengths = {n: len(side["input_ids"]) for n, side in zip(("chosen", "rejected"), sides, strict=True)}
        if max(lengths.values()) > limit:
            name = max(lengths, key=lambda n: lengths[n])
            bad[pair.where] = f"is too long: prompt and {name!r} are {lengths[name]} tokens, and the limit is {limit}"
        elif min(lengths.values()) < 1:
            bad[pair.where] = "has an answer without a token"
        elif sides[0] == sides[1] and pair.label != 0.5:
            bad[pair.where] = "has answers that become the same tokens, without the 'label' 0.5"
        else:
            made.append(Encoded(pair, *sides))
    return made, bad


def _tokens(tokenizer: Any, pair: PreferencePair, answer: str | Messages, causal: bool) -> dict[str, list[int]]:
    prompt, special = pair.prompt, True
    if not isinstance(answer, str):
        written = _by_template(tokenizer, pair, answer)
        if written is not None:
            prompt, answer, special = None, written, False
    first, second = _format_text(prompt), _format_text(answer)
    if first is not None and not causal and tokenizer.sep_token is not None:
        return dict(tokenizer(first, second, verbose=False))
    # A newline separates conversations; plain texts are continued directly.
    text = second if first is None else first + ("" if isinstance(prompt, str) else "\n") + str(second)
    made = {k: list(v) for k, v in tokenizer(text, add_special_tokens=special, verbose=False).items()}
    end = tokenizer.eos_token_id
    if causal and end is not None and made["input_ids"][-1:] != [end]:
        for name, value in (("input_ids", end), ("attention_mask", 1), ("token_type_ids", 0)):
            if name in made:
                made[name].append(value)
    return made


def _by_template(tokenizer: Any, pair: PreferencePair, answer: Messages) -> str | None:
    """The conversation as the chat template writes it; None without a template.

    Raises:
        ValueError: the template refuses it, or what the row holds does not reach the text.
    """
    messages = [message.as_dict() for message in (*(pair.prompt or ()), *answer)]
    given = {"tools": [load_json(tool) for tool in pair.tools] or None, **load_json(pair.template_kwargs)}
    beyond = sorted({name for message in (*(pair.prompt or ()), *answer) for name in message.beyond()})
    if tokenizer.chat_template is None:
        if beyond or any(given.values()):
            names = ", ".join(map(repr, [*beyond, *(name for name, value in given.items() if value)]))
            raise ValueError(f"holds {names}, which only a chat template can write, and the tokenizer has none")
        return None

    def write(messages: list[dict[str, Any]], given: dict[str, Any]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))
        except Exception as error:  # a template may raise anything
            raise ValueError(f"is refused by the model's chat template: {error}") from error

    text = write(messages, given)
    for field in beyond:
        without = [{name: value for name, value in message.items() if name != field} for message in messages]
        if write(without, given) == text:
            raise ValueError(f"holds {field!r} in a message, which the model's chat template does not write")
    if pair.tools and write(messages, {**given, "tools": None}) == text:
        raise ValueError("holds 'tools', which the model's chat template does not write")
    return text


def _format_text(text: str | Messages | None) -> str | None:
    if text is None or isinstance(text, str):
        return text
    return "\n".join(f"{message.role}: {message.content}" for message in text)


# ---- rewards, evaluation, training ----


def rewards(model: RewardModel, tokenizer: Any, texts: Sequence[dict[str, list[int]]]) -> Tensor:
    """The rewards, float32 [len(texts)], differentiable. Texts of similar length share a chunk."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]["input_ids"]))
    device = model.head.weight.device
    made = []
    for start in range(0, len(order), CHUNK):
        rows = [texts[i] for i in order[start : start + CHUNK]]
        inputs = tokenizer.pad({name: [row[name] for row in rows] for name in rows[0]}, return_tensors="pt")
        made.append(model(**inputs.to(device)))
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    return torch.cat(made)[back.to(device)]


def gaps(model: RewardModel, tokenizer: Any, pairs: Sequence[Encoded]) -> Tensor:
    """The reward of chosen minus the reward of rejected, without gradients.

    Raises:
        RewardError: a gap is not finite; the message names the rows.
    """
    with torch.no_grad():
        both = rewards(model, tokenizer, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    chosen, rejected = both.cpu().chunk(2)
    _check_finite(chosen - rejected, pairs)
    return chosen - rejected


def _check_finite(gap: Tensor, pairs: Sequence[Encoded]) -> None:
    bad = (~torch.isfinite(gap)).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"the rewards of {', '.join(pairs[i].pair.where for i in bad[:5])} are not finite; a lower --learning-rate "
            "may help"
        )


def evaluate(gap: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compute accuracy, log loss and calibration of P(chosen preferred) = σ(gap).

    Args:
        gap: [n], finite.
        labels: [n]; pairs labelled ½ are ties, which accuracy and calibration leave out.

    Returns:
        ``accuracy``: the share of pairs ranked as labelled; equal rewards count as wrong. ``log_loss``: the mean cross
        entropy with the labels. ``calibration_error``: Σ over bins of the confidence σ(|gap|) of the bin's share times
        |its mean confidence − its accuracy|. ``bins``: lower edge, count, confidence and accuracy of each. ``ties``:
        their number.
    """
    decided = labels != 0.5
    right = (torch.where(labels > 0.5, gap, -gap) > 0)[decided].double()
    confidence = torch.sigmoid(gap.double().abs())[decided]
    edges = torch.linspace(0.5, 1, BINS + 1, dtype=torch.float64)
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, BINS - 1)
    bins, error = [], 0.0
    for i in range(BINS):
        inside = index == i
        count = int(inside.sum())
        sure, share = (float(v[inside].mean()) if count else None for v in (confidence, right))
        bins.append({"from": float(edges[i]), "count": count, "confidence": sure, "accuracy": share})
        if sure is not None and share is not None:
            error += count / len(right) * abs(sure - share)
    return {
        "accuracy": float(right.mean()) if len(right) else None,
        "log_loss": float(bradley_terry_loss(gap, torch.zeros_like(gap), labels=labels)),
        "calibration_error": error if len(right) else None,
        "bins": bins,
        "ties": int((~decided).sum()),
    }


def labels_of(pairs: Sequence[Encoded]) -> Tensor:
    """The labels, float32 [len(pairs)]."""
    return torch.tensor([pair.pair.label for pair in pairs], dtype=torch.float32)


def train(
    model: RewardModel,
    tokenizer: Any,
    pairs: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    center: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, float, float], None] | None = None,
) -> list[float]:
    """Train adapters and head on the Bradley–Terry loss with the pairs' margins and labels.

    Uses AdamW; the learning rate rises over the first tenth of the steps and falls to 0 along a cosine. Each pass over
    the pairs has a new order; its last batch may be smaller. The model keeps its mode: in eval mode dropout of the base
    is off, as in TRL.

    Args:
        on_step: called after each step with its number from 1, its loss and its accuracy.

    Returns:
        the loss of every step.

    Raises:
        RewardError: a reward is not finite; the message names the rows.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm_up, generator = max(1, steps // 10), random.Random(seed)
    waiting: list[Encoded] = []
    losses = []
    for step in range(1, steps + 1):
        if not waiting:
            waiting = generator.sample(list(pairs), len(pairs))
        batch, waiting = waiting[:batch_size], waiting[batch_size:]
        texts = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
        chosen, rejected = rewards(model, tokenizer, texts).chunk(2)
        _check_finite((chosen - rejected).detach(), batch)
        margin = torch.tensor([pair.pair.margin for pair in batch], dtype=torch.float32, device=chosen.device)
        labels = labels_of(batch).to(chosen.device)
        loss = bradley_terry_loss(chosen, rejected, margin, labels, center)
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up + 1)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(step / warm_up, decay)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            right = torch.where(labels > 0.5, chosen > rejected, rejected > chosen)[labels != 0.5]
            on_step(step, losses[-1], float(right.float().mean()))
    return losses
