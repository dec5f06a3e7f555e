"""Load or calibrate a directory in this process and print, as JSON, the memory and the time that took: for test_memory.py.

python tests/measure_loading.py DIR DTYPE load|adapt|calibrate [--make llama|mixtral --dtype DTYPE --size small|deep|large]
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lowrank_ops as lo

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "small": {
        "llama": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2, "vocab_size": 1000},
        "mixtral": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 1000},
    },
    "deep": {
        "llama": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "vocab_size": 1000},
    },
    "large": {
        "llama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 32000},
        "mixtral": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 5, "vocab_size": 32000},
    },
}


def make(directory: Path, family: str, dtype: torch.dtype, size: str) -> None:
    """Write a model of random numbers in several files, tensor by tensor, with the names that transformers publishes."""
    kind: Any = {"llama": (LlamaConfig, LlamaForCausalLM), "mixtral": (MixtralConfig, MixtralForCausalLM)}[family]
    config = kind[0](**SIZES[size][family], num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    config.dtype, config.architectures = dtype, [kind[1].__name__]
    config.save_pretrained(directory)
    H, F = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (H, H) for name in "qkvo"}
        shapes |= {f"{layer}{name}_layernorm.weight": (H,) for name in ("input", "post_attention")}
        if family == "llama":
            shapes |= {f"{layer}mlp.{name}_proj.weight": (F, H) for name in ("gate", "up")}
            shapes[f"{layer}mlp.down_proj.weight"] = (H, F)
        else:
            shapes[f"{layer}block_sparse_moe.gate.weight"] = (config.num_local_experts, H)
            for e in range(config.num_local_experts):
                expert = f"{layer}block_sparse_moe.experts.{e}."
                shapes |= {f"{expert}w1.weight": (F, H), f"{expert}w3.weight": (F, H), f"{expert}w2.weight": (H, F)}
    shapes |= {"model.norm.weight": (H,), "model.embed_tokens.weight": (config.vocab_size, H)}
    shapes["lm_head.weight"] = (config.vocab_size, H)
    names, files = list(shapes), 4
    table = {}
    for part in range(files):
        name = f"model-{part + 1:05}-of-{files:05}.safetensors"
        tensors = {key: torch.empty(shapes[key], dtype=dtype).normal_(std=0.02) for key in names[part::files]}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        table |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def resident() -> int:
    """Bytes of memory of this process, those that files back too."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def _peak(used: Callable[[], int], work: Callable[[], Any]) -> tuple[int, float, Any]:
    """The most bytes above those before some work, its seconds and its result."""
    before, peak, done = used(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.003):
            peak = max(peak, used())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return peak - before, seconds, result


def measure_calibration(directory: Path) -> dict[str, float]:
    """The peak of calibrating block by block, with what is kept in a folder, 512 tokens."""
    ids = torch.randint(1000, (4, 128), generator=torch.Generator().manual_seed(0))
    folder = directory / "moments"
    peak, seconds, _ = _peak(resident, lambda: len(lo.calibrate(directory, [ids], folder=folder)))
    return {"peak": peak, "seconds": seconds, "moments": sum(file.stat().st_size for file in folder.glob("*"))}


def measure(directory: Path, dtype: torch.dtype, how: str) -> dict[str, float]:
    def load() -> Any:
        if how == "load":
            return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=lo.NF4Config())
        return lo.adapt(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), None)

    gc.collect()
    before = anonymous()
    peak, seconds, model = _peak(anonymous, load)
    gc.collect()
    sizes = [t.nbytes for t in (*model.parameters(), *model.buffers())]
    return {"peak": peak, "after": anonymous() - before, "model": sum(sizes), "seconds": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("how", choices=("load", "adapt", "calibrate"))
    parser.add_argument("--make", choices=("llama", "mixtral"))
    parser.add_argument("--dtype", dest="stored", default="bfloat16")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    given = parser.parse_args()
    if given.make:
        make(given.directory, given.make, getattr(torch, given.stored), given.size)
    elif given.how == "calibrate":
        print(json.dumps(measure_calibration(given.directory)))
    else:
        print(json.dumps(measure(given.directory, getattr(torch, given.dtype), given.how)))
