"""Names of modules: within wrappers, in messages, and by their endings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

# Parts that torch inserts into the names of wrapped modules: compilation, FSDP, activation checkpointing.
_WRAPPED = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, with the model's own names even if torch.compile, FSDP or data parallelism wraps it."""
    return {_WRAPPED.sub("", name).removeprefix("."): module for name, module in unwrapped(model).named_modules()}


def unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif inside := [m for name, m in model.named_children() if _WRAPPED.fullmatch(name)]:
            model = inside[0]
        else:
            return model


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
