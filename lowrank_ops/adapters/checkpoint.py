"""Adapters on disk, in the directory that PEFT reads and writes: adapter_config.json, adapter_model.safetensors.

Kinds PEFT does not have use the same two files with their own ``peft_type``. JSON in the metadata of the safetensors
file, under ``lowrank_ops``, records how a layer's frozen factors or changed base were made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import cores
from ..formats import QuantizedWeight
from ..functional import LowRankUpdate
from ..svd.store import FactorStore
from .as_lora import plain_loras
from .beside import apply_changes, check_beside, make_trained, trained_beside
from .conv import Convolution, to_kernels, to_matrices, with_kernels
from .embedding import Embedding, is_embedding
from .expert_files import flatten, peft_names, stacks_of, target_parameters
from .experts import ExpertsLinear, Stack, check_fits
from .exports import FORMATS, export_adapter
from .foreign import check_peft, is_conv, is_linear
from .kinds import LoRA, Spectral
from .linear import AdaptedLayer, branch_of, check_unsplit, check_whole
from .model import freeze, layer_over, replace_layers, replacements_of
from .names import call_named, modules_of, named_holders, target_modules, unwrapped
from .peft_bases import complete
from .peft_files import (
    EMBEDDING,
    FACTORS,
    LORA,
    OURS,
    PREFIX,
    ROWS,
    TOKENS,
    TRAINED,
    Loaded,
    check_pairs,
    check_shapes,
    lora_config,
    read_matrix,
)
from .rounding import Base, keep_base
from .route import check_unpooled
from .sharded import gathered
from .sources import AdapterSource, read_adapters
from .start import (
    Source,
    Start,
    base_of,
    changes_base,
    empty_core,
    record_of,
    start,
)
from .targets import Target, shape_of, target_weight
from .tokens import attach_rows, check_tokens
from .versions import write_files

_OTHER_WEIGHT = "the adapter was made for another weight than the layer has"


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    factors: str = "auto",
    as_lora: bool = False,
    max_bytes: int = 4_000_000_000,
    format: str = "peft",
) -> None:
    """Write the adapters of a model to a directory, which PEFT can load if every adapter is a LoRA.

    A LoRA with a changed base (PiSSA, MiLoRA, LoftQ) is written as the equivalent LoRA of rank 2R over the original
    weight, lora_A = [D; D₀] and lora_B = [U, −U₀]; :func:`load_adapter` separates the halves again. LoRA-XS, SVF and
    SVFT write the core, and their frozen factors or a recipe for these.

    Args:
        model: with at least one adapter.
        path: a directory; created if missing. An older adapter in it is replaced as one: a reader finds the old or the new
            one, also after a kill in between.
        factors: for LoRA-XS, SVF and SVFT. ``"stored"`` writes the frozen factors, in the size of the factors of a LoRA of
            that rank (full rank: up to twice the bytes of W); any model with the same weights loads the file, dense or
            quantised as here, and so does an :class:`AdapterPool`. ``"recipe"`` writes none; loading computes them again
            and compares a fingerprint, for which it needs the weight that they were made from: where they were made before
            W was quantised, that is the dense model. ``"auto"``: a recipe for layers that hold the very weight that the
            factors were made from and whose factors are larger than this weight; else stored. A warning tells if more is
            stored than the weights take.
        as_lora: write every kind as a plain LoRA over the original weight, with lora_alpha / R · U D = ΔW and one lora_alpha
            for all layers, which PEFT, llama.cpp and others read right, and :func:`load_adapter` as a LoRA. Factors are
            float32 and padded with zeros to the largest rank of all layers, or to min(N, K) where that is smaller
            (``rank_pattern``). The file has no dropout.
        max_bytes: with ``as_lora``: of all factors. SVF and SVFT of all n directions become LoRAs of rank n.
        format: ``"peft"``: PEFT's two files. The others write every kind as with ``as_lora``: ``"diffusers"``,
            ``pytorch_lora_weights.safetensors`` for the transformer, the UNet or the text encoder of a pipeline, with
            alpha / R in the factors; ``"gguf"``, ``adapter.gguf`` or the file that path names, for llama.cpp (needs
            the package gguf, and a Llama, Mistral, Qwen 2 or 3, Gemma 2 or 3).

    What else the model trains, such as a head after ``requires_grad_()``, is written whole, as PEFT's ``modules_to_save``
    and ``bias``, and so are the statistics of batch normalisation.

    The tensors keep their dtypes. Ranks and alphas that differ between layers are written to ``rank_pattern`` and
    ``alpha_pattern``.

    Of a model that ``fully_shard`` has sharded every process must call this; all gather, and the first writes.

    Raises:
        ValueError: the model has no adapter, or layers differ in rsLoRA or dropout; trained parameters are sharded by
            FullyShardedDataParallel; with ``as_lora``: factors are asked for too or would take more than ``max_bytes``, or a
            layer's change is no low-rank update of W: a DoRA, a ``lora_bias``, a replace form that did not start as W;
            another format has no place for an embedding, experts, or what is trained beside the adapters.
        ImportError: the package gguf is missing.
    """
    if factors not in ("auto", "recipe", "stored"):
        raise ValueError(f"factors must be 'auto', 'recipe' or 'stored', got {factors!r}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    layers = _adapted(model)
    if as_lora or format != "peft":
        if factors != "auto":
            raise ValueError(f"factors must be 'auto' for a plain LoRA, which has no frozen factors, got {factors!r}")
        if format == "peft":
            write_adapter(model, path, lora_bytes=max_bytes)
            return
        if beside := trained_beside(model).tensors:
            raise ValueError(
                f"format {format!r} has no place for {min(beside)!r}, which is trained beside the adapters"
            )
        for name, layer in layers.items():
            if isinstance(layer, Embedding | ExpertsLinear):
                raise ValueError(f"layer {name!r}: format {format!r} has no place for a LoRA of {type(layer).__name__}")
        with gathered(model) as first:
            loras = plain_loras(layers, max_bytes)
            if first:
                export_adapter(path, format, model, with_kernels(layers, loras))
        return
    stored = write_adapter(model, path, factors)
    held = _nbytes(*(layer.weight for layer in layers.values() if not isinstance(layer.adapter, LoRA)))
    if factors == "auto" and stored > held:
        warnings.warn(
            f"{stored / 1e6:,.0f} MB of frozen factors are stored for weights of {held / 1e6:,.0f} MB, because they were "
            "made from weights that the model does not hold; take a rank, or factors='recipe' if the adapter is only loaded "
            "into the dense model",
            stacklevel=2,
        )


def _adapted(model: nn.Module) -> dict[str, AdaptedLayer]:
    layers = {n: m for n, m in modules_of(model).items() if isinstance(m, AdaptedLayer) and m.adapter is not None}
    if not layers or "" in layers:
        raise ValueError("model has no adapter inside it to save")
    return layers


def write_adapter(
    model: nn.Module, path: str | os.PathLike[str], factors: str = "auto", lora_bytes: int | None = None
) -> int:
    """Write as :func:`save_adapter` does, without its warnings; return the bytes of the factors stored beside weights.

    lora_bytes: write plain LoRAs of at most this size in all.
    """
    layers = _adapted(model)
    with gathered(model) as first:
        tensors, config, metadata, size = _contents(model, layers, factors, lora_bytes)
    if first:
        write_files(Path(path), tensors, config, metadata)
    return size


def _contents(
    model: nn.Module, layers: dict[str, AdaptedLayer], factors: str, lora_bytes: int | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str], int]:
    """What the files hold: tensors, configuration and metadata; and the bytes of stored factors."""
    beside = trained_beside(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in beside.tensors.items():
        owner, _, key = name.rpartition(".")
        # PEFT keeps an adapted layer's own parameters one level deeper. A file holds no tensor twice.
        tensors[f"{PREFIX}{owner}.base_layer.{key}" if owner in layers else PREFIX + name] = tensor.detach().clone()
    tensors |= {PREFIX + name + TOKENS: rows.detach().clone() for name, (_, rows) in beside.tokens.items()}
    records: dict[str, Any] = {}
    size = 0
    stacks = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertsLinear)}
    for name, layer in layers.items():
        call_named(name, check_whole, layer)
    loras = None if lora_bytes is None else plain_loras(layers, lora_bytes)
    plain = loras is not None or all(isinstance(layer.adapter, LoRA) for layer in layers.values())
    plain &= all(stack.peft_swapped is not None for stack in stacks.values())
    names = peft_names(stacks) if plain else {}
    keys: dict[int, str] = {}
    for name, layer in layers.items():
        if loras is not None:
            parts = _named(layer, dict(zip(FACTORS, loras[name][1:], strict=True)))
        else:
            # PEFT has no dropout for experts, so that a config with them has none, and the record has it.
            dropped = isinstance(layer.adapter, LoRA) and layer.adapter.dropout > 0 and len(stacks) > 0
            if layer.source is not None or not plain or dropped:
                records[name] = layer_record(layer, keys)
            again = is_better_made_again(layer, records.get(name, {}))
            stored = factors == "stored" or (factors == "auto" and not again)
            if stored and not isinstance(layer.adapter, LoRA) and layer.weight is not None:
                size += _nbytes(layer.down, layer.up)
            parts = layer_tensors(layer, stored)
        if name in names:
            parts = dict(zip(parts, flatten(stacks[name], *parts.values()), strict=True))
        tensors |= {f"{PREFIX}{names.get(name, name)}.{key}": tensor for key, tensor in parts.items()}
    kinds = {name: layer.adapter for name, layer in layers.items() if isinstance(layer.adapter, LoRA)}
    if loras is not None:
        kinds = {name: kind for name, (kind, *_) in loras.items()}
    config = peft_config(model, kinds, set(stacks))
    if not plain:
        config = {"peft_type": OURS, "base_model_name_or_path": config["base_model_name_or_path"]}
    config |= beside.config()
    metadata = {"format": "pt"} | ({"lowrank_ops": json.dumps(records)} if records else {})
    if beside.tensors:
        metadata[TRAINED] = json.dumps(sorted(beside.trained))
    return tensors, config, metadata, size


def is_better_made_again(layer: AdaptedLayer, record: Mapping[str, Any]) -> bool:
    """Whether the layer holds the weight that its factors were made from, and that is smaller than they are."""
    own = record.get("base")
    return own is not None and own == record["weight"] and _nbytes(layer.down, layer.up) > _nbytes(layer.weight)


def _nbytes(*matrices: QuantizedWeight | Tensor | None) -> int:
    return sum(0 if matrix is None else matrix.nbytes for matrix in matrices)


def layer_tensors(layer: AdaptedLayer, stored: bool) -> dict[str, Tensor]:
    """The tensors written for a layer."""
    assert layer.down is not None and layer.up is not None
    if isinstance(layer.adapter, LoRA):
        assert isinstance(layer.down, Tensor) and isinstance(layer.up, Tensor)
        down, up = layer.down.detach(), layer.up.detach()
        if layer.base_down is not None and layer.base_up is not None:
            down = torch.cat([down, layer.base_down.to(down.dtype)], -2)
            up = torch.cat([up, -layer.base_up.to(up.dtype)], -1)
        made = {"down": down, "up": up, "magnitude": layer.magnitude, "up_bias": layer.up_bias}
        return _named(layer, made)
    assert layer.core is not None
    tensors = {"lowrank_ops.core": layer.core.detach().contiguous()}
    core = layer.make_core(layer.core.detach())
    if isinstance(core, cores.Sparse):
        tensors["lowrank_ops.pairs"] = torch.stack([core.rows, core.cols]).to(torch.int32)
    if stored:
        for name, factor in (("down", layer.down), ("up", layer.up)):
            if isinstance(factor, QuantizedWeight):
                tensors |= factor._entries(f"lowrank_ops.{name}")
            else:
                tensors[f"lowrank_ops.{name}"] = factor.detach().contiguous()
        if layer.core_offset is not None:
            tensors["lowrank_ops.core_offset"] = layer.core_offset.contiguous()
    return tensors


def _named(layer: AdaptedLayer, parts: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The parts of a LoRA by PEFT's names."""
    names = EMBEDDING if isinstance(layer, Embedding) else LORA
    held = {key: part.detach().contiguous() for key, part in parts.items() if part is not None}
    held = to_kernels(layer, held) if isinstance(layer, Convolution) else held
    return {names[key]: part for key, part in held.items()}


