"""``lowrank-ops reward pairs.jsonl``: train a reward model, a 4-bit base with an adapter and a head, on pairs of answers.

``--demo`` makes its own pairs: given a function of the standard library, its own docstring is preferred to that of
another function of the same module.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank_ops as lo

from ..files import write_text
from ..preference import load_reward_model, reward_model, save_reward_model
from ..preference.pairs import PreferencePair, RewardError, listed, read_pairs, split_pairs
from ..preference.train import encode, evaluate, gaps, labels_of, max_tokens, train
from . import _data
from ._cli import CommandError, add_json, check_outputs, make_console, write_json

# For the demo: limits on the tokens of a function's source and of a docstring, which keep a step short.
PROMPT_TOKENS, ANSWER_TOKENS = 64, 32


# ---- the demo's pairs ----


def demo_pairs(functions: Sequence[_data.Pair], tokenizer: Any, seed: int) -> list[dict[str, str]]:
    """Make a row for each function: its source, its own docstring, and the docstring of another function of its module."""

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
    """Write training pairs, and test pairs of other modules, to files like a user's."""
    paths = folder / "train.jsonl", folder / "test.jsonl"
    # The test pairs are the same for every seed.
    for path, functions, of in zip(paths, _data.hold_out(_data.load_pairs()), (seed, 0), strict=True):
        rows = demo_pairs(functions, tokenizer, of)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return paths


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument("pairs", nargs="*", help="JSONL: prompt, chosen, rejected, and optionally margin and label")
    parser.add_argument("--demo", action="store_true", help="make pairs from the standard library (5 minutes)")
    parser.add_argument("--eval", metavar="FILE", help="pairs to measure on (default: hold out a part of the pairs)")
    parser.add_argument("--holdout", type=float, default=0.1, help="the part to hold out (default %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face encoder or decoder on disk (default: MiniLM-L6)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the pairs (default %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps, in place of --epochs (with --demo 90)")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs in a step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA adapter (default %(default)s)")
    parser.add_argument(
        "--center", type=float, default=0.0, help="weight of (chosen + rejected)^2 (default %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=1024, help="limit of the tokens of prompt and answer (default %(default)s)"
    )
    parser.add_argument(
        "--bad-rows",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with malformed or too long rows; they are reported either way (default: stop)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of head, adapter, holdout and batches (default %(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="directory for head and adapter (default: a new temporary folder)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, 1 if the reloaded model disagrees, or 2 after an error message."""
    try:
        _check(arguments)
        results = _run(arguments)
        write_json(results, arguments.json)
    except (RewardError, CommandError, OSError) as error:
        print(f"lowrank-ops reward: {error}", file=sys.stderr)
        return 2
    return 0 if results["reloaded"]["agrees"] else 1


def _check(arguments: argparse.Namespace) -> None:
    """Refuse bad options before minutes of work."""
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
    check_outputs(arguments)


def _report_bad(bad: dict[str, str], arguments: argparse.Namespace, of: int, console: Any) -> None:
    if not bad:
        return
    if arguments.bad_rows == "stop":
        raise RewardError(
            f"{len(bad)} of {of} pairs cannot be used:\n{listed(bad, 20)}\nfix them, or leave them out with --bad-rows skip"
        )
    console.print(f"left out {len(bad)} of {of} pairs:\n{listed(bad)}", markup=False)


def _report_unread(pairs: Sequence[PreferencePair], console: Any) -> None:
    counts = Counter(column for pair in pairs for column in pair.unread)
    if counts:
        named = ", ".join(f"{column!r} ({count} rows)" for column, count in counts.items())
        console.print(f"columns not read: {named}", markup=False)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    console = make_console(arguments)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    began, cpu = time.perf_counter(), time.process_time()

    def load() -> tuple[nn.Module, Any]:
        if arguments.model:
            model, tokenizer = _data.load_transformer(arguments.model, quantized=True)
        else:
            model, tokenizer = _data.load_model(quantized=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise RewardError(f"the tokenizer in {arguments.model} has neither a padding nor an end-of-text token")
        return model, tokenizer

    base, tokenizer = load()
    matrices = [layer.weight for layer in base.modules() if isinstance(layer, lo.Linear)]  # no parameters
    parameters = sum(t.numel() for t in (*base.parameters(), *matrices) if t is not None)
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="lowrank-ops-reward-"))
    files, eval_file = arguments.pairs, arguments.eval
    if arguments.demo:
        train_file, eval_file = _write_demo(folder, tokenizer, arguments.seed)
        files = [train_file]
    pairs, bad = read_pairs(files)
    _report_bad(bad, arguments, len(pairs) + len(bad), console)
    _report_unread(pairs, console)
    if eval_file:
        held, bad = read_pairs([eval_file], named=True)
        _report_bad(bad, arguments, len(held) + len(bad), console)
        _report_unread(held, console)
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
        _report_bad(bad, arguments, len(some), console)
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
        # A bar moves only in a terminal; a log gets ten lines.
        if not console.is_terminal and step % max(1, steps // 10) == 0:
            console.print(f"train   loss {loss:.3f}, accuracy {now} after {step} of {steps} steps")

    labels = labels_of(test_pairs)
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
    console.print(_format_result(measured, len(test_pairs)))

    save_reward_model(model, folder)
    console.print(f"saved   {folder} (the adapter in PEFT's layout, and reward_head.safetensors)", markup=False)
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


def _format_result(measured: dict[str, dict[str, Any]], count: int) -> str:
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
