"""The model as it was before it was adapted: for a while in its place, or as a second module beside it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import cast
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .. import reference as _plain  # the module
from .linear import Linear, check_whole
from .names import call_named, modules_of, unwrapped
from .start import Start

_LOCK = threading.Lock()
_DISABLED: WeakKeyDictionary[Linear, int] = WeakKeyDictionary()  # how many contexts a layer is in


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it y = W x + bias at every layer: the model runs as it was before :func:`lowrank_ops.adapt`.

    A base that was changed (PiSSA, MiLoRA, LoftQ) gets back s · U₀ D₀, the product that its start took out, and the replace
    form runs U diag(S) Vᵀ. What was trained beside adapters, a head say, stays as it is.

    It is a switch on the layers, which all threads see, replicas of data parallelism and autograd's own included; contexts
    may be nested and may overlap between threads. With activation checkpointing a backward belongs inside the context too,
    since it runs layers again. A compiled model is compiled once more for it. Inside a pool's route it comes first.

    Args:
        model: with at least one adapter; wrapped or compiled too.

    Raises:
        ValueError: no layer of the model has an adapter.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    _check_adapted(model, layers)
    with _LOCK:
        for layer in layers:
            _DISABLED[layer] = _DISABLED.get(layer, 0) + 1
            layer.disabled = True
    try:
        yield
    finally:
        with _LOCK:
            for layer in layers:
                _DISABLED[layer] -= 1
                layer.disabled = _DISABLED[layer] > 0


def reference(model: nn.Module, adapter: bool = True) -> nn.Module:
    """A second module that computes what the model computes at this moment, in eval mode, whatever is trained later.

    It is frozen and shares the memory of every frozen tensor with the model. Adapters and what else is trained are copied.

    Args:
        model: with at least one adapter. Of a model that is wrapped or compiled, the reference is that of what is inside.
        adapter: whether the reference has the adapter as it stands now. False: it is the model as it was before
            :func:`lowrank_ops.adapt`, as in :func:`disabled`.

    Buffers are shared too, but running statistics of normalisation layers, which training moves, are copied. Whatever writes
    into a tensor of the reference writes into the model: do not train it or mix weights into it.

    Raises:
        ValueError: no layer of the model has an adapter; what is trained is sharded over processes.
        TypeError: adapter is neither True nor False.
    """
    if not isinstance(adapter, bool):
        raise TypeError(f"adapter must be True or False, got {adapter!r}")
    inner = unwrapped(model)
    layers = {name: m for name, m in modules_of(inner).items() if isinstance(m, Linear)}
    _check_adapted(model, layers.values())
    for name, layer in layers.items():
        call_named(name, check_whole, layer)
    trained = {id(p) for layer in layers.values() for p in layer.trained()}
    memo: dict[int, object] = {}  # what deepcopy takes for copied already
    for module in inner.modules():
        for parameter in module._parameters.values():
            # Of no use without the adapter, its factors and core are not copied either.
            copied = adapter if id(parameter) in trained else parameter is not None and parameter.requires_grad
            if parameter is not None and not copied:
                memo.setdefault(id(parameter), _shared(parameter))
        if not isinstance(module, _NormBase):
            memo |= {id(buffer): buffer for buffer in module._buffers.values() if buffer is not None}
    for layer in layers.values():
        memo |= {id(matrix): _shared_module(matrix) for matrix in layer._modules.values() if matrix is not None}
    made = copy.deepcopy(inner, memo)
    for module in made.modules():
        if isinstance(module, Linear) and module.adapter is not None and not adapter:
            _remove_update(module)
    return made.requires_grad_(False).eval()


def _check_adapted(model: nn.Module, layers: Iterable[Linear]) -> None:
    if all(layer.adapter is None for layer in layers):
        raise ValueError(
            f"model, a {type(model).__name__}, has no adapter; call lowrank_ops.adapt(model, lowrank_ops.LoRA()) first"
        )


def _shared(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory in a Parameter of its own, which can be moved or cast by itself."""
    if type(parameter) is not nn.Parameter:  # a subclass holds more than the numbers
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _shared_module(module: nn.Module) -> nn.Module:
    """The same buffers in a module of its own."""
    made = copy.copy(module)
    made._buffers = dict(module._buffers)
    return made


def _remove_update(layer: Linear) -> None:
    """Leave of a layer what it was before it had an adapter."""
    if layer.core_offset is not None and layer.core is not None:
        layer.core = nn.Parameter(layer.core.new_zeros(layer.core.shape), requires_grad=False)
    elif layer.base_down is not None and layer.base_up is not None:
        layer.down = nn.Parameter(layer.base_down, requires_grad=False)
        layer.up = nn.Parameter(layer.base_up, requires_grad=False)
    else:
        layer._install(None, Start(None, None, None))


class _Callable(ModuleType):
    """lowrank_ops.reference is the module of plain implementations, which as a function is :func:`reference`."""

    __call__ = staticmethod(reference)


callable_module = cast(_Callable, sys.modules[_plain.__name__])
callable_module.__class__ = _Callable