def layer_record(layer: AdaptedLayer, keys: dict[int, str]) -> dict[str, Any]:
    """Record the kind of a layer and the weight its frozen parts were made from; keys: of weights by id, extended here."""
    assert layer.adapter is not None
    record = record_of(layer.adapter, layer.source)
    if "factors" in record["kind"]:  # record the actual type, which None leaves open
        assert layer.down is not None
        down = layer.down
        made = down.format.name if isinstance(down, QuantizedWeight) else str(down.dtype)[len("torch.") :]
        record["kind"]["factors"] = made
    if layer.source is not None and not isinstance(layer.adapter, LoRA) and layer.weight is not None:
        held = id(layer.weight)
        if held not in keys:
            split = layer.split
            keys[held] = layer.base.key() if split is None or split.key is None else split.key
        record["base"] = keys[held]
    return record


def peft_config(model: nn.Module, kinds: Mapping[str, LoRA], stacks: set[str]) -> dict[str, Any]:
    """What adapter_config.json says of LoRAs by the names of their layers; stacks: those that are stacks of experts."""
    inner = unwrapped(model)
    base = getattr(inner, "name_or_path", None) or None
    if not kinds:
        return {"base_model_name_or_path": base}
    stacks = stacks & kinds.keys()
    config = lora_config(kinds, target_modules(model, kinds.keys() - stacks)) | {
        "base_model_name_or_path": base,
        # PEFT's AutoPeftModel finds the class of the model by this, as in PEFT's own files without a task_type.
        "auto_mapping": {"base_model_class": type(inner).__name__, "parent_library": type(inner).__module__},
    }
    if stacks:
        config |= {"lora_dropout": 0.0, "target_parameters": target_parameters(stacks, stacks_of(modules_of(model)))}
    return config


