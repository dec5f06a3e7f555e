"""``lowrank-ops convert``: an adapter of any kind and layout as a plain LoRA for another program, from its files alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..adapters.as_lora import loras_of
from ..adapters.combine import combine
from ..adapters.combine_files import write_lora
from ..adapters.exports import FORMATS, PARTS, write_diffusers, write_gguf
from ..adapters.peft_files import CONFIG
from ..files import load_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="a directory or a .safetensors file")
    add("--to", choices=FORMATS, required=True, help="gguf is llama.cpp's")
    add("--rank", type=int, metavar="R", help="at most this rank (default: exact)")
    add("--part", choices=PARTS, default="transformer", help="of diffusers' pipeline (default %(default)s)")
    add(
        "--model", metavar="MODEL", help="for gguf: the directory of the base (default: the one that the adapter names)"
    )
    add("--out", required=True, metavar="DIR", help="for the adapter")


def run(arguments: argparse.Namespace) -> int:
    """Convert; return 0, or 1 after an error message."""
    try:
        updates = combine([(arguments.adapter, 1.0)], arguments.rank)
        if arguments.to == "peft":
            write_lora(arguments.out, updates)
        elif arguments.to == "diffusers":
            write_diffusers(arguments.out, loras_of(updates), arguments.part)
        else:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(arguments.model or _base(arguments.adapter))
            write_gguf(arguments.out, loras_of(updates), config)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(updates)} layers in {arguments.out}")
    return 0


def _base(adapter: str) -> str:
    """The base that an adapter's configuration names."""
    path = Path(adapter) / CONFIG
    named = load_json(path.read_text()).get("base_model_name_or_path") if path.is_file() else None
    if not named:
        raise ValueError(
            "the adapter does not name its base; give --model, whose layers llama.cpp calls by other names"
        )
    return str(named)
