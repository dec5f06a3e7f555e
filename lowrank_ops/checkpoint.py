"""Adapters on disk, in the directory that PEFT reads and writes: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import LoRA
from .linear import Linear, is_linear, linear_shape
from .model import _named, _replace, freeze

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT's names for the factors; ours are the mathematical roles.
_FACTORS = {"down": "lora_A", "up": "lora_B"}
# Options that change what the tensors mean; with another value than these, ΔW is not s · U D on this base.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", None),
}


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of a model as a directory that PEFT loads as it is.

    Args:
        model: with at least one adapter.
        path: a directory; it is made where it is missing. An older adapter in it is replaced only by a whole new one.

    The tensors keep their dtypes. Ranks and alphas that differ between layers go into ``rank_pattern`` and
    ``alpha_pattern``.

    Raises:
        ValueError: the model has no adapter, or some layers use rsLoRA or a dropout that others do not.
    """
    layers = {name: m for name, m in _modules(model).items() if isinstance(m, Linear) and m.adapter is not None}
    if not layers or "" in layers:
        raise ValueError("model has no adapter inside it to save")
    kinds = {name: layer.adapter for name, layer in layers.items() if layer.adapter is not None}
    for option in ("rslora", "dropout"):
        values = {getattr(kind, option) for kind in kinds.values()}
        if len(values) > 1:
            raise ValueError(f"a saved adapter has one {option} for all layers, got {sorted(values)}")
    first = next(iter(kinds.values()))
    rank = Counter(kind.rank for kind in kinds.values()).most_common(1)[0][0]
    alpha = Counter(kind.alpha for kind in kinds.values()).most_common(1)[0][0]
    base = getattr(model, "name_or_path", None)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": _target_modules(model, set(layers)),
        # Anchored by their full names: PEFT reads a key as a regular expression that may match an ending.
        "rank_pattern": {f"^{re.escape(name)}": k.rank for name, k in kinds.items() if k.rank != rank},
        "alpha_pattern": {f"^{re.escape(name)}": k.alpha for name, k in kinds.items() if k.alpha != alpha},
        "task_type": None,
    }
    tensors = {
        f"{_PREFIX}{name}.{theirs}.weight": getattr(layer, ours).detach().contiguous()
        for name, layer in layers.items()
        for ours, theirs in _FACTORS.items()
    }
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    # Both files are whole before either replaces an older one.
    scratch = {name: directory / (name + ".new") for name in (TENSORS, CONFIG)}
    try:
        save_file(tensors, scratch[TENSORS], metadata={"format": "pt"})
        scratch[CONFIG].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name, file in scratch.items():
            file.replace(directory / name)
    finally:
        for file in scratch.values():
            file.unlink(missing_ok=True)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read adapters that :func:`save_adapter` or PEFT wrote into a model, in place.

    A layer that has an adapter of the same rank gets its numbers; one without gets an adapter, over NF4 where the layer
    is a :class:`Linear` already and over its dense weight where it is a plain linear layer.

    Args:
        model: the base the adapter was made for, before or after :func:`adapt`.
        path: the directory.

    Returns:
        model, everything but the adapters frozen.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are damaged, are of another kind than LoRA, or do not fit this model: a layer is missing, a
            shape or a rank differs. The message names it, and the model is left as it was.
    """
    directory = Path(path)
    config = _read_config(directory / CONFIG)
    factors = _read_factors(directory / TENSORS)
    modules = _modules(model)
    plan: list[tuple[nn.Module, LoRA, dict[str, Tensor]]] = []
    for name, pair in factors.items():
        layer = modules.get(name)
        if layer is None or not (isinstance(layer, Linear) or is_linear(layer)):
            raise ValueError(
                f"the adapter in {directory} has factors for {name!r}, which is no linear layer of the model"
            )
        kind = _named(name, _kind, config, name)
        N, K = linear_shape(layer)
        expected = {"down": (kind.rank, K), "up": (N, kind.rank)}
        for factor, shape in expected.items():
            if tuple(pair[factor].shape) != shape:
                raise ValueError(
                    f"{name}.{_FACTORS[factor]}.weight must be {list(shape)} for rank {kind.rank} and a layer {N} x {K}, "
                    f"got {list(pair[factor].shape)}"
                )
        _named(name, kind.check, N, K)
        if layer.weight.device.type == "meta":
            raise ValueError(f"layer {name!r} is on the meta device and cannot hold an adapter; materialise it first")
        present = layer.adapter if isinstance(layer, Linear) else None
        if present is not None and present.rank != kind.rank:
            raise ValueError(f"layer {name!r} has an adapter of rank {present.rank} and the file one of {kind.rank}")
        plan.append((layer, kind, pair))
    uncovered = [n for n, m in modules.items() if isinstance(m, Linear) and m.adapter is not None and n not in factors]
    if uncovered:
        raise ValueError(f"the adapter in {directory} has nothing for the adapted layers {', '.join(uncovered[:5])}")

    # What can fail comes before what changes the model.
    replacements: dict[nn.Module, nn.Module] = {
        layer: _named(name, Linear.from_linear, layer, kind, None)
        for (layer, kind, _), name in zip(plan, factors, strict=True)
        if not isinstance(layer, Linear)
    }
    for layer, kind, pair in plan:
        target = replacements.get(layer, layer)
        assert isinstance(target, Linear)
        if target.adapter is None:
            target.set_adapter(kind)
        target.adapter = kind
        with torch.no_grad():
            for factor, tensor in pair.items():
                getattr(target, factor).copy_(tensor)
    _replace(model, replacements)
    freeze(model)
    return model


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, by the names of the model itself where torch.compile or data parallelism wraps it."""
    wrappers = nn.DataParallel | nn.parallel.DistributedDataParallel
    while hasattr(model, "_orig_mod") or isinstance(model, wrappers):
        model = model.module if isinstance(model, wrappers) else model._orig_mod  # type: ignore[assignment]
    return {name.replace("._orig_mod", ""): module for name, module in model.named_modules()}


