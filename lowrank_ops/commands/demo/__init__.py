"""``lowrank-ops demo``: train one adapter, or one of every kind, or several for one batch, or a mixture of experts."""

from __future__ import annotations

import argparse

from .._cli import CommandError as DemoError
from .options import add_arguments

__all__ = ["DemoError", "add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code, which each mode's module explains."""
    # Import only the chosen mode, because --help needs none.
    if arguments.serve:
        from . import serve

        return serve.run(arguments)
    if arguments.compare:
        from . import compare

        return compare.run(arguments)
    if arguments.experts:
        from . import experts

        return experts.run(arguments)
    from . import train

    return train.run(arguments)
