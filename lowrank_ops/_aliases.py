"""Import paths from before the folders: pickles hold them as the places of classes, and programs import by them.

An old path is the module that stands at a new one. Where its contents went to several modules, it is a module that looks
its names up in each of them, in order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "_laws": ("scaling_laws.laws",),
    "_pairs": ("preference.pairs",),
    "_strengths": ("preference.strengths",),
    "arena": ("ops.arena",),
    "checkpoint": ("adapters.checkpoint", "adapters.peft_files"),
    "compare": ("commands.demo.compare",),
    "demo": ("commands.demo", "commands.demo.options", "commands.demo.task", "commands._data", "commands._cli"),
    "demo_serve": ("commands.demo.serve",),
    "engine": ("serving.engine", "serving.rows", "serving.generation"),
    "factors": ("svd.store",),
    "info": ("commands.info",),
    "init": ("adapters.start",),
    "linear": ("adapters.linear", "adapters.foreign", "adapters.explain", "adapters.route", "formats"),
    "model": ("adapters.model", "adapters.names", "adapters.foreign"),
    "nf4": ("formats.nf4", "formats.base"),
    "pool": ("serving.pool", "serving.route"),
    "precompute": ("adapters.precompute", "commands.precompute"),
    "reward": ("commands.reward", "preference.train"),
    "scaling": ("commands.scaling.run", "commands.scaling.plots"),
    "serve": ("commands.serve",),
    "server": ("serving.http", "serving.load", "serving.protocol"),
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == __package__ and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        places = [import_module(f"{__package__}.{new}") for new in MOVED[module.__name__.rpartition(".")[2]]]
        if len(places) == 1:
            sys.modules[module.__name__] = places[0]  # what the import then returns
            return

        def look_up(name: str) -> Any:
            for place in places:
                if hasattr(place, name):
                    return getattr(place, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = look_up  # type: ignore[method-assign]


def install() -> None:
    """Let old paths be imported, once the package is."""
    # Loaded as the others are, the module would stand where the function lowrank_ops.combine does.
    sys.modules[f"{__package__}.combine"] = import_module(f"{__package__}.adapters.combine")
    sys.meta_path.insert(0, _Finder())  # before a finder of another installation that still has files of these names
