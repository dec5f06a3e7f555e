"""The options of ``lowrank-ops demo`` and their checks."""

from __future__ import annotations

import argparse
import math

from .._cli import CommandError, add_json, check_outputs

# Options that choose another demo, and the modules that run them.
MODES = ("compare", "serve", "experts", "chat")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument(
        "--steps",
        type=int,
        help="training steps (default 60, with --compare 40, with --serve 8, with --experts 100)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=16,
        help="rank of the LoRA adapter; LoRA-XS uses 4 times this (default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the adapter's initial values and the batches; the test does not change",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="pairs or texts in a step (default 32, with --compare and --experts 16, with --serve and --chat 8)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="peak learning rate (default 0.001, with --experts 0.003; with --compare and --serve each kind has its own)",
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="another Hugging Face encoder on disk (default: MiniLM-L6), with --chat a causal model (default: Gemma 3 270M)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="directory for the adapter or the plot, with --chat for all that is made (default: a new temporary folder, "
        "with --chat lowrank-ops/chat in the user's cache)",
    )
    add_json(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train one adapter of every kind, and print a table and plot (15 minutes)",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="train four small adapters of different kinds and serve them in one batch (2 minutes)",
    )
    parser.add_argument(
        "--experts",
        action="store_true",
        help="train a small mixture of experts from scratch, and adapters over its experts in 4 bits (3 minutes)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="fetch Gemma 3 270M, quantise it with and without data, train an adapter that explains functions, and ask "
        "both over HTTP (6 minutes)",
    )
    parser.add_argument(
        "--accept-licence",
        action="store_true",
        help="with --chat: do not ask whether the Gemma Terms of Use are accepted",
    )
    parser.add_argument(
        "--kinds", metavar="NAMES", help="with --compare: names of kinds, separated by commas (default: all)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="with --compare: the PNG file (default: adapters.png in the directory of --out)"
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse bad options before minutes of work; fill in the defaults that --compare and --serve change."""
    modes = [mode for mode in MODES if getattr(arguments, mode)]
    if len(modes) > 1:
        raise CommandError(f"--{modes[0]} does not go with --{modes[1]}")
    mode = modes[0] if modes else None
    if mode in ("compare", "serve") and arguments.learning_rate is not None:
        raise CommandError(f"--learning-rate does not go with --{mode}, where each kind has its own")
    for option in ("kinds", "plot"):
        if not arguments.compare and getattr(arguments, option) is not None:
            raise CommandError(f"--{option} needs --compare")
    if arguments.accept_licence and not arguments.chat:
        raise CommandError("--accept-licence needs --chat")
    if mode == "experts" and arguments.model is not None:
        raise CommandError("--model does not go with --experts, which trains a model of its own")
    steps, batch_size, rate = {
        None: (60, 32, 1e-3), "compare": (40, 16, 1e-3), "serve": (8, 8, 1e-3), "experts": (100, 16, 3e-3),
        "chat": (60, 8, 1e-3),
    }[mode]  # fmt: skip
    for option, default in (("steps", steps), ("batch_size", batch_size), ("learning_rate", rate)):
        if getattr(arguments, option) is None:
            setattr(arguments, option, default)
    for option, least, why in (
        ("steps", 1, ""),
        ("rank", 1, ""),
        ("batch_size", 2, ", because a docstring must be matched against another body"),
    ):
        value = getattr(arguments, option)
        if value < least:
            raise CommandError(f"--{option.replace('_', '-')} must be at least {least}{why}, got {value}")
    if not (math.isfinite(arguments.learning_rate) and arguments.learning_rate > 0):
        raise CommandError(f"--learning-rate must be a number above 0, got {arguments.learning_rate}")
    check_outputs(arguments)
