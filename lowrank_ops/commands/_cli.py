"""Helpers of the commands: the error that ends a command, the console, and checking and writing outputs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..files import write_text

EXTRAS = 'pip install "lowrank-ops[demo]"'


class CommandError(Exception):
    """An error the user can fix; the message says how."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option --json."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write the results as JSON; without FILE to standard output",
    )


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse a bad --seed, --json or --out."""
    if not 0 <= arguments.seed < 2**63:
        raise CommandError(f"--seed must be in [0, 2^63), got {arguments.seed}")
    if arguments.json and arguments.json != "-":
        target = Path(arguments.json)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise CommandError(f"--json must name a file in a directory that exists, got {arguments.json}")
    if arguments.out:
        try:
            Path(arguments.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"--out must be a directory that can be made: {error}") from error


def write_json(results: dict[str, Any], target: str | None) -> None:
    """Write results as --json asks: to standard output for "-", to a file, or not at all."""
    text = json.dumps(results, indent=2)
    if target == "-":
        print(text)
    elif target:
        write_text(target, text + "\n")


def make_console(arguments: argparse.Namespace) -> Any:
    """Make a rich Console, on standard error if JSON goes to standard output, so that nothing mixes with it.

    Raises:
        CommandError: rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise CommandError(f"the demo needs the package rich ({error}); {EXTRAS}") from error
    return Console(stderr=arguments.json == "-", highlight=False, soft_wrap=True)


def plot_path(plot: str) -> Path:
    """Check the PNG file named by --plot and return it.

    Raises:
        CommandError: it is not a .png file in an existing directory.
    """
    path = Path(plot)
    if path.suffix.lower() != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise CommandError(f"--plot must name a .png file in a directory that exists, got {plot}")
    return path


def check_matplotlib(needs: str, remedy: str) -> None:
    """Import matplotlib, or raise a CommandError that names what needs it and how to get it."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        raise CommandError(f"{needs} needs the package matplotlib ({error}); {remedy}") from error


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