def _target_modules(model: nn.Module, adapted: set[str]) -> list[str] | str:
    """Endings that mean the adapted layers and no other module, else their full names, else a pattern of these.

    Full names may be endings of other names, and a pattern is what not every reader of these files takes.
    """
    names = list(_modules(model))
    for endings in (sorted({name.rpartition(".")[2] for name in adapted}), sorted(adapted)):
        if {n for n in names if any(n == e or n.endswith("." + e) for e in endings)} == adapted:
            return endings
    return "|".join(re.escape(name) for name in sorted(adapted))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path.parent}: {path.name} is missing")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} describes a {kind!r} adapter; only 'LORA' can be loaded")
    for option, plain in _PLAIN.items():
        if option in config and config[option] not in plain:
            raise ValueError(
                f"{path} has {option}={config[option]!r}, which changes what the factors mean; a plain LoRA is needed"
            )
    for option in ("rank_pattern", "alpha_pattern"):
        table = config.get(option) or {}
        try:
            for pattern in dict(table):
                re.compile(pattern)
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(f"{path} has {option}={table!r}, which is no table of patterns: {error}") from error
    return config


def _read_factors(path: Path) -> dict[str, dict[str, Tensor]]:
    """Layer name -> its factors."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path.parent}: {path.name} is missing")
    factors: dict[str, dict[str, Tensor]] = {}
    ours = {theirs: name for name, theirs in _FACTORS.items()}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.(lora_A|lora_B)\.weight", key)
                if match is None:
                    raise ValueError(f"{path} holds {key!r}, which is no LoRA factor of a linear layer")
                factors.setdefault(match[1], {})[ours[match[2]]] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    for name, pair in factors.items():
        missing = [theirs for own, theirs in _FACTORS.items() if own not in pair]
        if missing:
            raise ValueError(f"{path} lacks {name}.{missing[0]}.weight")
        for own, tensor in pair.items():
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(f"{name}.{_FACTORS[own]}.weight in {path} must be finite floats")
    if not factors:
        raise ValueError(f"{path} holds no factor")
    return factors


def _kind(config: dict[str, Any], name: str) -> LoRA:
    def pattern(table: dict[str, Any] | None, default: Any) -> Any:
        for key, value in (table or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return default

    return LoRA(
        rank=pattern(config.get("rank_pattern"), config.get("r", 8)),
        alpha=pattern(config.get("alpha_pattern"), config.get("lora_alpha", 8)),
        rslora=bool(config.get("use_rslora", False)),
        dropout=config.get("lora_dropout", 0.0),
    )
