"""Options that choose the format of what is as wide as the vocabulary: the output head and the embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

# Options for a format, whose value may be left out: then it is the format of the weights, "same".
WIDE = "--head", "--embeddings", "--quantize-head"
_WIDE_VALUES = "same", "int8"


def add_wide(parser: argparse.ArgumentParser, option: str, help: str) -> None:
    """Add one of the options WIDE."""
    assert option in WIDE
    parser.add_argument(option, nargs="?", const="same", choices=_WIDE_VALUES, help=help)


def complete(argv: Sequence[str]) -> list[str]:
    """Write out the values of WIDE that are left out, so that argparse does not take a MODEL_DIR that follows for one."""
    following = [*argv[1:], ""]
    return [
        f"{given}=same" if given in WIDE and after not in _WIDE_VALUES else given
        for given, after in zip(argv, following, strict=True)
    ]
