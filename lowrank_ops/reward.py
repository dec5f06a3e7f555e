"""``lowrank-ops reward pairs.jsonl``: train a reward model, a 4-bit base with an adapter and a head, on pairs of answers.

The pieces (:func:`encode`, :func:`rewards`, :func:`train`, :func:`evaluate`) are plain functions that can be used by
themselves. ``--demo`` makes its own pairs: of a function of the standard library and two docstrings, its own is the one to
prefer to that of another function of the same module.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lo

from . import demo
from ._pairs import Messages, PreferencePair, RewardError, listed, read_pairs, split_pairs
from .preference import RewardModel, bradley_terry_loss, load_reward_model, reward_model, save_reward_model

# Texts of like length that pass through the model together; small enough that little of a batch is padding.
CHUNK = 16
BINS = 5  # of the confidence, from 1/2 to 1
# Of the demo: a function's source and a docstring are cut after so many tokens, which keeps a step short.
PROMPT_TOKENS, ANSWER_TOKENS = 64, 32


@dataclass(frozen=True)
class Encoded:
    """A pair in tokens: what the tokenizer makes of either answer, without padding."""

    pair: PreferencePair
    chosen: dict[str, list[int]]
    rejected: dict[str, list[int]]


# ---- tokens ----


def max_tokens(model: nn.Module, tokenizer: Any, asked: int) -> int:
    """The longest text: what was asked for, and at most what the model and its tokenizer take."""
    limits = (asked, getattr(model.config, "max_position_embeddings", asked), tokenizer.model_max_length)
    return int(min(limits))


def encode(
    tokenizer: Any, pairs: Sequence[PreferencePair], limit: int, causal: bool
) -> tuple[list[Encoded], dict[str, str]]:
    """The pairs in tokens, and those that are longer than ``limit``: where -> how long.

    A decoder reads the prompt, the answer and an end-of-text token; an encoder whose tokenizer has a separator reads prompt
    and answer as its two segments. Conversations are written by the tokenizer's chat template, or without one as
    ``role: content`` line by line.
    """
    made, bad = [], {}
    for pair in pairs:
        try:
            sides = [_tokens(tokenizer, pair.prompt, answer, causal) for answer in (pair.chosen, pair.rejected)]
        except ValueError as error:
            bad[pair.where] = str(error)
            continue
        lengths = {n: len(side["input_ids"]) for n, side in zip(("chosen", "rejected"), sides, strict=True)}
        if max(lengths.values()) > limit:
            name = max(lengths, key=lambda n: lengths[n])
            bad[pair.where] = f"is too long: prompt and {name!r} are {lengths[name]} tokens, and {limit} the most"
        elif min(lengths.values()) < 1:
            bad[pair.where] = "has an answer without a token"
        else:
            made.append(Encoded(pair, *sides))
    return made, bad


def _tokens(
    tokenizer: Any, prompt: str | Messages | None, answer: str | Messages, causal: bool
) -> dict[str, list[int]]:
    special = True
    if not isinstance(answer, str) and tokenizer.chat_template is not None:
        messages = [{"role": role, "content": content} for role, content in (*(prompt or ()), *answer)]
        try:
            prompt, answer, special = None, tokenizer.apply_chat_template(messages, tokenize=False), False
        except Exception as error:  # whatever a template raises
            raise ValueError(f"is refused by the model's chat template: {error}") from error
    first, second = _written(prompt), _written(answer)
    if first is not None and not causal and tokenizer.sep_token is not None:
        return dict(tokenizer(first, second, verbose=False))
    # A new line keeps conversations apart, where texts are continued as they are.
    text = second if first is None else first + ("" if isinstance(prompt, str) else "\n") + str(second)
    made = {k: list(v) for k, v in tokenizer(text, add_special_tokens=special, verbose=False).items()}
    end = tokenizer.eos_token_id
    if causal and end is not None and made["input_ids"][-1:] != [end]:
        for name, value in (("input_ids", end), ("attention_mask", 1), ("token_type_ids", 0)):
            if name in made:
                made[name].append(value)
    return made


def _written(text: str | Messages | None) -> str | None:
    if text is None or isinstance(text, str):
        return text
    return "\n".join(f"{role}: {content}" for role, content in text)


# ---- rewarding, measuring, training ----


def rewards(model: RewardModel, tokenizer: Any, texts: Sequence[dict[str, list[int]]]) -> Tensor:
    """The rewards, float32 [len(texts)], differentiable. Texts of like length share a chunk."""
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
    """Reward of chosen less that of rejected, without gradients.

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
    """Accuracy, log loss and calibration of P(chosen preferred) = σ(gap).

    Args:
        gap: [n], finite.
        labels: [n]; pairs of ½ are ties, which neither accuracy nor calibration counts.

    Returns:
        ``accuracy``: the share of pairs ranked as labelled, where equal rewards count as wrong; ``log_loss``: the mean cross
        entropy with the labels; ``calibration_error``: Σ over bins of the confidence σ(|gap|) of the bin's share times
        |its mean confidence − its accuracy|; ``bins``: of each its lower edge, count, confidence and accuracy; ``ties``.
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


def _labels(pairs: Sequence[Encoded]) -> Tensor:
    return torch.tensor([pair.pair.label for pair in pairs])


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
    """Train adapters and head on the Bradley–Terry loss, with the margins and labels of the pairs.

    AdamW; the learning rate climbs over the first tenth of the steps and falls to 0 along a cosine. Each pass over the
    pairs has a new order; its last batch may be smaller. The model stays in the mode it is in: in eval mode dropout of the
    base is off, as TRL has it.

    Args:
        on_step: called after each step with its number from 1, its loss and its accuracy.

    Returns:
        the loss of every step.

    Raises:
        RewardError: a reward is no longer finite; the message names the rows.
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
        margin = torch.tensor([pair.pair.margin for pair in batch], device=chosen.device)
        labels = _labels(batch).to(chosen.device)
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


