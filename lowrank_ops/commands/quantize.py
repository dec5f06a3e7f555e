"""``lowrank-ops quantize``: a directory of a model to 4 bits, file by file, that bitsandbytes' users load as it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..adapters.config import CONFIGS
from ..adapters.precompute import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add("model_dir", metavar="MODEL_DIR", help="a Hugging Face directory with safetensors files of dense weights")
    add("--out", required=True, metavar="DIR", help="the directory to write; an interrupted run resumes there")
    add("--format", choices=tuple(CONFIGS), default="nf4", help="of the weights (default %(default)s)")
    add("--block-size", type=int, default=64, help="weights that share a scale, in nf4 and fp4 (default %(default)s)")
    add("--no-double-quant", action="store_true", help="keep the scales in float32, in nf4 and fp4")
    add("--skip", nargs="+", metavar="NAME", help="layers that stay dense: names, or endings of names")
    add("--head", action="store_true", help="quantise the output head too")
    add("--device", help="where to quantise (default: cuda if available, otherwise cpu)")


def run(arguments: argparse.Namespace) -> int:
    """Quantise; return 0, 1 after an error message, or 130 after an interruption."""
    options = {"skip": arguments.skip, "head": arguments.format if arguments.head else None}
    if arguments.format != "mxfp4":
        options |= {"block_size": arguments.block_size, "double_quant": not arguments.no_double_quant}
    source, out = Path(arguments.model_dir), Path(arguments.out)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        from ..integrations.transformers_quantize import layer_names, quantize_directory

        config = CONFIGS[arguments.format](**options)
        with progress(len(layer_names(source, config)), "quantising") as advance:
            errors = quantize_directory(source, out, config, device, advance)
    except ImportError as error:
        print(f'error: {error}; pip install "lowrank-ops[train]"', file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    print("error ‖W − W₄‖ / ‖W‖ of layers by the end of their names:")
    kinds: dict[str, list[tuple[float, str]]] = {}
    for name, lost in errors.items():
        kinds.setdefault(name.rstrip(".0123456789").rpartition(".")[2], []).append(
            (lost, name)
        )  # experts by their stack
    for kind, found in kinds.items():
        mean = sum(lost for lost, _ in found) / len(found)
        worst, name = max(found)
        print(f"  {kind:20} {len(found):5} layers  mean {mean:.4f}  largest {worst:.4f} ({name})")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{len(errors)} layers, {size / 1e6:.0f} MB in {out}; quantization.json there has the error of every layer")
    return 0
