"""``lowrank-ops demo``: train one adapter, or with --compare one of every kind, or with --serve several for one batch."""

from __future__ import annotations

import argparse

from .._cli import CommandError as DemoError
from .options import add_arguments

__all__ = ["DemoError", "add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code, see the module of each mode."""
    # Each mode is imported when it is asked for, and --help needs none.
    if arguments.serve:
        from . import serve

        return serve.run(arguments)
    if arguments.compare:
        from . import compare

        return compare.run(arguments)
    from . import train

    return train.run(arguments)
