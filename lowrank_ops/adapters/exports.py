"""Plain LoRAs in the files of other programs: diffusers' and llama.cpp's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import make_folder, replacing, write_tensors
from .kinds import LoRA
from .names import call_named, unwrapped

FORMATS = ("peft", "diffusers", "gguf")
DIFFUSERS, GGUF = "pytorch_lora_weights.safetensors", "adapter.gguf"
PARTS = ("transformer", "unet", "text_encoder", "text_encoder_2")
EXTRA = 'pip install "lowrank-ops[gguf]"'
# model_type of transformers -> llama.cpp's name, and whether its converter turns the rows of q and k about.
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
}
# Layer name -> kind, D and U, as as_lora makes them.
LoRAs = Mapping[str, tuple[LoRA, Tensor, Tensor]]


def export_adapter(path: str | os.PathLike[str], format: str, model: nn.Module, loras: LoRAs) -> None:
    """Write the LoRAs of a model in the format of another program."""
    if format == "diffusers":
        write_diffusers(path, loras, part_of(model))
        return
    config = getattr(unwrapped(model), "config", None)
    if config is None:
        raise ValueError(f"format 'gguf' needs a model of transformers, got {type(model).__name__}")
    write_gguf(path, loras, config)


def part_of(model: nn.Module) -> str:
    """The part of a pipeline of diffusers that a model is."""
    kind = type(unwrapped(model))
    if kind.__name__.startswith("UNet"):
        return "unet"
    return "text_encoder" if kind.__module__.startswith("transformers") else "transformer"


def write_diffusers(path: str | os.PathLike[str], loras: LoRAs, part: str) -> None:
    """Write ``pytorch_lora_weights.safetensors``: A = D and B = alpha / R · U, as the file has no alpha."""
    tensors = {}
    for name, (kind, down, up) in loras.items():
        tensors[f"{part}.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{part}.{name}.lora_B.weight"] = (kind.scale * up).contiguous()
    make_folder(Path(path))
    write_tensors(Path(path) / DIFFUSERS, tensors, {"format": "pt"})


def write_gguf(path: str | os.PathLike[str], loras: LoRAs, config: Any) -> None:
    """Write a LoRA for llama.cpp, float32, under the names and in the order of rows that its models have.

    Args:
        path: the file, or the directory that gets ``adapter.gguf``.
        loras: with one alpha.
        config: of transformers, of the model.

    Raises:
        ImportError: the package gguf is missing.
        ValueError: llama.cpp's names are not known for the model, or it has no tensor for a layer.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"llama.cpp's format needs the package gguf: {EXTRA}") from error
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text.model_type not in _ARCHITECTURES:
        raise ValueError(
            f"llama.cpp's names are known here for {', '.join(_ARCHITECTURES)}, got {text.model_type!r}; save it with "
            "as_lora=True, and llama.cpp's convert_lora_to_gguf.py converts the directory"
        )
    architecture, turned = _ARCHITECTURES[text.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, text.num_hidden_layers)
    tensors = {}
    for name, (_, down, up) in loras.items():
        theirs = table.get_name(name)
        if theirs is None:
            raise ValueError(f"layer {name!r}: llama.cpp's {architecture} has no tensor for it")
        end = name.rpartition(".")[2]
        if turned and end in ("q_proj", "k_proj"):
            heads = text.num_attention_heads if end == "q_proj" else text.num_key_value_heads
            up = call_named(name, _turn, up, heads)
        tensors[f"{theirs}.weight.lora_a"], tensors[f"{theirs}.weight.lora_b"] = down, up
    target = Path(path)
    if target.suffix != ".gguf":
        make_folder(target)
        target = target / GGUF
    with replacing(target) as scratch:
        writer = gguf.GGUFWriter(scratch, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(next(iter(loras.values()))[0].alpha))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.to(torch.float32).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _turn(up: Tensor, heads: int) -> Tensor:
    """Rows of a head in pairs (i, i + d/2) become neighbours, as llama.cpp's rotary embedding takes them."""
    N, R = up.shape
    return up.view(heads, 2, N // heads // 2, R).transpose(1, 2).reshape(N, R)
