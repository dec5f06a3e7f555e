"""Models sharded over processes: 4-bit bytes that can be sharded, and the whole of what is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..formats import QuantizedWeight
from ..formats.keepers import Shards
from .linear import AdaptedLayer
from .names import call_named, check_model


def make_shardable(model: nn.Module) -> nn.Module:
    """Let torch's ``fully_shard`` (FSDP2) shard 4-bit weights too, in place: call it before ``fully_shard``.

    The bytes of every 4-bit weight become uint8 Parameters without a gradient. ``fully_shard`` gives each process its part
    of them and gathers the others' parts for the forward and the backward of a module; products are the same to the bit.
    The state dict then has an entry for each Parameter (``weight.packed``, ``weight.absmax``) in place of bitsandbytes'.

    Args:
        model: with 4-bit weights, on any device.

    Returns:
        model.

    Raises:
        ValueError: the model has no 4-bit weight, or one is offloaded.
    """
    check_model(model)
    weights = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    if not weights:
        raise ValueError("model has no 4-bit weight; call lowrank_ops.adapt(model, lowrank_ops.LoRA()) first")
    for name, weight in weights.items():
        call_named(name, weight.check_shardable)
    for weight in weights.values():
        weight.make_shardable()
    return model


def is_sharded(model: nn.Module) -> bool:
    """Tell whether trained parameters are spread over processes."""
    split = any(isinstance(m, AdaptedLayer) and m.split is not None for m in model.modules())
    return split or any(p.requires_grad and _is_spread(p) for p in model.parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Within the context, what an adapter's file holds is whole in every process, and every process must enter it.

    Yields whether this process is the first of those that share the model.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    before: list[tuple[AdaptedLayer, dict[str, Any]]] = []
    shards = [m.keeper for m in model.modules() if isinstance(m, QuantizedWeight) and isinstance(m.keeper, Shards)]
    first = True
    try:
        for keeper in shards:
            keeper.gathering = True
        for module in model.modules():
            own = [(name, p) for name, p in module._parameters.items() if p is not None]
            if not isinstance(module, AdaptedLayer) and not any(p.requires_grad for _, p in own):
                continue
            for name, parameter in own:
                # The weight of a layer stays where it is unless it is trained.
                if _is_spread(parameter) and (name in ("down", "up", "core") or parameter.requires_grad):
                    spread: Any = parameter
                    first = spread.device_mesh.get_rank() == int(spread.device_mesh.mesh.min())
                    replaced.append((module._parameters, name, parameter))
                    module._parameters[name] = nn.Parameter(spread.full_tensor().detach(), parameter.requires_grad)
        for layer in model.modules():
            if isinstance(layer, AdaptedLayer) and (split := layer.split) is not None:
                first = first and split.rank == 0
                before.append((layer, split.join(layer)))
        yield first
    finally:
        for layer, state in reversed(before):
            vars(layer).update(state)
        for store, name, parameter in replaced:
            store[name] = parameter
        for keeper in shards:
            keeper.gathering = False


def _is_spread(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "full_tensor")  # a DTensor
