"""``lowrank-ops quantize``: a directory of a model to 4 bits, file by file, that bitsandbytes' users load as it is."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.config import CONFIGS, WeightConfig
from ..adapters.precompute import progress
from ..calibration import calibrate
from ..calibration.batches import digest
from ._cli import CommandError
from .text import read_windows
from .wide_options import add_wide

# Tokens that run through a block at a time.
_BATCH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add("model_dir", metavar="MODEL_DIR", help="a Hugging Face directory with safetensors files of dense weights")
    add("--out", required=True, metavar="DIR", help="the directory to write; an interrupted run resumes there")
    add("--format", choices=tuple(CONFIGS), default="nf4", help="of the weights (default %(default)s)")
    add("--block-size", type=int, default=64, help="weights that share a scale, in nf4 and fp4 (default %(default)s)")
    add("--no-double-quant", action="store_true", help="keep the scales in float32, in nf4 and fp4")
    add("--skip", nargs="+", metavar="NAME", help="layers that stay dense: names, or endings of names")
    add_wide(parser, "--head", "quantise the output head too, in the format of the weights or in int8")
    add("--convolutions", action="store_true", help="quantise the convolutions too")
    add_wide(parser, "--embeddings", "quantise the input embeddings too, with a head that is tied to them")
    add("--device", help="where to calibrate and quantise (default: cuda if available, otherwise cpu)")
    add("--calibrate", metavar="FILE", help="round by what the layers see of this text (- for standard input)")
    add("--tokens", type=int, default=16384, help="of the text, at most (default %(default)s)")
    add("--length", type=int, default=512, help="tokens of a sequence of the text (default %(default)s)")
    add("--sequential", action="store_true", help="calibrate each block with the blocks before it rounded")
    add(
        "--compensate",
        type=int,
        metavar="RANK",
        help="keep a low-rank branch of what rounding loses, in the folder branch",
    )
    add("--unseen", choices=("refuse", "plain"), default="refuse", help="layers that saw no token (default: refuse)")
    add(
        "--moments",
        metavar="DIR",
        help="keep what was calibrated there (default: in a folder of --out, until it is written)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Quantise; return 0, 1 after an error message, or 130 after an interruption."""
    source, out = Path(arguments.model_dir), Path(arguments.out)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        from ..integrations.transformers_quantize import is_complete, layer_names, quantize_directory

        config, text = _config(arguments), ""
        if arguments.calibrate is not None:
            batches = _batches(source, arguments)
            text = f"{digest(batches)}{' sequential' * arguments.sequential}"
            if not is_complete(source, out, config, text):
                _calibrate(source, batches, config, arguments.sequential, device)
        with progress(len(layer_names(source, config)), "quantising") as advance:
            errors = quantize_directory(source, out, config, device, advance, text)
        if arguments.calibrate is not None and arguments.moments is None:
            shutil.rmtree(_folder(arguments), ignore_errors=True)
    except ImportError as error:
        print(f'error: {error}; pip install "lowrank-ops[train]"', file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, CommandError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    lost = "‖W − W₄‖ / ‖W‖" if arguments.calibrate is None else "‖(W − W₄) H^½‖ / ‖W H^½‖, H = E[x xᵀ],"
    if errors:
        print(f"error {lost} of layers by the end of their names:")
    kinds: dict[str, list[tuple[float, str]]] = {}
    for name, share in errors.items():
        kinds.setdefault(name.rstrip(".0123456789").rpartition(".")[2], []).append(
            (share, name)
        )  # experts by their stack
    for kind, found in kinds.items():
        mean = sum(share for share, _ in found) / len(found)
        worst, name = max(found)
        print(f"  {kind:20} {len(found):5} layers  mean {mean:.4f}  largest {worst:.4f} ({name})")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    told = f"{len(errors)} layers, {size / 1e6:.0f} MB in {out}; quantization.json there has the error of every layer"
    print(told if errors else f"{size / 1e6:.0f} MB in {out}, read as a whole, so that no errors were measured")
    return 0


def _folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.moments or Path(arguments.out) / "calibration.new")


def _config(arguments: argparse.Namespace) -> WeightConfig:
    options: dict[str, Any] = {"skip": arguments.skip}
    for name in ("head", "embeddings"):
        value = getattr(arguments, name)
        options[name] = arguments.format if value == "same" else value
    if arguments.convolutions:
        options["convolutions"] = arguments.format
    if arguments.format != "mxfp4":
        options |= {"block_size": arguments.block_size, "double_quant": not arguments.no_double_quant}
    if arguments.calibrate is not None:
        options |= {"calibration": str(_folder(arguments)), "unseen": arguments.unseen}
    elif arguments.sequential or arguments.moments is not None:
        raise CommandError("--sequential and --moments need --calibrate, the text to calibrate with")
    if arguments.compensate is not None:
        if arguments.calibrate is None:
            raise CommandError("--compensate needs --calibrate, the text whose outputs the branch is to keep")
        options["compensate"] = arguments.compensate
    return CONFIGS[arguments.format](**options)


def _batches(source: Path, arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    """The text in batches of sequences."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"--calibrate needs the model's tokenizer, and {source} has none: {error}") from error
    windows = read_windows(tokenizer, arguments.calibrate, "--calibrate", arguments.length, arguments.tokens)
    print(f"calibrating with {len(windows)} sequences of {arguments.length} tokens", file=sys.stderr)
    return [{"input_ids": part} for part in windows.split(max(1, _BATCH // arguments.length))]


def _calibrate(
    source: Path, batches: list[dict[str, Tensor]], config: WeightConfig, sequential: bool, device: str
) -> None:
    """Gather the moments in the folder of the configuration."""
    from ..integrations.transformers_blocks import block_names

    with progress(len(block_names(source)), "calibrating") as advance:
        calibrate(
            source,
            batches,
            head=config.head is not None,
            sequential=config if sequential else None,
            folder=str(config.calibration),
            device=device,
            progress=advance,
        )
