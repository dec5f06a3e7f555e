"""Run a model as it was before adapting, for the duration of a context or as a second module that shares its memory."""

from __future__ import annotations

import copy
import math
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from types import ModuleType
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .. import reference as _plain  # the module
from .linear import AdaptedLayer, check_whole
from .names import call_named, check_model, modules_of, unwrapped
from .start import Start
from .tokens import TokenRows

_LOCK = threading.Lock()
_DISABLED: WeakKeyDictionary[AdaptedLayer | TokenRows, int] = (
    WeakKeyDictionary()
)  # the number of contexts each layer is in


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run every layer as y = W x + bias: the model behaves as before :func:`lowrank_ops.adapt`.

    A changed base (PiSSA, MiLoRA, LoftQ) gets back the product s · U₀ D₀ that its start subtracted, and the replace
    form runs U diag(S) Vᵀ. Other trained parts, such as a head, stay as they are.

    It is a switch on the layers, visible to all threads, including those of data parallelism and autograd. Contexts may
    be nested and may overlap between threads. With activation checkpointing the backward must run inside the context
    too, because it runs layers again. A compiled model is compiled once more. It takes precedence over a pool's route.

    Args:
        model: with at least one adapter; may be wrapped or compiled.

    Raises:
        ValueError: no layer of the model has an adapter.
    """
    check_model(model)
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer | TokenRows)]
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


def set_strength(model: nn.Module, strength: float) -> None:
    """Run every layer at a strength w: y = y₀ + w (y₁ - y₀), y₀ without its adapter as in :func:`disabled`, y₁ with it.

    For an update s · U C D this is W x + bias + w s · U C (D x). Kinds that change the base, the replace form, DoRA,
    ``lora_bias``, embeddings, experts and rows of single tokens keep to the same equation. Other trained parts, such as a
    head, stay as they are. Gradients follow the equation, so at w = 0.5 adapters get half of them.

    The strength stays until it is set again. It is not saved: :func:`lowrank_ops.save_adapter`, ``combine``,
    ``convert`` and an :class:`lowrank_ops.AdapterPool` do not know it. :func:`lowrank_ops.merge` merges at it.

    Args:
        model: with at least one adapter; may be wrapped or compiled.
        strength: w, finite; 1 is the adapter as it was trained, 0 the model without it.

    Raises:
        TypeError: strength is not a number. ValueError: it is not finite; no layer of the model has an adapter.
    """
    _set_strengths(model, strength)


@contextmanager
def strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Within the context as after :func:`set_strength`, then as before. Contexts may be nested; the innermost counts.

    Raises:
        TypeError, ValueError: as :func:`set_strength`.
    """
    before = _set_strengths(model, strength)
    try:
        yield
    finally:
        for layer, w in before.items():
            layer.strength = w


def _set_strengths(model: nn.Module, strength: Any) -> dict[AdaptedLayer | TokenRows, float]:
    """Set the strength of every layer; return those that they had."""
    if not isinstance(strength, Real) or isinstance(strength, bool):
        raise TypeError(f"strength must be a number, got {strength!r}")
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")
    check_model(model)
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer | TokenRows)]
    _check_adapted(model, layers)
    before = {layer: layer.strength for layer in layers}
    for layer in layers:
        layer.strength = float(strength)
    return before


def reference(model: nn.Module, adapter: bool = True) -> nn.Module:
    """Make a second module that computes what the model computes now, in eval mode, however the model is trained later.

    It is frozen and shares every frozen tensor with the model. Adapters and other trained parameters are copied.

    Args:
        model: with at least one adapter. For a wrapped or compiled model, the reference is made of the model inside.
        adapter: True: the reference keeps the adapter as it is now. False: it is the model as it was before
            :func:`lowrank_ops.adapt`, as in :func:`disabled`.

    Buffers are shared too, except running statistics of normalisation layers, which training changes; they are copied.
    Writing into a tensor of the reference writes into the model: do not train it or mix weights into it.

    Raises:
        ValueError: no layer of the model has an adapter; trained parameters are sharded over processes.
        TypeError: adapter is neither True nor False.
    """
    if not isinstance(adapter, bool):
        raise TypeError(f"adapter must be True or False, got {adapter!r}")
    inner = unwrapped(model)
    layers = {name: m for name, m in modules_of(inner).items() if isinstance(m, AdaptedLayer | TokenRows)}
    _check_adapted(model, layers.values())
    for name, layer in layers.items():
        if isinstance(layer, AdaptedLayer):
            call_named(name, check_whole, layer)
    trained = {id(p) for layer in layers.values() for p in layer.trained()}
    memo: dict[int, object] = {}  # objects that deepcopy must not copy
    for module in inner.modules():
        for parameter in module._parameters.values():
            # Without the adapter its factors and core are not needed, so they are not copied either.
            copied = adapter if id(parameter) in trained else parameter is not None and parameter.requires_grad
            if parameter is not None and not copied:
                memo.setdefault(id(parameter), _share(parameter))
        if not isinstance(module, _NormBase):
            memo |= {id(buffer): buffer for buffer in module._buffers.values() if buffer is not None}
    for layer in layers.values():
        memo |= {id(matrix): _share_module(matrix) for matrix in layer._modules.values() if matrix is not None}
    made = copy.deepcopy(inner, memo)
    for module in made.modules():
        if isinstance(module, AdaptedLayer) and module.adapter is not None and not adapter:
            _remove_update(module)
        elif isinstance(module, TokenRows) and not adapter:
            module.disabled = True
    return made.requires_grad_(False).eval()


def _check_adapted(model: nn.Module, layers: Iterable[AdaptedLayer | TokenRows]) -> None:
    if all(layer.adapter is None for layer in layers):
        raise ValueError(
            f"model, a {type(model).__name__}, has no adapter; call lowrank_ops.adapt(model, lowrank_ops.LoRA()) first"
        )


def _share(parameter: nn.Parameter) -> nn.Parameter:
    """A new Parameter over the same memory, which can be moved or cast by itself."""
    if type(parameter) is not nn.Parameter:  # a subclass holds more than the values
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _share_module(module: nn.Module) -> nn.Module:
    """A new module with the same buffers."""
    made = copy.copy(module)
    made._buffers = dict(module._buffers)
    return made


def _remove_update(layer: AdaptedLayer) -> None:
    """Restore a layer to what it was before it had an adapter."""
    if layer.core_offset is not None and layer.core is not None:
        layer.core = nn.Parameter(layer.core.new_zeros(layer.core.shape), requires_grad=False)
    elif layer.base_down is not None and layer.base_up is not None:
        layer.magnitude = layer.up_bias = None
        layer.scales_rows = False
        layer.down = nn.Parameter(layer.base_down, requires_grad=False)
        layer.up = nn.Parameter(layer.base_up, requires_grad=False)
    else:
        layer._install(None, Start(None, None, None))


class _Callable(ModuleType):
    """lowrank_ops.reference: the module of plain implementations; calling it calls :func:`reference`."""

    __call__ = staticmethod(reference)


callable_module = cast(_Callable, sys.modules[_plain.__name__])
callable_module.__class__ = _Callable
