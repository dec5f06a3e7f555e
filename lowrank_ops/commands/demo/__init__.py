"""``lowrank-ops demo``: adapters for a sentence encoder, for experts or for a language model, trained and served."""

from __future__ import annotations

import argparse
import importlib
import sys

from .._cli import CommandError as DemoError
from .._cli import write_json
from .options import MODES, add_arguments, check

__all__ = ["DemoError", "add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, 1 if a reloaded adapter or a served row differs, or 2 after an error message."""
    try:
        check(arguments)
        mode = next((mode for mode in MODES if getattr(arguments, mode)), "train")
        # Import only the chosen mode, because --help needs none.
        results = importlib.import_module(f".{mode}", __name__).run(arguments)
        write_json(results, arguments.json)
    except (DemoError, OSError) as error:
        print(f"lowrank-ops demo: {error}", file=sys.stderr)
        return 2
    return 0 if results.get("reloaded", results).get("agrees", True) else 1
