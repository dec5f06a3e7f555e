"""``lowrank-ops combine``: one adapter of several, from their files alone."""

from __future__ import annotations

import argparse
import sys

from ..adapters.combine_files import combine_files
from ..adapters.merging import METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="a directory or a .safetensors file of an adapter, of any kind")
    add("--weights", nargs="+", type=float, metavar="W", help="one for each adapter (default 1)")
    add("--method", choices=METHODS, default="sum", help="default: %(default)s, which is exact")
    add("--density", type=float, help="the part of the entries that is kept, for the methods that drop some")
    add("--rank", type=int, metavar="R", help="at most this rank")
    add("--seed", type=int, default=0, help="of the methods that drop entries at random (default %(default)s)")
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="for the result: a plain LoRA, or the kind of adapters of one family",
    )


def run(arguments: argparse.Namespace) -> int:
    """Combine; return 0, or 1 after an error message."""
    weights = arguments.weights or [1.0] * len(arguments.adapters)
    options = (arguments.rank, arguments.method, arguments.density, arguments.seed)
    try:
        names = combine_files(arguments.adapters, weights, arguments.out, *options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(names)} layers in {arguments.out}")
    return 0