def load_adapter(
    model: nn.Module,
    path: AdapterSource,
    factors: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Read adapters that :func:`save_adapter`, PEFT or others wrote, or that a whole saved model has, into a model in place.

    A layer with an adapter of the same kind and rank takes the file's values. Other layers get an adapter, over NF4 if
    the layer already is a :class:`Linear`, over its dense weight if it is a plain linear layer. Frozen factors missing
    in the file, and a changed base, are made from the layer's weight, which must be the weight they were first made
    from.

    Args:
        model: the base model the adapter was made for, before or after :func:`adapt`.
        path: the directory. If it holds no adapter_config.json but the state of an adapted model (``save_pretrained``, a
            checkpoint of ``Trainer``, also in shards), the adapter is taken from that state, without its base. Or a
            ``.safetensors`` file, with its configuration in its metadata or beside it, or tensors by name: in PEFT's layout,
            diffusers' (``pytorch_lora_weights.safetensors``, which may be given by its directory) or kohya's. Of a file for
            several models the layers of this model are taken, and a warning names the others.
        factors: a directory written by ``lowrank-ops precompute``, for kinds that need singular vectors.
        config: for tensors: the contents of adapter_config.json (``r``, ``lora_alpha``, …); None if the layout needs none.

    Returns:
        model, frozen as by :func:`adapt`; what the file has as trained beside the adapters is trained on.

    Raises:
        FileNotFoundError: a file, or the directory ``factors``, is missing.
        ValueError: the files are damaged or of a foreign kind, or do not fit this model: a layer is missing; a shape, a
            rank or a kind differs; the factors belong to another weight; PEFT has adapters in the model; an
            :class:`AdapterPool` routes a layer; the layout of a file is not known, it lacks alpha, or two of its prefixes
            mean one layer. The message names the layer, and the model stays unchanged.
    """
    modules = modules_of(model)
    stacks = stacks_of(modules)
    found, beside, where = read_adapters(path, modules, stacks, config)
    store = None if factors is None else FactorStore.existing(factors)
    check_peft(model)
    plan: dict[str, tuple[Target, Loaded]] = {}
    absent = [name for name in found if not _takes_one(stacks.get(name) or modules.get(name))]
    if absent:
        raise ValueError(
            f"the adapter in {where} has tensors for {', '.join(map(repr, absent[:5]))}{', …' * (len(absent) > 5)}, which "
            "is not a linear layer, a convolution or an embedding of the model"
        )
    for name, loaded in found.items():
        layer = stacks.get(name) or modules[name]
        embeds = isinstance(layer, Embedding) or (isinstance(layer, nn.Module) and is_embedding(layer))
        if loaded.embeds not in (embeds, None):
            kinds = ("a linear layer", "an embedding")
            raise ValueError(
                f"the adapter in {where} has tensors of {kinds[not embeds]} for {name!r}, which is {kinds[embeds]}"
            )
        shape = shape_of(layer)
        call_named(name, check_fits, loaded.kind, shape)
        call_named(name, to_matrices, layer, loaded)
        call_named(name, complete, loaded, layer, f"{name}.weight" in beside.tensors)
        check_shapes(name, loaded, *shape, groups=getattr(layer, "groups", 1))
        call_named(name, _check_layer, layer, loaded)
        plan[name] = (layer, loaded)
    ours = {name: m for name, m in modules.items() if isinstance(m, AdaptedLayer)}
    uncovered = [name for name, m in ours.items() if m.adapter is not None and name not in plan]
    if uncovered:
        raise ValueError(f"the adapter in {where} has nothing for the adapted layers {', '.join(uncovered[:5])}")
    holders = dict(named_holders(model))
    changes = check_beside(holders, beside, set(plan), where)
    places = {name: check_tokens(holders, name, *of_module) for name, of_module in beside.tokens.items()}
    if untold := [n for n in trained_beside(model).tokens if n not in places]:
        raise ValueError(f"the adapter in {where} has no rows for the tokens that {untold[0]!r} trains")
    changed = [holder for change in changes for holder, _ in change.holders]
    for holder in (*changed, *(module for place in places.values() for module in place)):
        check_unpooled(holder)
    for name, place in places.items():
        if any(module is layer for module in place for layer, _ in plan.values()):
            raise ValueError(f"the adapter in {where} has rows of single tokens and an update for {name!r}")

    # Everything that can fail comes before the model is changed.
    made = {
        name: call_named(name, _attach, layer, loaded, store)
        for name, (layer, loaded) in plan.items()
        if not isinstance(layer, AdaptedLayer) or layer.adapter is None
    }
    replacements = replacements_of({name: plan[name][0] for name in made}, made)
    if store is not None:
        store.check_used()
    for name, (layer, loaded) in plan.items():
        target = made.get(name, layer)
        assert isinstance(target, AdaptedLayer)
        if isinstance(loaded.kind, LoRA):  # take alpha and dropout from the file
            target.adapter = dataclasses.replace(loaded.kind, init=getattr(target.adapter, "init", loaded.kind.init))
            target._set_dropout()
        with torch.no_grad():
            for part in (*LORA, "core"):
                if part in loaded.tensors and isinstance(loaded.kind, LoRA) == (part != "core"):
                    getattr(target, part).copy_(loaded.tensors[part])
    replacements |= make_trained(changes)
    freeze(model)
    apply_changes(changes, replacements)
    replace_layers(model, replacements)
    for name, place in places.items():
        attach_rows(place, *beside.tokens[name])
    if kept := [name for name in sorted(trained_beside(model).trained - beside.tensors.keys())]:
        warnings.warn(
            f"the adapter in {where} has nothing for {', '.join(kept[:5])}{', …' * (len(kept) > 5)}, which the model "
            "trains beside its adapters; they stay as they are",
            stacklevel=2,
        )
    return model


def _takes_one(layer: nn.Module | Stack | None) -> bool:
    """Whether an adapter can be loaded over the layer."""
    if layer is None or isinstance(layer, Stack | AdaptedLayer):
        return layer is not None
    return is_embedding(layer) or is_linear(layer) or is_conv(layer)


def check_source(own: str, loaded: Loaded) -> Source:
    """Tell what the factors were made from; raise unless that is the layer's weight, whose key is ``own``."""
    source = _source(loaded)
    if own not in (source.weight, loaded.base):
        raise ValueError(_OTHER_WEIGHT)
    return source


def _source(loaded: Loaded) -> Source:
    if loaded.source is None:
        raise ValueError("the file does not say which weight its factors are of")
    return loaded.source


def _check_stands_for(base: Base, start: LowRankUpdate) -> None:
    """Raise unless U diag(S) Vᵀ, the start of a replace form, is W or a part of it: ⟨U S Vᵀ, W⟩ ≈ ‖U S Vᵀ‖²."""
    started, w = start.delta().flatten(), base.dense().flatten()
    if not torch.dot(started, w) >= 0.5 * torch.dot(started, started):
        raise ValueError(_OTHER_WEIGHT)


def _check_layer(layer: Target, loaded: Loaded) -> None:
    """Raise if the layer cannot take what the file holds."""
    held = target_weight(layer) if not isinstance(layer, AdaptedLayer) else layer
    if held.device.type == "meta":
        raise ValueError("the layer is on the meta device and cannot hold an adapter; materialise it first")
    if not isinstance(layer, Stack):
        check_unpooled(layer)
    present = layer.adapter if isinstance(layer, AdaptedLayer) else None
    if present is None:
        return
    assert isinstance(layer, AdaptedLayer)
    check_unsplit(layer)
    check_whole(layer)
    kind = loaded.kind
    same = type(present) is type(kind) and changes_base(present) == changes_base(kind)
    if isinstance(present, LoRA) and isinstance(kind, LoRA):
        same = same and (present.dora, present.lora_bias) == (kind.dora, kind.lora_bias)
    if not same:
        raise ValueError(f"the layer has the adapter {present} and the file one of {kind}")
    if isinstance(present, LoRA) and isinstance(kind, LoRA):
        if present.rank != kind.rank:
            raise ValueError(f"the layer has an adapter of rank {present.rank} and the file one of {kind.rank}")
        if changes_base(kind) and dataclasses.replace(present, dropout=kind.dropout) != kind:
            raise ValueError(f"the layer has the adapter {present} and the file one of {kind}")
    else:
        mine = {k: v for k, v in dataclasses.asdict(present).items() if k != "factors"}
        if mine != {k: v for k, v in dataclasses.asdict(kind).items() if k != "factors"}:
            raise ValueError(f"the layer has the adapter {present} and the file one of {kind}")
        check_pairs(layer.make_core(layer.core), loaded)
    if layer.source is not None and loaded.source is not None and (why := layer.source.difference(loaded.source)):
        raise ValueError(f"the adapter does not belong to this layer's factors: {why}")
    for name in ("base_down", "base_up") if changes_base(kind) else ():
        mine, theirs = getattr(layer, name), loaded.tensors[name].to(layer.device)
        # The layer's base was made with its own vectors; rounding on another machine changes them by less than this.
        if (mine - theirs).norm() > 1e-3 * theirs.norm():
            raise ValueError(
                "the layer's base was made with other vectors than the adapter's; load it into the dense model instead"
            )


def _attach(layer: Target, loaded: Loaded, store: FactorStore | None) -> AdaptedLayer:
    """A new layer over the weight of a layer without an adapter, started as the file's layer was."""
    kind, tensors, weight = loaded.kind, loaded.tensors, target_weight(layer)
    if isinstance(kind, LoRA):  # trained parameters are float32, whatever the file has
        down, up = (tensors[name].to(torch.float32, copy=True) for name in FACTORS)
    if isinstance(kind, LoRA) and not changes_base(kind):
        kept = weight if isinstance(weight, QuantizedWeight) else weight.contiguous()  # a Conv1D holds the transpose
        started = _with_rows(Start(kept, down, up), tensors)
        return layer_over(layer, kind, None, started=_move(started, weight))
    own = Base(weight, branch := branch_of(layer)).key()
    if isinstance(kind, LoRA):
        if isinstance(weight, QuantizedWeight):
            raise ValueError(
                f"the adapter has the base W − s · U₀ D₀ of {kind}, and the layer only a quantised W; load it into the "
                "dense model, or adapt that with the same kind first"
            )
        if loaded.source is None or own != loaded.source.weight:
            raise ValueError(_OTHER_WEIGHT)
        shift = (tensors["base_down"].to(weight.device), tensors["base_up"].to(weight.device))
        started = _with_rows(Start.over(base_of(weight, kind.scale, shift, None), down, up, shift=shift), tensors)
    else:
        started = start_spectral(kind, weight, own, loaded, store, branch)
        check_pairs(started.core, loaded)
    started.source = loaded.source
    return layer_over(layer, kind, None, started=_move(started, weight))


def _with_rows(started: Start, tensors: Mapping[str, Tensor]) -> Start:
    """Add what a DoRA or a lora_bias has for each row."""
    for name in ROWS:
        setattr(started, name, tensors[name].to(torch.float32, copy=True) if name in tensors else None)
    return started


def start_spectral(
    kind: Spectral,
    weight: QuantizedWeight | Tensor,
    own: str,
    loaded: Loaded,
    store: FactorStore | None,
    branch: LowRankUpdate | None = None,
) -> Start:
    stored = "down" in loaded.tensors or "down.absmax" in loaded.tensors
    # The file of a replace form cannot name the quantised weight, which the layer that was saved did not have.
    by_numbers = stored and kind.form == "replace" and isinstance(weight, QuantizedWeight)
    source = _source(loaded) if by_numbers else check_source(own, loaded)
    if stored:
        *stack, N, K = weight.shape
        R = kind.size(N, K)
        core = empty_core(kind, R, weight.device, *stack)
        offset = loaded.tensors.get("core_offset")
        if kind.form == "replace" and (offset is None or offset.shape != core.values.shape):
            got = "nothing" if offset is None else list(offset.shape)
            raise ValueError(f"the stored core_offset must be {list(core.values.shape)} for {kind}, got {got}")
        down, up = (read_matrix(loaded.tensors, name) for name in ("down", "up"))
        for name, factor, shape in (("down", down, (*stack, R, K)), ("up", up, (*stack, N, R))):
            if tuple(factor.shape) != shape:  # kernels do not check it
                raise ValueError(
                    f"the stored {name} must be {list(shape)} for {kind} and a weight {list(weight.shape)}, got "
                    f"{list(factor.shape)}"
                )
        if by_numbers and offset is not None and isinstance(weight, QuantizedWeight):
            _check_stands_for(Base(weight, branch), LowRankUpdate(down, up, cores.with_values(core, offset)))
        if kind.form == "additive":
            return Start.over(keep_base(weight, None, branch), down, up, core=core, offset=offset)
        return Start(None, down, up, core, offset)
    if own != source.weight:
        raise ValueError(
            "the factors were made from W before it was quantised, and the file has only a recipe for them; save the "
            "adapter with factors='auto' or 'stored', or load it into the dense model"
        )
    started = start(kind, weight, None, store, own, branch=branch)
    assert started.source is not None
    if why := started.source.difference(source):
        raise ValueError(f"the factors made here are not those of the adapter: {why}; save it with factors='stored'")
    return started


def _move(started: Start, weight: QuantizedWeight | Tensor) -> Start:
    """Move a start to the device of the weight."""
    for name in ("down", "up", "offset", *ROWS):
        value = getattr(started, name)
        setattr(started, name, None if value is None else value.to(weight.device))
    return started
