"""Parameters that stand in an adapter's file whole, beside the low-rank updates: heads, embeddings, norms and biases.

They are PEFT's ``modules_to_save`` and ``bias``, and its copies of the weights of embeddings and heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..formats import WEIGHTS, QuantizedWeight
from .conv import Convolution
from .embedding import Embedding
from .linear import AdaptedLayer, Linear
from .model import COPIED, make_plain
from .names import named_holders
from .peft_files import Contents
from .tokens import CHILD, TokenRows


@dataclass
class Beside:
    """What a file holds beside the updates.

    Attributes:
        tensors: name of a parameter or buffer in the base model -> its values.
        trained: the names of what was trained; the rest is as it was in the base.
        modules: endings of the names of the modules that were trained whole, as PEFT looks for them.
        bias: which biases were trained, as PEFT says it.
        tied: whether parameters that the base model ties were trained as one.
        tokens: name of an embedding or a head -> numbers of tokens, and their rows [n, H], which were trained.
        token_endings: those names -> endings of them that no other name has.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)
    bias: str = "none"
    tied: bool = False
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    token_endings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, contents: Contents, config: Mapping[str, Any]) -> Beside:
        """What a file holds beside the updates, as its configuration means it."""
        modules = config.get("modules_to_save") or []
        modules = [modules] if isinstance(modules, str) else modules
        bias = config.get("bias") or "none"

        def trains(name: str) -> bool:
            path = name.split(".")
            holders = [".".join(path[:depth]) for depth in range(1, len(path))]
            whole = name not in contents.bases and any(h.endswith(ending) for h in holders for ending in modules)
            return whole or (name.endswith("bias") and bias != "none")

        trained = set(filter(trains, contents.beside)) if contents.trained is None else set(contents.trained)
        tokens = {name: (_numbers(config, name), rows) for name, rows in contents.tokens.items()}
        return cls(contents.beside, trained, modules, bias, bool(config.get("ensure_weight_tying")), tokens)

    def config(self) -> dict[str, Any]:
        """The options of adapter_config.json."""
        options: dict[str, Any] = {"bias": self.bias, "modules_to_save": self.modules or None}
        if self.tokens:
            named = {self.token_endings[name]: numbers for name, (numbers, _) in self.tokens.items()}
            options["trainable_token_indices"] = named
        return options | ({"ensure_weight_tying": True} if self.tied else {})


def trained_beside(model: nn.Module) -> Beside:
    """What the model trains beside its adapters, with the statistics that batch normalisation gathers."""
    holders = dict(named_holders(model))
    layers = {name: m for name, m in holders.items() if isinstance(m, AdaptedLayer)}
    adapters = {id(p) for layer in layers.values() for p in layer.trained()}
    adapters |= {id(m.rows) for m in holders.values() if isinstance(m, TokenRows)}
    beside = Beside()
    whole: set[str] = set()
    seen: set[int] = set()
    for name, module in holders.items():
        before = f"{name}." if name else ""
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad and id(p) not in adapters}
        beside.trained |= {before + key for key in own}
        held, marked = _own(module), vars(module).get(COPIED, ())
        copied = {key: held[key] for key in marked if key not in own}
        beside.tensors |= {
            before + key: t.dequantize() if isinstance(t, QuantizedWeight) else t for key, t in copied.items()
        }
        beside.tied |= any(id(parameter) in seen for parameter in own.values())
        seen |= {id(parameter) for parameter in own.values()}
        # PEFT has biases of linear layers apart, and cannot copy a module that it adapts inside.
        if isinstance(module, AdaptedLayer) or any(other.startswith(before) for other in layers):
            beside.tensors |= {before + key: parameter for key, parameter in own.items()}
        elif own or (isinstance(module, _NormBase) and module.running_mean is not None):
            whole.add(name)
            beside.tensors |= {before + key: value for key, value in module.state_dict(keep_vars=True).items()}
        if isinstance(module, AdaptedLayer) and own:
            beside.bias = "all" if module.adapter is None or beside.bias == "all" else "lora_only"
    beside.modules = _endings(holders, whole)
    for name, tensor in beside.tensors.items():
        if hasattr(tensor, "full_tensor"):  # a DTensor
            raise ValueError(f"{name} is sharded over processes; gather it first")
    for name, module in holders.items():
        if isinstance(rows := module._modules.get(CHILD), TokenRows):
            beside.tokens[name] = rows.index.tolist(), rows.rows
            beside.token_endings[name] = next(iter(_endings(holders, {name})), name)
    return beside


def _numbers(config: Mapping[str, Any], name: str) -> list[int]:
    """The tokens whose rows a file has for a module."""
    option = config.get("trainable_token_indices") or []
    if isinstance(option, Mapping):
        option = next((numbers for ending, numbers in option.items() if name.endswith(ending)), [])
    return list(option)


def _endings(names: Iterable[str], chosen: set[str]) -> list[str]:
    """Endings of the chosen names that no other name has; PEFT compares them letter by letter, also within a word."""
    found: set[str] = set()
    for name in sorted(chosen):
        path = name.split(".")
        endings = (".".join(path[at:]) for at in reversed(range(len(path))))
        # A name that is itself the ending of another one is left out: PEFT still reads its values, as a part of the base.
        found |= {next((e for e in endings if all(n in chosen for n in names if n.endswith(e))), "")}
    return sorted(found - {""})


