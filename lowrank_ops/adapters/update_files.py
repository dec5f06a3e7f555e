"""The updates in files of adapters, read without the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import cores
from ..functional import LowRankUpdate
from .kinds import LoRA, LoRAXS
from .names import call_named
from .peft_files import Contents, Loaded, check_pairs, check_shapes, read_matrix
from .sources import all_loaded, read_source
from .start import changes_base, empty_core


class Part(NamedTuple):
    """An adapter's files."""

    config: dict[str, Any]
    contents: Contents
    records: dict[str, Any]
    where: str


def read_layers(
    sources: Sequence[str | os.PathLike[str]], weights: Sequence[float]
) -> dict[str, list[tuple[LowRankUpdate, float]]]:
    """Layer name -> the updates that the adapters have for it, with the weights of the adapters.

    Raises:
        ValueError, FileNotFoundError: as :func:`.combine.combine`.
    """
    return layers_of([read_part(source) for source in sources], weights)


def read_part(source: str | os.PathLike[str]) -> Part:
    """An adapter whose updates its files tell."""
    part = Part(*read_source(source, None, ()))
    if part.config.get("target_parameters"):
        raise ValueError(
            f"{part.where} has experts of PEFT, whose shapes the model tells; combine the layers of a model"
        )
    if beside := sorted({*part.contents.beside, *part.contents.tokens}):
        raise ValueError(
            f"{part.where} has trained {beside[0]!r} beside its updates, which cannot be combined; save it without"
        )
    return part


def layers_of(parts: Sequence[Part], weights: Sequence[float]) -> dict[str, list[tuple[LowRankUpdate, float]]]:
    """Layer name -> the updates of the adapters, with their weights."""
    layers: dict[str, list[tuple[LowRankUpdate, float]]] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, loaded in all_loaded(part.config, part.contents.layers, part.records, {}).items():
            layers.setdefault(name, []).append((call_named(f"{name} of {part.where}", _update, name, loaded), weight))
    return dict(sorted(layers.items()))


def _update(name: str, loaded: Loaded) -> LowRankUpdate:
    """The update of a layer over its original weight."""
    kind, tensors = loaded.kind, loaded.tensors
    if isinstance(kind, LoRA):
        if kind.dora or kind.lora_bias:
            raise ValueError(f"{kind} is more than a low-rank update; merge it into the model")
        down, up = tensors["down"], tensors["up"]
        if down.dim() > 2 or up.dim() > 2:
            raise ValueError("the update is one of a convolution; load it into the model, and combine its layers")
        if changes_base(kind):
            if "base_down" not in tensors:
                raise ValueError(f"{kind} has a base of its own that the file does not hold; load it into the model")
            down = torch.cat([down, tensors["base_down"].to(down.dtype)], -2)
            up = torch.cat([up, -tensors["base_up"].to(up.dtype)], -1)
        return LowRankUpdate(down, up, None, kind.scale)
    if kind.form != "additive":
        raise ValueError(f"{kind} stands in place of W; load it into the model")
    try:
        right, left = read_matrix(tensors, "down"), read_matrix(tensors, "up")
    except ValueError as error:
        raise ValueError(f"{error}; load it into the model, or save it with factors='stored'") from error
    shape = (*left.shape[:-1], right.shape[-1])
    check_shapes(name, loaded, *shape)
    if isinstance(kind, LoRAXS):
        return LowRankUpdate(right, left, cores.Dense(tensors["core"]), kind.scale)
    pattern = empty_core(kind, kind.size(*shape[-2:]))
    check_pairs(pattern, loaded)
    return LowRankUpdate(right, left, cores.with_values(pattern, tensors["core"]), kind.scale)
