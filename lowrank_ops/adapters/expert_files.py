"""Adapters of experts in PEFT's files: one LoRA for a Parameter of all experts, or one for each expert's linear layer.

PEFT wraps the module of the experts once for each adapted Parameter, the one registered last outermost, so that only the
depth of a key tells which Parameter it means. The file has A_e of all experts below one another, [E · R, in], and column
i · E + e of B [out, R · E] is column i of B_e. Where a Parameter is [E, in, out] and the module does not say so by
``is_transposed``, PEFT takes it for [E, out, in]: then A has the columns of W, and ΔW is the transpose.

Files that transformers 4 was adapted with have a LoRA for each linear layer of each expert; gate and up are one Parameter
since.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .experts import ExpertsLinear, Stack, find_stacks
from .kinds import LoRA
from .names import call_named

Stacked = ExpertsLinear | Stack
Tensors = dict[str, Tensor]

EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")
# The parts of a Parameter, from its first row on, and their names as linear layers of one expert.
PARTS = {
    "gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")),
    "up_proj": (("up_proj",),),
    "down_proj": (("w2", "down_proj"),),
}


def stacks_of(modules: Mapping[str, nn.Module]) -> dict[str, Stacked]:
    """The stacks of experts of a model, adapted or not, by name and in its order."""
    return find_stacks(modules) | {name: m for name, m in modules.items() if isinstance(m, ExpertsLinear)}


def flatten(layer: Stacked, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B as PEFT has them, from D [E, R, K] and U [E, N, R]."""
    a, b = (up.mT, down.mT) if layer.peft_swapped else (down, up)
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def unflatten(layer: Stacked, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """D [E, R, K] and U [E, N, R] from lora_A and lora_B."""
    E, N, K = layer.shape
    columns, rows = (N, K) if layer.peft_swapped else (K, N)
    R = a.shape[0] // E
    if a.dim() != 2 or not R or tuple(a.shape) != (E * R, columns) or tuple(b.shape) != (rows, R * E):
        raise ValueError(
            f"lora_A and lora_B of {E} experts must be [{E} · R, {columns}] and [{rows}, R · {E}], got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    down, up = a.unflatten(0, (E, R)), b.unflatten(1, (R, E)).permute(2, 0, 1)
    return (up.mT.contiguous(), down.mT.contiguous()) if layer.peft_swapped else (down, up.contiguous())


def peft_names(stacks: Iterable[str]) -> dict[str, str]:
    """Layer name -> the name that its tensors have in PEFT's file; stacks: the adapted ones, in the model's order."""
    return {
        name: holder + ".base_layer" * (len(names) - 1 - place)
        for holder, names in _by_holder(stacks).items()
        for place, name in enumerate(names)
    }


def target_parameters(adapted: set[str], stacks: Iterable[str]) -> list[str]:
    """The adapted stacks for PEFT's config: by endings that no other stack has, or by full names."""
    endings = sorted({".".join(name.split(".")[-2:]) for name in adapted})
    others = set(stacks) - adapted
    taken = any(name.endswith("." + ending) for name in others for ending in endings)
    return sorted(adapted) if taken else endings


def read_stacks(
    config: Mapping[str, Any],
    found: Mapping[str, Tensors],
    stacks: Mapping[str, Stacked],
    kind_of: Callable[[str], LoRA],
) -> tuple[dict[str, Tensors], dict[str, LoRA]]:
    """Give the adapters of experts the names and shapes that they have here.

    Args:
        config: PEFT's.
        found: layer name in the file -> its tensors by attribute names.
        stacks: the stacks of the model by name, in its order.
        kind_of: the kind of a layer by the config.

    Returns:
        ``found`` by the names of the model's layers, D and U of stacks with a leading E; the kinds of layers that were put
            together from those of single experts.

    Raises:
        ValueError: the tensors do not fit the experts, or some experts lack theirs.
    """
    rest = dict(found)
    targets = config.get("target_parameters") or []
    chosen = [name for name in stacks if any(name == t or name.endswith("." + t) for t in targets)]
    for name, theirs in peft_names(chosen).items():
        tensors = rest.pop(theirs, None)
        if tensors is None or not {"down", "up"} <= tensors.keys():
            raise ValueError(f"layer {name!r}: the file lacks {theirs}.lora_A.weight and lora_B.weight")
        down, up = call_named(name, unflatten, stacks[name], tensors["down"], tensors["up"])
        found_here = tensors | {"down": down, "up": up}
        rest[name] = found_here
    return _gather_experts(rest, stacks, kind_of)


def _gather_experts(
    found: dict[str, Tensors], stacks: Mapping[str, Stacked], kind_of: Callable[[str], LoRA]
) -> tuple[dict[str, Tensors], dict[str, LoRA]]:
    """Put LoRAs of single experts together."""
    single: dict[str, dict[tuple[str, int], str]] = defaultdict(dict)  # prefix -> (part, expert) -> layer
    for name in found:
        if match := EXPERT.fullmatch(name):
            single[match[1]][match[3], int(match[2])] = name
    if not single:
        return found, {}
    kinds: dict[str, LoRA] = {}
    rest = dict(found)
    for prefix, layers in single.items():
        for name in stacks_for(prefix, stacks):
            part_names = PARTS.get(name.rpartition(".")[2], ())
            here = {key: layer for key, layer in layers.items() if any(key[0] in names for names in part_names)}
            if not here:
                continue
            tensors, kinds[name] = call_named(name, _fuse, stacks[name], part_names, here, found, kind_of)
            rest[name] = tensors
            for layer in here.values():
                del rest[layer]
    return rest, kinds


def stacks_for(prefix: str, stacks: Iterable[str]) -> list[str]:
    """The stacks of the block ``prefix`` of a file, which the model may have under another name: mlp, block_sparse_moe."""
    for before in (f"{prefix}.experts.", prefix.rpartition(".")[0] + "."):
        if names := [name for name in stacks if name.startswith(before) and name.rpartition(".")[2] in PARTS]:
            return names
    return []


def _fuse(
    stack: Stacked,
    parts: tuple[tuple[str, ...], ...],
    layers: Mapping[tuple[str, int], str],
    found: Mapping[str, Tensors],
    kind_of: Callable[[str], LoRA],
) -> tuple[Tensors, LoRA]:
    """D of all parts below one another and U block by block, for every expert, with one s."""
    E, N, K = stack.shape
    names = sorted({part for part, _ in layers})
    if missing := [(part, e) for part in names for e in range(E) if (part, e) not in layers]:
        raise ValueError(
            f"the file has adapters of some experts, and none for {missing[0][0]!r} of expert {missing[0][1]}"
        )
    if beyond := [layer for (_, e), layer in layers.items() if e >= E]:
        raise ValueError(f"the file has {beyond[0]!r}, and the model {E} experts")
    first = kind_of(next(iter(layers.values())))
    rows = N // len(parts)
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for place, aliases in enumerate(parts):
        part = next((name for name in aliases if name in names), None)
        if part is None:
            continue
        kinds = [kind_of(layers[part, e]) for e in range(E)]
        pairs = [(found[layers[part, e]]["down"], found[layers[part, e]]["up"]) for e in range(E)]
        R = pairs[0][0].shape[0]
        for e, (down, up) in enumerate(pairs):
            if tuple(down.shape) != (R, K) or tuple(up.shape) != (rows, R):
                raise ValueError(
                    f"lora_A and lora_B of {layers[part, e]!r} must be {[R, K]} and {[rows, R]}, got {list(down.shape)} and "
                    f"{list(up.shape)}"
                )
        downs.append(torch.stack([down for down, _ in pairs]))
        scaled = [
            up if kind.scale == first.scale else up * (kind.scale / first.scale)
            for kind, (_, up) in zip(kinds, pairs, strict=True)
        ]
        ups.append(torch.nn.functional.pad(torch.stack(scaled), (0, 0, place * rows, N - (place + 1) * rows)))
    down, up = torch.cat(downs, 1), torch.cat(ups, 2)
    R = down.shape[1]
    alpha = first.scale * (math.sqrt(R) if first.rslora else R)
    return {"down": down, "up": up.contiguous()}, LoRA(R, alpha, first.rslora, first.dropout)


def _by_holder(stacks: Iterable[str]) -> dict[str, list[str]]:
    """Module that holds the Parameters -> its stacks."""
    held: dict[str, list[str]] = defaultdict(list)
    for name in stacks:
        held[name.rpartition(".")[0]].append(name)
    return held
