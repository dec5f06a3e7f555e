"""The layers of a model that targets mean: linear layers, without output heads and what cannot be adapted."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .foreign import check_peft, is_linear
from .linear import Linear
from .names import named_or_ending

# Heads that Hugging Face puts on a base model for a task. They are freshly initialised, so they must not be quantised
# or frozen silently. Some are a layer, others a module with layers inside.
HEADS = ("lm_head", "score", "classifier", "pre_classifier", "classification_head", "qa_outputs")


def find_targets(model: nn.Module, targets: str | Iterable[str]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The targeted linear layers by one name each, and the targeted modules that cannot be adapted."""
    linear = {name: m for name, m in model.named_modules() if is_linear(m) or isinstance(m, Linear)}
    parts = {part for layer in linear.values() if isinstance(layer, Linear) for part in layer.modules()}
    others = {name: m for name, m in model.named_modules() if name not in linear and m not in parts}
    check_peft(model)
    if isinstance(targets, str) and targets == "all-linear":
        heads = _heads(model)
        # MultiheadAttention reads its projection's weight and never calls the layer.
        unused = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        beside = _find_beside(model) - heads
        if fresh := [name for name, m in linear.items() if m in beside and id(m) not in unused]:
            warnings.warn(
                f"targets='all-linear' leaves out {', '.join(fresh[:3])}{', …' * (len(fresh) > 3)} beside the Hugging Face "
                "model, as heads: frozen; call requires_grad_() on one to train it, or name it in targets to adapt it",
                stacklevel=3,
            )
        heads |= beside
        chosen = {name: m for name, m in linear.items() if m not in heads and id(m) not in unused}
        if not chosen:
            raise ValueError(
                f"targets='all-linear' matches nothing: the model has no linear layer{_hint(model, linear, '')}"
            )
        return chosen, {name: m for name, m in others.items() if m not in heads and _multiplies(name, m)}
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"targets must be 'all-linear', a list or a regular expression, got {targets!r}: {error}"
            ) from error
        chosen = {name: m for name, m in linear.items() if pattern.fullmatch(name)}
        unmatched = [] if chosen else [targets]
        covered = {name for name in others if pattern.fullmatch(name)}
    else:
        endings = list(targets) if isinstance(targets, Iterable) else [targets]
        if isinstance(targets, Mapping) or not all(isinstance(ending, str) for ending in endings):
            raise TypeError(f"targets must be 'all-linear', a regular expression or a list of names, got {targets!r}")
        if not endings:
            raise ValueError("targets must not be empty")
        found = {ending: named_or_ending(linear, ending) for ending in endings}
        chosen = {name: m for name, m in linear.items() if any(name in names for names in found.values())}
        unmatched = [ending for ending, names in found.items() if not names]
        covered = {name for ending in endings if ending not in linear for name in named_or_ending(others, ending)}
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"targets {unmatched} match no linear layer; the model's linear layers end in: {', '.join(known) or 'none'}"
            f"{_hint(model, linear, unmatched[0])}"
        )
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in chosen.values():
            raise ValueError(
                "targets match the out_proj of an nn.MultiheadAttention, which reads its weight and never calls the layer"
            )
    return chosen, _find_left_out(others, covered, chosen)


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output heads of Hugging Face models, whether given or wrapped, and every module in them."""
    pretrained: set[Any] = {model} if hasattr(model, "config") else set()
    pretrained |= _find_pretrained(model)
    tops = [getattr(m, name, None) for m in pretrained for name in HEADS]
    tops += [m.get_output_embeddings() for m in {model, *pretrained} if hasattr(m, "get_output_embeddings")]
    return {m for top in tops if isinstance(top, nn.Module) for m in top.modules()}


def _find_beside(model: nn.Module) -> set[nn.Module]:
    """The modules beside a Hugging Face model in the wrapper that holds it, such as a fresh head."""
    pretrained = _find_pretrained(model)
    children = [child for wrapper in _wrappers(model, pretrained) for child in wrapper.children()]
    return {m for child in children if pretrained.isdisjoint(child.modules()) for m in child.modules()}


def _find_pretrained(model: nn.Module) -> set[nn.Module]:
    return {m for m in model.modules() if hasattr(m, "config") and hasattr(m, "get_output_embeddings")}


def _wrappers(model: nn.Module, pretrained: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules around Hugging Face models, from the outermost on."""
    if model in pretrained or pretrained.isdisjoint(model.modules()):
        return
    yield model
    for child in model.children():
        yield from _wrappers(child, pretrained)


def _find_left_out(others: Mapping[str, nn.Module], covered: set[str], chosen: Iterable[str]) -> dict[str, nn.Module]:
    """Covered modules that hold a matrix but are not linear layers; blocks that contain other such modules are left out."""
    left = {name: m for name, m in others.items() if name in covered and _has_matrix(name, m)}
    parts = (name.split(".") for name in (*left, *chosen))
    blocks = {".".join(path[:depth]) for path in parts for depth in range(len(path))}
    return {name: m for name, m in left.items() if name not in blocks}


def _multiplies(name: str, module: nn.Module) -> bool:
    """Tell whether a module multiplies by matrices without being a linear layer: experts or attention's projections, say."""
    if isinstance(module, nn.Linear | nn.MultiheadAttention):
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return bool(own)
    experts = "experts" in name.split(".") or "experts" in type(module).__name__.lower()
    return experts and any(tensor.dim() >= 3 for tensor in own)


def _has_matrix(name: str, module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters()) or any(_multiplies(name, m) for m in module.modules())


def describe_left(left: Mapping[str, nn.Module]) -> str:
    """Describe what was left out: how many modules of each class, and the first names."""
    classes = defaultdict(list)
    for name, module in left.items():
        classes[type(module).__name__].append(name)
    parts = [
        f"{len(names)} layer{'s' * (len(names) > 1)} of class {kind} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
        for kind, names in classes.items()
    ]
    return f"adapt left out {', '.join(parts)}: targets cover them and they cannot be adapted, so they stay as they are"


def _hint(model: nn.Module, linear: Mapping[str, nn.Module], target: str) -> str:
    """Name a module that the target means but that is not a linear layer; for no target, a subclass of nn.Linear."""
    others = {name: m for name, m in model.named_modules() if name not in linear}
    names = named_or_ending(others, target) if target else {n for n, m in others.items() if isinstance(m, nn.Linear)}
    first = next((name for name in others if name in names), None)
    return "" if first is None else f"; {first!r} is of class {type(others[first]).__name__}, which cannot be adapted"
