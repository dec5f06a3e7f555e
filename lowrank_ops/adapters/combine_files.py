"""One adapter of several, from their files alone: ``lowrank-ops combine``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional import LowRankUpdate
from .as_lora import loras_of
from .combine import combine_updates
from .kinds import LoRAXS
from .merging import check_method, generator_for, merge_cores
from .names import call_named
from .peft_files import LORA, PREFIX, lora_config
from .start import read_record
from .update_files import Part, layers_of, read_part
from .versions import write_files


def combine_files(
    sources: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    rank: int | None = None,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Write the combination of adapters in files, as :func:`.combine.combine` makes it; return the names of its layers.

    Adapters with cores between the same frozen factors become one of their kind, even where the files have no factors but
    the recipe for them; others become a LoRA that PEFT reads.
    """
    check_method(method, density, seed)
    if len(weights) != len(sources) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be one finite number for each of {len(sources)} adapters, got {list(weights)}")
    parts = [read_part(source) for source in sources]
    if rank is None and method != "svd" and _share_factors(parts):
        first = parts[0]
        names = list(dict.fromkeys(name for part in parts for name in part.contents.layers))
        tensors: dict[str, Tensor] = {}
        records: dict[str, Any] = {}
        for name in names:
            held = [(p, w) for p, w in zip(parts, weights, strict=True) if name in p.contents.layers]
            layer = held[0][0].contents.layers[name]
            records[name] = held[0][0].records[name]
            cores_of = [p.contents.layers[name]["core"] for p, _ in held]
            stacked = cores_of[0].dim() > (2 if isinstance(read_record(records[name])[0], LoRAXS) else 1)
            own = [weight for _, weight in held]
            merged = merge_cores(cores_of, own, method, density, generator_for(seed, name), stacked)
            tensors |= {f"{PREFIX}{name}.lowrank_ops.{key}": t for key, t in (layer | {"core": merged}).items()}
        write_files(Path(out), tensors, first.config, {"format": "pt", "lowrank_ops": json.dumps(records)})
        return names
    updates = {
        name: call_named(name, combine_updates, held, rank, method, density, generator_for(seed, name))
        for name, held in layers_of(parts, weights).items()
    }
    write_lora(out, updates)
    return list(updates)


def _share_factors(parts: Sequence[Part]) -> bool:
    """Whether all have cores, and a layer's cores stand between the same factors, on the same entries."""
    known: dict[str, tuple[Any, dict[str, Tensor]]] = {}
    for part in parts:
        for name, tensors in part.contents.layers.items():
            rest = {key: tensor for key, tensor in tensors.items() if key != "core"}
            record, others = known.setdefault(name, (part.records.get(name), rest))
            if (
                "core" not in tensors
                or record is None
                or record != part.records.get(name)
                or rest.keys() != others.keys()
            ):
                return False
            if not all(torch.equal(tensor, others[key]) for key, tensor in rest.items()):
                return False
    return True


def write_lora(path: str | os.PathLike[str], updates: Mapping[str, LowRankUpdate]) -> int:
    """Write updates as a LoRA of one alpha, in PEFT's layout; return the bytes of its factors.

    Raises:
        ValueError: an update is over a stack of experts.
    """
    for name, update in updates.items():
        if len(update.shape) > 2:
            raise ValueError(f"layer {name!r}: PEFT's files cannot hold a LoRA of these experts")
    made = loras_of(updates)
    tensors: dict[str, Tensor] = {}
    for name, (_, down, up) in made.items():
        tensors |= {
            f"{PREFIX}{name}.{LORA['down']}": down.contiguous(),
            f"{PREFIX}{name}.{LORA['up']}": up.contiguous(),
        }
    write_files(
        Path(path),
        tensors,
        lora_config({name: kind for name, (kind, *_) in made.items()}, list(made)),
        {"format": "pt"},
    )
    return sum(tensor.nbytes for tensor in tensors.values())
