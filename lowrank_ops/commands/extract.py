"""``lowrank-ops extract``: the adapter nearest to what training changed in a checkpoint."""

from __future__ import annotations

import argparse
import sys

from ..adapters.extract import Extracted, extract
from ..adapters.kinds import SVF, SVFT, Adapter, LoRA, LoRAXS
from ..adapters.precompute import linear_layers, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    add = parser.add_argument
    add("tuned", metavar="TUNED", help="the directory of the trained model, dense or in 4 bits")
    add("base", metavar="BASE", help="the directory of the model that it was trained from")
    add("--kind", choices=("lora", "lora-xs", "svf", "svft"), default="lora", help="default: %(default)s")
    add("--rank", type=int, metavar="R", help="default: 16; all directions for svf and svft")
    add("--bandwidth", type=int, default=1, metavar="D", help="of svft: entries at most D off the diagonal (default 1)")
    add("--targets", nargs="+", default=["all-linear"], metavar="LAYER", help="names or endings (default: all-linear)")
    add(
        "--factors",
        choices=("auto", "recipe", "stored"),
        default="auto",
        help="of kinds that have them (default: auto)",
    )
    add("--out", required=True, metavar="DIR", help="for the adapter")


def run(arguments: argparse.Namespace) -> int:
    """Extract; return 0, or 1 after an error message."""
    targets = "all-linear" if arguments.targets == ["all-linear"] else arguments.targets
    try:
        with progress(len(linear_layers(arguments.base, targets)), "extracting") as advance:
            options = (_kind(arguments), arguments.out, targets, arguments.factors, advance)
            found = extract(arguments.tuned, arguments.base, *options)
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(found))
    return 0


def _kind(arguments: argparse.Namespace) -> Adapter:
    rank = arguments.rank
    if arguments.kind in ("lora", "lora-xs"):
        return (LoRA if arguments.kind == "lora" else LoRAXS)(16 if rank is None else rank)
    return SVF(rank) if arguments.kind == "svf" else SVFT(bandwidth=arguments.bandwidth, rank=rank)


def table(found: list[Extracted]) -> str:
    """The layers, how much they changed, and the part of it that the adapter has."""
    width = max(len("of all"), *(len(row.name) for row in found))
    lines = [f"{'layer':{width}}  {'rank':>5}  {'change':>8}  {'kept':>7}"]
    lines += [f"{row.name:{width}}  {row.rank:5}  {row.change:8.2%}  {row.kept:7.2%}" for row in found]
    return "\n".join(lines)
