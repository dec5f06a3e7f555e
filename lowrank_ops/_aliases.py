"""Import paths from before the folders: pickles hold them as the modules of classes, and programs import by them.

An old path leads to the module at the new path. If its contents went to several modules, it is a module that looks
names up in each of them, in order.
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
    "checkpoint": ("adapters.checkpoint", "adapters.versions", "adapters.peft_files", "adapters.updates"),
    "compare": ("commands.demo.compare",),
    "demo": ("commands.demo", "commands.demo.options", "commands.demo.task", "commands._data", "commands._cli"),
    "demo_serve": ("commands.demo.serve",),
    "engine": ("serving.engine", "serving.rows", "serving.generation"),
    "factors": ("svd.store",),
    "info": ("commands.info",),
    "init": ("adapters.start", "adapters.rounding"),
    "linear": ("adapters.linear", "adapters.foreign", "adapters.explain", "adapters.route", "formats"),
    "model": ("adapters.model", "adapters.targets", "adapters.names", "adapters.foreign"),
    "nf4": ("formats.nf4", "formats.base"),
    "pool": ("serving.pool", "serving.route"),
    "precompute": ("adapters.precompute", "commands.precompute"),
    "reward": ("commands.reward", "preference.train"),
    "scaling": ("commands.scaling.run", "commands.scaling.plots"),
    "serve": ("commands.serve",),
    "server": (
        "serving.http",
        "serving.process",
        "serving.gate",
        "serving.load",
        "serving.protocol",
        "serving.requests",
    ),
}
# Old names of functions that have another name at the new path.
RENAMED = {
    "arena": {"pack": "build", "factors": "factor_fields", "aligned": "align"},
    "checkpoint": {"_read_tensors": "read_tensors"},
    "demo": {"split": "hold_out"},
    "init": {"pack": "keep_factor", "quantized": "keep_weight"},
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == __package__ and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.rpartition(".")[2]
        places = [import_module(f"{__package__}.{new}") for new in MOVED[old]]
        renamed = RENAMED.get(old, {})
        if len(places) == 1 and not renamed:
            sys.modules[module.__name__] = places[0]  # the import returns this module
            return

        def look_up(name: str) -> Any:
            new = renamed.get(name, name)
            for place in places:
                if hasattr(place, new):
                    return getattr(place, new)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = look_up  # type: ignore[method-assign]


def install() -> None:
    """Make old paths importable; call it once the package is imported."""
    # If the finder loaded it like the others, the module would replace the function lowrank_ops.combine.
    sys.modules[f"{__package__}.combine"] = import_module(f"{__package__}.adapters.combine")
    sys.meta_path.insert(0, _Finder())  # before the finder of an installation with files of these names
