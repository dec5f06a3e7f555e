"""``lowrank-ops precompute``: compute the singular vectors of a whole checkpoint once."""

from __future__ import annotations

import argparse
import sys

import torch

from ..adapters.precompute import precompute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="a Hugging Face directory with safetensors files")
    parser.add_argument(
        "--rank", type=_rank, required=True, metavar="R|full", help="singular triples of each layer, or all of them"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="directory for the factors; an interrupted run resumes there"
    )
    parser.add_argument("--oversample", type=int, help="additional directions (default: the rank)")
    parser.add_argument("--power-iterations", type=int, default=4, help="default: 4")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random test matrix (default: 0)")
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="names of layers, or endings of names (default: every linear layer)",
    )
    parser.add_argument("--device", help="default: cuda if available, otherwise cpu")


def _rank(text: str) -> int | None:
    return None if text == "full" else int(text)


def run(arguments: argparse.Namespace) -> int:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        keys = precompute(
            arguments.model_dir,
            arguments.out,
            arguments.rank,
            arguments.oversample,
            arguments.power_iterations,
            arguments.seed,
            arguments.targets or "all-linear",
            device,
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    print(f"{len(keys)} layers of rank {arguments.rank or 'min(N, K)'} in {arguments.out}")
    return 0