# ---- the demo's pairs ----


def demo_pairs(functions: Sequence[demo.Pair], tokenizer: Any, seed: int) -> list[dict[str, str]]:
    """A row for each function that has another in its module: its source, its own docstring, and one of another there."""

    def cut(text: str, tokens: int) -> str:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]

    docstrings: dict[str, list[str]] = {}
    for function in functions:
        docstrings.setdefault(function.module, []).append(cut(function.docstring, ANSWER_TOKENS))
    generator, at, rows = random.Random(seed), dict.fromkeys(docstrings, 0), []
    for function in functions:
        own = docstrings[function.module][at[function.module]]
        at[function.module] += 1
        others = [text for text in docstrings[function.module] if text != own]
        if others:
            source = cut(f"{function.definition}\n{function.body}", PROMPT_TOKENS)
            rows.append({"prompt": source, "chosen": own, "rejected": generator.choice(others)})
    return rows


def _write_demo(folder: Path, tokenizer: Any, seed: int) -> tuple[Path, Path]:
    """Pairs to train on and pairs of other modules to measure on, as files like a user's own."""
    paths = folder / "train.jsonl", folder / "test.jsonl"
    # The test stays the same for every seed.
    for path, functions, of in zip(paths, demo.split(demo.load_pairs()), (seed, 0), strict=True):
        rows = demo_pairs(functions, tokenizer, of)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument("pairs", nargs="*", help="JSONL: prompt, chosen, rejected, and optionally margin and label")
    parser.add_argument("--demo", action="store_true", help="make pairs from the standard library (5 minutes)")
    parser.add_argument("--eval", metavar="FILE", help="pairs to measure on (default: a part of the pairs is held out)")
    parser.add_argument("--holdout", type=float, default=0.1, help="the part that is held out (default %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face encoder or decoder on disk (default: MiniLM-L6)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the pairs (default %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps, instead of --epochs (with --demo 90)")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs in a step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA adapter (default %(default)s)")
    parser.add_argument(
        "--center", type=float, default=0.0, help="weight of (chosen + rejected)^2 (default %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=1024, help="tokens of prompt and answer (default %(default)s)"
    )
    parser.add_argument(
        "--bad-rows",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about rows that are malformed or too long; they are reported either way (default: stop)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of head, adapter, split and batches (default %(default)s)")
    parser.add_argument(
        "--out", metavar="DIR", help="where head and adapter are saved (default: a new temporary folder)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write the results as JSON; to standard output without FILE",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 0, or 1 where the reloaded model disagrees, or 2 after a message about what is wrong."""
    try:
        _check(arguments)
        results = _run(arguments)
        demo.write_json(results, arguments.json)
    except (RewardError, demo.DemoError, OSError) as error:
        print(f"lowrank-ops reward: {error}", file=sys.stderr)
        return 2
    return 0 if results["reloaded"]["agrees"] else 1


def _check(arguments: argparse.Namespace) -> None:
    """Refuse bad options before minutes of work, not after them."""
    if arguments.demo and (arguments.pairs or arguments.eval):
        raise RewardError("--demo makes its own pairs: leave out the files")
    if not arguments.demo and not arguments.pairs:
        raise RewardError("give a JSONL file of pairs, or --demo")
    if arguments.steps is None and arguments.demo:
        arguments.steps = 90
    for option in ("steps", "batch_size", "rank", "max_length"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise RewardError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    for option, most in (("holdout", 1.0), ("epochs", math.inf), ("learning_rate", math.inf)):
        value = getattr(arguments, option)
        if not 0 < value < most:
            raise RewardError(f"--{option.replace('_', '-')} must be above 0 and below {most}, got {value}")
    if not (math.isfinite(arguments.center) and arguments.center >= 0):
        raise RewardError(f"--center must be a number of at least 0, got {arguments.center}")
    demo.check_outputs(arguments)


def _reported(bad: dict[str, str], arguments: argparse.Namespace, of: int, console: Any) -> None:
    if not bad:
        return
    if arguments.bad_rows == "stop":
        raise RewardError(
            f"{len(bad)} of {of} pairs cannot be used:\n{listed(bad, 20)}\nmend them, or leave them out with --bad-rows skip"
        )
    console.print(f"left out {len(bad)} of {of} pairs:\n{listed(bad)}", markup=False)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    console = demo.make_console(arguments)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    began, cpu = time.perf_counter(), time.process_time()

    def load() -> tuple[nn.Module, Any]:
        model, tokenizer = demo.load_transformer(arguments.model) if arguments.model else demo.load_model()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise RewardError(f"the tokenizer in {arguments.model} has neither a padding nor an end-of-text token")
        return model, tokenizer

    base, tokenizer = load()
    parameters = sum(p.numel() for p in base.parameters())
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="lowrank-ops-reward-"))
    files, eval_file = arguments.pairs, arguments.eval
    if arguments.demo:
        train_file, eval_file = _write_demo(folder, tokenizer, arguments.seed)
        files = [train_file]
    pairs, bad = read_pairs(files)
    _reported(bad, arguments, len(pairs) + len(bad), console)
    if eval_file:
        held, bad = read_pairs([eval_file], named=True)
        _reported(bad, arguments, len(held) + len(bad), console)
    if not pairs or (eval_file and not held):
        raise RewardError(f"no pair is left {'to train on' if not pairs else 'to measure on'}")

    torch.manual_seed(arguments.seed)
    try:
        model = reward_model(base, lo.LoRA(rank=arguments.rank, alpha=2 * arguments.rank)).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"cannot make a reward model of this base: {error}") from error
    causal = model.head.pooling == "last"
    limit = max_tokens(base, tokenizer, arguments.max_length)
    if not eval_file:
        pairs, held = split_pairs(pairs, arguments.holdout, arguments.seed)
    encoded = []
    for some in (pairs, held):
        made, bad = encode(tokenizer, some, limit, causal)
        _reported(bad, arguments, len(some), console)
        if not made:
            raise RewardError(f"all of {len(some)} pairs are longer than {limit} tokens")
        encoded.append(made)
    train_pairs, test_pairs = encoded
    steps = arguments.steps or math.ceil(arguments.epochs * math.ceil(len(train_pairs) / arguments.batch_size))
    kind = getattr(base.config, "model_type", "model")
    console.print(
        f"model   {kind}, {parameters / 1e6:.1f} M parameters, NF4 with LoRA of rank {arguments.rank}; the reward is read "
        f"from the {'last token' if causal else 'mean of the tokens'}"
    )
    console.print(
        f"pairs   {len(train_pairs)} to train on, {len(test_pairs)} to measure on, at most {limit} tokens each"
    )
    if arguments.demo:
        row = pairs[0]
        console.print(
            f"task    which docstring is this function's? {str(row.prompt).splitlines()[0]!r}\n        own    "
            f"{str(row.chosen)[:70]!r}\n        other  {str(row.rejected)[:70]!r}",
            markup=False,
        )

    columns = (
        TextColumn("train   loss {task.fields[loss]} accuracy {task.fields[accuracy]}"),
        *(BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()),
    )
    seen: list[float] = []

    def show(step: int, loss: float, accuracy: float) -> None:
        seen.append(accuracy)
        known = [a for a in seen[-10:] if not math.isnan(a)]
        now = f"{sum(known) / len(known):.2f}" if known else "-"
        progress.update(bar, completed=step, loss=f"{loss:.3f}", accuracy=now)
        # A bar moves in a terminal only; a log gets ten lines.
        if not console.is_terminal and step % max(1, steps // 10) == 0:
            console.print(f"train   loss {loss:.3f}, accuracy {now} after {step} of {steps} steps")

    labels = _labels(test_pairs)
    measured = {"before": evaluate(gaps(model, tokenizer, test_pairs), labels)}
    started = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=steps, loss="  ...", accuracy=" ...")
        losses = train(
            model,
            tokenizer,
            train_pairs,
            steps=steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            center=arguments.center,
            seed=arguments.seed,
            on_step=show,
        )
    train_seconds = time.perf_counter() - started
    trained = gaps(model, tokenizer, test_pairs)
    measured["after"] = evaluate(trained, labels)
    console.print(_told(measured, len(test_pairs)))

    save_reward_model(model, folder)
    console.print(f"saved   {folder} (the adapter as PEFT has it, and reward_head.safetensors)", markup=False)
    again = gaps(load_reward_model(load()[0], folder).eval(), tokenizer, test_pairs)
    difference = float((trained - again).abs().max())
    agrees = difference <= 1e-5 * max(1.0, float(trained.abs().max()))
    console.print(
        f"loaded  onto a fresh base: largest difference of a gap {difference:.1e}, "
        f"{'agrees' if agrees else '[bold red]DISAGREES[/bold red]'}"
    )
    seconds = {"total": time.perf_counter() - began, "train": train_seconds, "cpu": time.process_time() - cpu}
    console.print(f"done    in {seconds['total']:.0f} s ({seconds['cpu']:.0f} s of CPU time)")
    return {
        "model": str(base.name_or_path),
        "pairs": {"train": len(train_pairs), "test": len(test_pairs)},
        "steps": steps,
        "seed": arguments.seed,
        "loss": losses,
        "measured": measured,
        "reloaded": {"max_difference": difference, "agrees": agrees},
        "seconds": seconds,
        "saved": str(folder),
    }


def _told(measured: dict[str, dict[str, Any]], count: int) -> str:
    before, after = measured["before"], measured["after"]
    if after["accuracy"] is None:
        return f"result  log loss {before['log_loss']:.3f} -> {after['log_loss']:.3f} on {count} ties"
    ties = f", {after['ties']} ties aside" if after["ties"] else ""
    lines = [
        f"result  accuracy {before['accuracy']:.3f} -> [bold]{after['accuracy']:.3f}[/bold] on {count} held-out pairs{ties}",
        f"        log loss {before['log_loss']:.3f} -> {after['log_loss']:.3f} (0.693 is a coin), calibration error "
        f"{after['calibration_error']:.3f}",
    ]
    for b in after["bins"]:
        if b["count"]:
            lines.append(
                f"        {b['count']:5d} pairs as sure as {b['confidence']:.2f}: right in {b['accuracy']:.2f}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lowrank-ops reward", description=(__doc__ or "").split("\n\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
