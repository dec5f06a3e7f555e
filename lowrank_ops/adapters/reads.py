"""Find, in a first forward, layers whose dense weight a model reads without calling the layer, and so its adapter."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .linear import Linear

_WATCH = "_lowrank_ops_reads"


class _Reads(TorchDispatchMode):
    """Notes the ops that take a layer's weight, other than those of this package.

    Args:
        names: address of a weight's memory -> name of its layer.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.found = names, dict[str, str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "lowrank_ops":
            for given in args:
                for tensor in given if isinstance(given, list | tuple) else (given,):
                    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
                        name = self.names.get(tensor.untyped_storage().data_ptr())
                        if name is not None:
                            self.found.setdefault(name, func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def watch_reads(model: nn.Module) -> None:
    """Make the first forward of a model warn of adapted layers whose dense weight it reads.

    Weights in 4 bits need no watch, because reading them raises.
    """
    if any(_dense_names(model)) and _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin)
        model.register_forward_hook(_end, always_call=True)


def _dense_names(model: nn.Module) -> dict[int, str]:
    """Address -> layer, for dense weights of layers with an adapter that no other module has too."""
    owners = Counter(_address(p) for module in model.modules() for p in module.parameters(recurse=False))
    weights = {
        _address(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module.adapter is not None
    }
    return {address: name for address, name in weights.items() if address and owners[address] == 1}


def _address(weight: Any) -> int:
    """Where a dense weight lies; 0 for any other, and without memory, as on the meta device."""
    return weight.untyped_storage().data_ptr() if type(weight) is nn.Parameter else 0


def _begin(model: nn.Module, inputs: Any) -> None:
    if not torch.compiler.is_dynamo_compiling() and _WATCH not in vars(model):
        vars(model)[_WATCH] = reads = _Reads(_dense_names(model))
        reads.__enter__()


def _end(model: nn.Module, inputs: Any, output: Any) -> None:
    if torch.compiler.is_dynamo_compiling() or (reads := vars(model).pop(_WATCH, None)) is None:
        return
    reads.__exit__(None, None, None)
    for hooks, function in ((model._forward_pre_hooks, _begin), (model._forward_hooks, _end)):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if reads.found:
        said = ", ".join(f"{name} (by {op})" for name, op in list(reads.found.items())[:3])
        warnings.warn(
            f"the model reads weights by itself, so that the adapters of {len(reads.found)} layers may have no effect: "
            f"{said}{', …' * (len(reads.found) > 3)}; leave them out of the targets of lowrank_ops.adapt",
            stacklevel=2,
        )
