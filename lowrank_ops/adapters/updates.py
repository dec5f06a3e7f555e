"""Read an adapter over layers that stay as they are, as a pool serves it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import cores
from ..formats import FLOAT_DTYPES, QuantizedWeight
from ..functional import LowRankUpdate
from ..svd.store import FactorStore
from .beside import Beside, check_beside
from .checkpoint import check_source, start_spectral
from .conv import Convolution, to_matrices
from .dora import row_norms, scale_of
from .embedding import is_embedding
from .experts import ExpertsLinear, check_fits
from .foreign import is_conv, linear_shape, weight_of
from .kinds import LoRA, LoRAXS
from .linear import Linear, branch_of
from .names import call_named
from .peft_bases import complete
from .peft_files import (
    Loaded,
    check_pairs,
    check_shapes,
)
from .rounding import Base
from .sources import AdapterSource, all_loaded, read_source
from .start import changes_base, empty_core
from .targets import shape_of
from .tokens import check_tokens

# Layer name -> its update and the family of its frozen factors; module name -> what the adapter has of its own there.
Updates = tuple[dict[str, tuple[LowRankUpdate, tuple[Any, ...] | None]], dict[str, dict[str, Tensor | float]]]


def read_updates(
    layers: Mapping[str, Linear | ExpertsLinear],
    source: AdapterSource,
    config: Mapping[str, Any] | None = None,
    factors: FactorStore | None = None,
    known: MutableMapping[tuple[Any, ...], Any] | None = None,
    holders: Mapping[str, nn.Module] | None = None,
) -> Updates:
    """Read what an adapter changes in some layers and modules, which stay unchanged themselves.

    Args:
        layers: by their names in the model, without adapters.
        source, config: as of :func:`.sources.read_source`.
        factors: singular vectors from ``lowrank-ops precompute``.
        known: frozen factors made earlier, by family, and keys of weights; extended here.
        holders: the modules in which the adapter may have parameters of its own, by their names in the model.

    Returns:
        Layer name -> (update over the layer's weight, family of its frozen factors or None if no other adapter shares
            them). A LoRA with a changed base (PiSSA) becomes the equivalent LoRA of rank 2R over the original weight.
        Module name -> key -> what stands there in place of the parameter or buffer; for a DoRA also ``scale``, g [N]; for a
            LoRA over a dense linear layer or an embedding, which are no layers of ours, ``down``, ``up`` and ``s``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_adapter`; a layer's weight is not the weight a changed base or the
            factors were made from; the kind has the replace form, which shares no weight with other adapters.
    """
    known = {} if known is None else known
    holders = layers if holders is None else holders
    checked, contents, records, where = read_source(source, config, {*layers, *holders})
    updates: dict[str, tuple[LowRankUpdate, tuple[Any, ...] | None]] = {}
    magnitudes: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}  # to the bias
    stacks = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertsLinear)}
    for name, loaded in all_loaded(checked, contents.layers, records, stacks).items():
        layer = layers.get(name, holders.get(name))
        embeds = layer is not None and is_embedding(layer)
        if (
            layer is None
            or not (embeds or is_conv(layer) or isinstance(layer, nn.Linear | ExpertsLinear | Convolution))
            or embeds != (name in contents.embeddings)
        ):
            raise ValueError(
                f"the adapter in {where} has tensors for {name!r}, which is not a layer that can be routed"
            )
        loaded.embeds = embeds
        shape = shape_of(layer)
        call_named(name, check_fits, loaded.kind, shape)
        call_named(name, to_matrices, layer, loaded)
        call_named(name, complete, loaded, layer, f"{name}.weight" in contents.beside)
        check_shapes(name, loaded, *shape, groups=getattr(layer, "groups", 1))
        updates[name] = call_named(name, _update_over, name, layer, loaded, factors, known)
        if name not in layers:
            call_named(name, _check_plain, updates[name][0])
        if "magnitude" in loaded.tensors:
            magnitudes[name] = loaded.tensors["magnitude"].float()
        if "up_bias" in loaded.tensors:
            added[name] = loaded.kind.scale * loaded.tensors["up_bias"].float()
    own: dict[str, dict[str, Tensor | float]] = {}
    beside = Beside.of(contents, checked)
    names = {id(module): name for name, module in holders.items()}
    for change in check_beside(holders, beside, set(updates), where):
        value = change.value.dequantize() if isinstance(change.value, QuantizedWeight) else change.value
        for module, key in change.holders:
            name = names[id(module)]
            own.setdefault(name, {})[key] = value
            if key == "weight" and name in updates:  # the update is over a base of its own
                update, _ = updates.pop(name)
                whole = value.float() + (update.delta().t() if isinstance(module, nn.Embedding) else update.delta())
                if name in magnitudes:
                    whole *= scale_of(magnitudes.pop(name), row_norms(value, update)).unsqueeze(1)
                own[name][key] = whole.to(value)
    for name, magnitude in magnitudes.items():
        weight, (update, _) = weight_of(holders[name]), updates[name]
        moved = dataclasses.replace(update, down=update.down.to(weight.device), up=update.up.to(weight.device))
        norms = row_norms(weight, moved, branch=branch_of(holders[name]))
        own.setdefault(name, {})["scale"] = scale_of(magnitude, norms.cpu())
    for name, bias in added.items():
        here = own.setdefault(name, {})
        base = here.get("bias", holders[name].bias)
        here["bias"] = base.detach().cpu() + bias if isinstance(base, Tensor) else bias
    for name in updates.keys() - layers.keys():
        update, _ = updates.pop(name)
        for key, factor in (("down", update.down), ("up", update.up)):
            assert isinstance(factor, Tensor)
            own.setdefault(name, {})[key] = factor if factor.dtype in FLOAT_DTYPES else factor.float()
        own[name]["s"] = float(update.scale)
    for name, (numbers, rows) in beside.tokens.items():
        for module in check_tokens(holders, name, numbers, rows):
            here = own.setdefault(names[id(module)], {})
            if here or names[id(module)] in updates:
                raise ValueError(f"the adapter in {where} has rows of single tokens and more for {names[id(module)]!r}")
            index, order = torch.tensor(numbers).sort()
            here |= {"token_index": index, "token_rows": rows[order].to(torch.float32)}
    return updates, own


def _check_plain(update: LowRankUpdate) -> None:
    if update.core is not None or not (isinstance(update.down, Tensor) and isinstance(update.up, Tensor)):
        raise ValueError(
            "only a LoRA can be routed there; let lowrank_ops.adapt(model, None, targets) take the layer too"
        )


def _update_over(
    name: str, layer: nn.Module, loaded: Loaded, store: FactorStore | None, known: MutableMapping[tuple[Any, ...], Any]
) -> tuple[LowRankUpdate, tuple[Any, ...] | None]:
    kind, tensors = loaded.kind, loaded.tensors
    if isinstance(kind, LoRA) and not changes_base(kind):
        return LowRankUpdate(tensors["down"], tensors["up"], None, kind.scale), None
    held = "weight", id(layer.weight)  # a weight that layers share is hashed once
    if held not in known:
        known[held] = Base(weight_of(layer), branch_of(layer)).key()
    own = known[held]
    if isinstance(kind, LoRA):
        if loaded.source is None or own != loaded.source.weight:
            raise ValueError(
                f"{kind} has a base of its own, W − s · U₀ D₀, and is exact over the shared base only if that is the "
                "weight it was made from, not quantised; convert it by save_adapter(as_lora=True), or serve it apart"
            )
        down = torch.cat([tensors["down"], tensors["base_down"]], -2)
        up = torch.cat([tensors["up"], -tensors["base_up"]], -1)
        return LowRankUpdate(down, up, None, kind.scale), None
    if kind.form != "additive":
        raise ValueError(f"{kind} stands in place of W and has no base in common with others")
    check_source(own, loaded)
    family = family_of(name, loaded)
    if (made := known.get(family)) is None:  # look once: another thread may drop the entry
        started = start_spectral(kind, weight_of(layer), own, loaded, store, branch_of(layer))
        made = known[family] = family, started.down, started.up
    family, right, left = made  # use the key in ``known``, which thousands of adapters share
    assert right is not None and left is not None  # only the replace form has none
    if isinstance(kind, LoRAXS):
        return LowRankUpdate(right, left, cores.Dense(tensors["core"]), kind.scale), family
    pattern = empty_core(kind, kind.size(*linear_shape(layer)))  # of one expert of a stack
    check_pairs(pattern, loaded)
    return LowRankUpdate(right, left, cores.with_values(pattern, tensors["core"]), kind.scale), family


def family_of(name: str, loaded: Loaded) -> tuple[Any, ...]:
    """What identifies the frozen factors of a layer's LoRA-XS, SVF or SVFT in a file."""
    kind, tensors, source = loaded.kind, loaded.tensors, loaded.source
    assert not isinstance(kind, LoRA)
    stored = [tensors[key] for key in sorted(tensors) if key.startswith(("down", "up"))] if len(tensors) > 1 else []
    made_of = None if source is None else (source.weight, source.fingerprint)
    return "factors", name, type(kind).__name__, kind.rank, kind.factors, made_of, *map(_digest, stored)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
