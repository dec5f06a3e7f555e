"""Which code of transformers uses the weight of a linear layer without calling the layer, found in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# Attributes of a weight that say nothing about its numbers.
_HARMLESS = ("dtype", "device", "shape", "ndim", "size", "requires_grad", "is_meta", "_is_hf_initialized", "data_ptr")
# Functions that run before a model is used, or look at a tensor from outside.
_BEFORE_USE = ("init", "reset", "tie", "resize", "load", "prune")
_LOOKS = ("isinstance", "hasattr", "getattr")


def weight_reads(source: str) -> Iterator[tuple[str, str]]:
    """(class, path of the layer within it) for each ``<path>.weight`` that a method of the class uses."""
    tree = ast.parse(source)
    linear = {name for node in ast.walk(tree) for name in _linear_names(node)}
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        methods = (node for node in kind.body if isinstance(node, ast.FunctionDef))
        for method in methods:
            if any(word in method.name for word in _BEFORE_USE):
                continue
            parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(method):
                if not isinstance(node, ast.Attribute) or node.attr != "weight":
                    continue
                path = _path(node.value)
                if len(path) > 1 and path[-1] in linear and not _is_harmless(node, parents):
                    yield kind.name, ".".join(path[1:])


def _linear_names(node: ast.AST) -> Iterator[str]:
    """Attributes to which the code assigns an ``nn.Linear``, or another class with Linear in its name."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
        made = node.value.func
        name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")
        if "Linear" in name:
            yield from (target.attr for target in node.targets if isinstance(target, ast.Attribute))


def _path(node: ast.AST) -> list[str]:
    """["self", "a", "b"] for ``self.a.b``; empty for anything but names."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = _path(node.value)
        return [*before, node.attr] if before else []
    return []


def _is_harmless(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents.get(node)
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS
    return isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in _LOOKS


def reads_in(folder: Path) -> set[tuple[str, str]]:
    return {found for file in folder.glob("*/modeling_*.py") for found in weight_reads(file.read_text())}
