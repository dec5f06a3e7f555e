"""Which code of transformers uses the weight of a linear layer, found in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from lowrank_ops.adapters.reads import uses_of_layers


def _linear_names(node: ast.AST) -> Iterator[str]:
    """Attributes to which the code assigns an ``nn.Linear``, or another class with Linear in its name."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
        made = node.value.func
        name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")
        if "Linear" in name:
            yield from (target.attr for target in node.targets if isinstance(target, ast.Attribute))


def reads_in(folder: Path) -> set[tuple[str, str]]:
    """(class, path of the layer within it) for each ``<path>.weight`` that a method of a class uses."""
    found = set()
    for file in folder.glob("*/modeling_*.py"):
        tree = ast.parse(file.read_text())
        linear = {name for node in ast.walk(tree) for name in _linear_names(node)}
        for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            found |= {
                (kind.name, path)
                for _, path, weight in uses_of_layers(kind)
                if weight and path.split(".")[-1] in linear
            }
    return found