@dataclass(frozen=True)
class Change:
    """New values for a parameter, buffer or 4-bit weight of a model.

    Attributes:
        holders: the modules that hold it, with their keys; several if it is tied.
        value: on its device and of its dtype.
        trained: whether it is trained from there on.
    """

    holders: list[tuple[nn.Module, str]]
    value: Tensor | QuantizedWeight
    trained: bool


def check_beside(holders: Mapping[str, nn.Module], beside: Beside, adapted: set[str], where: str) -> list[Change]:
    """The changes that bring a file's values into a model; values that it has already need none.

    A parameter that the model ties, and for which the file has several values, or a value for one place only, is no
    longer tied after the change.

    Args:
        holders: the modules of the model, by all their names.
        adapted: names of the layers for which the file has an update.

    Raises:
        ValueError: the model has no such parameter, or another shape there; values that were trained as one differ.
    """
    if not beside.tensors:
        return []
    places: dict[int, dict[tuple[int, str], tuple[nn.Module, str]]] = {}
    for module in holders.values():
        for key, tensor in _own(module).items():
            places.setdefault(id(tensor), {})[id(module), key] = module, key
    given: dict[tuple[int, str], tuple[str, Tensor]] = {}
    for name, value in beside.tensors.items():
        owner, _, key = name.rpartition(".")
        present = _own(holders[owner]).get(key) if owner in holders else None
        if present is None:
            raise ValueError(f"the adapter in {where} has values for {name!r}, for which the model has no place")
        if getattr(holders[owner], "transposed", False) and key == "weight":
            value = value.t()
        if tuple(value.shape) != tuple(present.shape):
            more = "; give the model as many tokens (resize_token_embeddings) or labels first"
            hint = more * (tuple(value.shape[1:]) == tuple(present.shape[1:]))
            raise ValueError(
                f"{name} in {where} must be {list(present.shape)} as in the model, got {list(value.shape)}{hint}"
            )
        if value.is_floating_point() != present.dtype.is_floating_point or not torch.isfinite(value).all():
            raise ValueError(f"{name} in {where} must be finite and of a kind of {present.dtype}, got {value.dtype}")
        if owner in adapted and key == "weight" and name in beside.trained:
            raise ValueError(f"{where} has an update of {owner!r} and a trained weight in its place")
        given[id(holders[owner]), key] = name, value
    changes: list[Change] = []
    for tied in places.values():
        here = {place: given[place] for place in tied if place in given}
        if not here:
            continue
        first = next(iter(here.values()))[1]
        equal = all(torch.equal(value, first) for _, value in here.values())
        if beside.tied and not equal:
            names = " and ".join(name for name, _ in here.values())
            raise ValueError(f"{names} in {where} were trained as one and differ")
        as_one = equal and (beside.tied or len(here) == len(tied))
        for place, (name, value) in list(here.items())[: 1 if as_one else None]:
            module, key = tied[place]
            present = _own(module)[key]
            kept = _kept(present, value, name in beside.trained)
            if kept is not None:
                changes.append(Change(list(tied.values()) if as_one else [(module, key)], kept, name in beside.trained))
    return changes


def _own(module: nn.Module) -> dict[str, Tensor | QuantizedWeight]:
    """The tensors that a module holds itself, and its 4-bit weight."""
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    if isinstance(module, AdaptedLayer):
        own = {"weight": module.weight, "bias": module.bias}
    return {key: tensor for key, tensor in own.items() if tensor is not None}


def _kept(present: Tensor | QuantizedWeight, value: Tensor, trained: bool) -> Tensor | QuantizedWeight | None:
    """A file's values as the model keeps them; None if it has them, and need not train them."""
    value = value.to(present.device, present.dtype)
    if isinstance(present, Tensor):
        return None if torch.equal(present, value) and not trained else value.clone()
    if trained:
        return value
    options = (
        {} if present.format.exponents else {"block_size": present.block_size, "double_quant": present.double_quant}
    )
    made = WEIGHTS[present.format.name].quantize(value, **options)
    same = all(torch.equal(a, b) for a, b in zip(made.buffers(), present.buffers(), strict=True))
    return None if same else made


def make_trained(changes: Iterable[Change]) -> dict[nn.Module, nn.Module]:
    """The plain layers that train a weight whole, by the layers over a frozen weight that they replace."""
    return {
        layer: make_plain(layer, nn.Parameter(change.value))
        for change in changes
        for layer, key in change.holders
        if (
            isinstance(layer, Linear)
            or (isinstance(layer, Embedding | Convolution) and isinstance(layer.weight, QuantizedWeight))
        )
        and key == "weight"
        and change.trained
        and isinstance(change.value, Tensor)
    }


def apply_changes(changes: Iterable[Change], replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Put the values into the modules, or into those that replace them.

    A parameter that was trained before keeps its identity, which an optimizer may know.
    """
    for change in changes:
        places = [(replaced.get(module, module), key) for module, key in change.holders]
        present = [module._parameters.get(key) for module, key in places]
        first = present[0]
        if isinstance(change.value, Tensor) and first is not None:
            if not (first.requires_grad and change.trained and all(p is first for p in present)):
                first = nn.Parameter(change.value, requires_grad=change.trained)
            with torch.no_grad():
                first.copy_(change.value)
            for module, key in places:
                module._parameters[key] = first
                if not change.trained:
                    vars(module).setdefault(COPIED, set()).add(key)
        elif isinstance(change.value, Tensor):
            for module, key in places:
                module._buffers[key] = change.value
        else:
            for module, key in places:
                setattr(module, key, change.value)
                vars(module).setdefault(COPIED, set()).add(key)
