"""Find linear layers whose weight a model reads instead of calling them: in the source of its classes, or in a forward."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .foreign import is_linear
from .linear import Linear
from .names import check_model

# Attributes of a weight that say nothing about its numbers, and functions that look at it from outside.
_HARMLESS = ("dtype", "device", "shape", "ndim", "size", "requires_grad", "is_meta", "data_ptr")
_LOOKS = ("isinstance", "hasattr", "getattr")
_TENSORS = ("weight", "bias")
# Words in the names of methods that run before a model is used.
_BEFORE_USE = ("init", "reset", "tie", "resize", "load", "prune", "fuse")


def uses_of_layers(kind: ast.AST) -> Iterator[tuple[str, str, bool]]:
    """(method, path, whether it is ``<path>.weight``) for each use of ``self.<path>`` or ``other.<path>`` in a class."""
    for method in (node for node in ast.walk(kind) if isinstance(node, ast.FunctionDef)):
        if any(word in method.name for word in _BEFORE_USE):
            continue
        parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(method):
            path = _path(node)
            parent = parents.get(node)
            if path and not (isinstance(parent, ast.Attribute) and parent.attr in _TENSORS):
                yield method.name, ".".join(path), False
            elif path and isinstance(parent, ast.Attribute) and parent.attr == "weight":
                outer = parents.get(parent)
                harmless = isinstance(outer, ast.Attribute) and (outer.attr in _HARMLESS or outer.attr.startswith("_"))
                looked = isinstance(outer, ast.Call) and getattr(outer.func, "id", "") in _LOOKS
                if not harmless and not looked:
                    yield method.name, ".".join(path), True


def _path(node: ast.AST) -> list[str]:
    """["a", "b"] for ``self.a.b`` or any other name in the place of ``self``; empty for anything else."""
    if not isinstance(node, ast.Attribute):
        return []
    if isinstance(node.value, ast.Name):
        return [node.attr]
    before = _path(node.value)
    return [*before, node.attr] if before else []


@lru_cache
def read_and_not_called(kind: type) -> frozenset[str]:
    """The children of which the methods of a class use the weight, and nothing else but attributes."""
    read, other, methods = set(), set(), set[str]()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins", "lowrank_ops"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # typed into an interpreter, or compiled
            continue
        uses = list(uses_of_layers(tree))
        other |= {path for _, path, weight in uses if not weight}
        read |= {
            path for method, path, weight in uses if weight and method not in methods
        }  # not what a subclass replaces
        methods |= {name for name, member in vars(base).items() if callable(member)}
    return frozenset(read - other)


class _Reads(TorchDispatchMode):
    """Notes the ops that take a layer's weight while that layer is not running.

    Args:
        names: address of a weight's memory -> name of its layer.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.found, self.running = names, dict[str, str](), list[nn.Module]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.running:
            for given in args:
                for tensor in given if isinstance(given, list | tuple) else (given,):
                    if isinstance(tensor, Tensor) and (name := self.names.get(_address(tensor))) is not None:
                        self.found.setdefault(name, func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def find_reads(model: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, str]:
    """Run a forward and find linear layers whose weight the model reads by itself, so that an adapter may have no effect.

    :func:`adapt` leaves such layers out where it knows the class, or where the source of the class says so; this finds the
    others. Leave them out of ``targets``. A layer that is called too is among them.

    Args:
        model: with dense weights: before :func:`adapt`, or after it with ``quantize=None``. In 4 bits a weight raises where
            it is read. A model that reads a weight only in training must be in training.
        inputs, keywords: of its forward, which runs without gradients, and must not be compiled.

    Returns:
        name of a layer -> the op of PyTorch that first took its weight.
    """
    check_model(model)
    layers = {name: m for name, m in model.named_modules() if is_linear(m) or isinstance(m, Linear)}
    weights = [(name, weight) for name, m in layers.items() if isinstance(weight := m.weight, Tensor)]
    others = [p for m in model.modules() if m not in layers.values() for p in m.parameters(recurse=False)]
    tied = {_address(parameter) for parameter in others}  # an embedding reads the weight of its head
    reads = _Reads({_address(weight): name for name, weight in weights if _address(weight) not in {0, *tied}})
    hooks = [layer.register_forward_pre_hook(lambda m, _: reads.running.append(m)) for layer in layers.values()]
    hooks += [layer.register_forward_hook(lambda *_: _end(reads), always_call=True) for layer in layers.values()]
    try:
        with torch.no_grad(), reads:
            model(*inputs, **keywords)
    finally:
        for hook in hooks:
            hook.remove()
    return reads.found


def _address(tensor: Tensor) -> int:
    """Where a dense tensor lies; 0 where it has no memory that can be compared."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def _end(reads: _Reads) -> None:
    reads.running.pop()
