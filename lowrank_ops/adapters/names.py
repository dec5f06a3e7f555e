"""Names of modules: within wrappers, in messages, and by their endings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

# The attributes in which torch's wrappers keep the wrapped module: compilation, FSDP, activation checkpointing.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def check_model(model: object) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, with the names that the model has without torch's wrappers around or inside it."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        module = unwrapped(module)
        if module not in seen:
            seen.add(module)
            found[name] = module
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return found


def named_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name -> module without torch's wrappers; a module that stands in several places comes with every name."""

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        yield name, module
        for child_name, child in module._modules.items():
            if child is not None:
                yield from visit(child, f"{name}.{child_name}" if name else child_name)

    yield from visit(model, "")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch's wrappers: data parallelism, FSDP, compilation, averaged models, …"""
    check_model(model)
    while True:
        wrapped = [model._modules.get(name) for name in _WRAPPED]
        if _wraps(model):
            wrapped.append(model._modules.get("module"))
        inside = next((module for module in wrapped if module is not None), None)
        if inside is None:
            return model
        model = inside


def _wraps(model: nn.Module) -> bool:
    """Whether the class is a wrapper of torch, not a layer or a container, with the wrapped model in ``module``."""
    if not isinstance(model._modules.get("module"), nn.Module):
        return False
    kinds = [kind.__module__ for kind in type(model).__mro__]
    return any(kind.startswith("torch.") and not kind.startswith("torch.nn.modules.") for kind in kinds)


def target_modules(model: nn.Module, adapted: set[str]) -> list[str] | str:
    """Endings that match exactly the adapted layers; failing that their full names; failing that a pattern of these.

    A full name may be the ending of another name, and not every reader of these files accepts a pattern.
    """
    names = list(modules_of(model))
    for endings in (sorted({name.rpartition(".")[2] for name in adapted}), sorted(adapted)):
        if {n for n in names if any(n == e or n.endswith("." + e) for e in endings)} == adapted:
            return endings
    return "|".join(re.escape(name) for name in sorted(adapted))


def call_named(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function, and put the layer's name in front of the message of an error."""
    try:
        return function(*arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        # The class of the error itself may need more arguments than a text.
        kind = next(kind for kind in (ValueError, TypeError, RuntimeError) if isinstance(error, kind))
        raise kind(f"layer {name!r}: {error}") from error


def named_or_ending(names: Iterable[str], target: str) -> set[str]:
    """The names equal to the target, or if there is none, all that end in it."""
    return {target} if target in names else {name for name in names if name.endswith("." + target)}
