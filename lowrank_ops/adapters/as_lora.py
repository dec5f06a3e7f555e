"""Adapters of every kind as plain LoRAs with one alpha, for readers that know no scale but lora_alpha / r."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from ..functional import LowRankUpdate
from .combine import convert
from .experts import ExpertsLinear
from .kinds import LoRA
from .layer import AdaptedLayer, described
from .names import call_named
from .targets import shape_of

# A replace form starts as W up to the rounding of an SVD in float32, or it does not start as W.
_EXACT = 1e-5


def plain_loras(layers: Mapping[str, AdaptedLayer], max_bytes: int) -> dict[str, tuple[LoRA, Tensor, Tensor]]:
    """Layer name -> its LoRA, D and U with alpha / R · U D = ΔW over the original weight; alpha is one for all layers.

    Every layer's factors are padded with zeros to the largest rank of all, as far as min(N, K) allows, and alpha is the most
    frequent rank, which is ``r`` in the configuration. A reader that takes R from the tensors is right everywhere, and one
    that takes ``r`` is right in all layers of that rank.

    Args:
        layers: with an adapter each.
        max_bytes: of all factors together.

    Raises:
        ValueError: the factors would take more than ``max_bytes``; ΔW of a layer has no low rank, or is not known.

    Numerics: float32. Where the parts of ΔW have more than min(N, K) directions together, one SVD in float64 brings them to
    min(N, K), which is exact up to rounding.
    """
    ranks = {name: call_named(name, _rank, layer) for name, layer in layers.items()}
    shapes = {name: shape_of(layer) for name, layer in layers.items()}
    padded = _padded(ranks, shapes)
    _check_size({name: 4 * R * _sides(shapes[name]) for name, R in padded.items()}, padded, layers, max_bytes)
    alpha = _most_frequent(padded)
    if others := [name for name, R in padded.items() if R != alpha]:
        warnings.warn(
            f"{len(others)} of {len(layers)} layers have another rank than r = {alpha}, such as {padded[others[0]]} in "
            f"{others[0]!r}; PEFT and llama.cpp read that right, a reader that ignores rank_pattern does not",
            stacklevel=5,
        )
    return _made(layers, ranks, padded, alpha)


def loras_of(updates: Mapping[str, LowRankUpdate]) -> dict[str, tuple[LoRA, Tensor, Tensor]]:
    """As :func:`plain_loras`, of updates over the original weights, by the names of their layers."""
    ranks = {name: update.rank for name, update in updates.items()}
    padded = _padded(ranks, {name: update.shape for name, update in updates.items()})
    return _made(updates, ranks, padded, _most_frequent(padded))


def _padded(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The largest rank, as far as each layer allows."""
    largest = max(ranks.values())
    return {name: min(largest, *shape[-2:]) for name, shape in shapes.items()}


def _most_frequent(ranks: Mapping[str, int]) -> int:
    return Counter(ranks.values()).most_common(1)[0][0]


def _made(
    sources: Mapping[str, LowRankUpdate | AdaptedLayer], ranks: Mapping[str, int], padded: Mapping[str, int], alpha: int
) -> dict[str, tuple[LoRA, Tensor, Tensor]]:
    made = {}
    for name, source in sources.items():
        R = padded[name]
        update = convert(source, rank=R if ranks[name] > R else None).update
        assert isinstance(update.down, Tensor) and isinstance(update.up, Tensor)
        missing = R - update.rank
        down = pad(update.down, (0, 0, 0, missing))
        up = pad(update.up * (update.scale * R / alpha), (0, missing))
        made[name] = LoRA(R, alpha), down.cpu(), up.cpu()
    return made


def _rank(layer: AdaptedLayer) -> int:
    """The rank of ΔW's factors over the original weight; raises if there are none."""
    if getattr(layer.adapter, "form", None) == "replace" and not (
        layer.start_error is not None and layer.start_error <= _EXACT
    ):
        start = "an unknown distance" if layer.start_error is None else f"{layer.start_error:.1e} · ‖W‖"
        raise ValueError(
            f"{described(layer.adapter)} started {start} away from W, so that W' − W has no low rank; save it without "
            "as_lora, or merge the model"
        )
    if isinstance(layer, ExpertsLinear) and layer.peft_swapped is None:
        raise ValueError("PEFT's files cannot hold a LoRA of these experts; save it without as_lora")
    update = layer.update
    assert update is not None
    return update.rank + (0 if update.base is None else update.base.rank)


def _sides(shape: tuple[int, ...]) -> int:
    """E · (N + K)."""
    *stack, N, K = shape
    return (stack[0] if stack else 1) * (N + K)


def _check_size(
    sizes: Mapping[str, int], ranks: Mapping[str, int], layers: Mapping[str, AdaptedLayer], max_bytes: int
) -> None:
    """Say how large the factors become before they are made."""
    total = sum(sizes.values())
    first = max(sizes, key=lambda name: sizes[name])
    size = f"{total / 1e6:,.1f} MB as a plain LoRA, with rank {ranks[first]} in {first!r}"
    if total > max_bytes:
        raise ValueError(
            f"the adapter takes {size}, more than max_bytes = {max_bytes / 1e6:,.1f} MB; raise max_bytes, adapt with a "
            "rank, or merge the model"
        )
    held = sum(layer.weight.nbytes for layer in layers.values() if layer.weight is not None)
    if total > held:
        warnings.warn(f"the adapter takes {size}; the weights take {held / 1e6:,.1f} MB", stacklevel=6)
