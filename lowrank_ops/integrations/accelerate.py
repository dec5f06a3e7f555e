"""accelerate's hooks on layers: models over several devices (``device_map``), and weights offloaded to the host or to disk.

:func:`lowrank_ops.adapt` carries the hook of a layer over to the layer that replaces it; the 4-bit bytes of an offloaded
layer stay on the host. Hooks that accelerate puts on 4-bit weights later fetch their bytes at each use. All that is used of
accelerate's private surface is here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import foreign
from ..formats import QuantizedWeight, base

# The attributes of a module that accelerate has hooked.
_HOOK, _FORWARD, _WARNERS = "_hf_hook", "_old_forward", ("forward", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")


def _align_hooks(hook: Any) -> list[Any] | None:
    """The AlignDevicesHooks that a hook consists of; None if it consists of others too."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = hook.hooks if type(hook) is SequentialHook else [hook]
    return list(hooks) if all(type(h) is AlignDevicesHook for h in hooks) else None


def take_off(layer: nn.Module) -> foreign.Unhooked | None:
    """A copy of a layer without accelerate's hook, sharing its tensors, and a function that hooks a replacement alike.

    The copy's offloaded parameters are on the device that computes. None for other hooks.
    """
    hook = vars(layer).get(_HOOK)
    if hook is None or (hooks := _align_hooks(hook)) is None:
        return None
    plain = copy.copy(layer)
    plain._parameters, plain._buffers = dict(layer._parameters), dict(layer._buffers)
    for name in (_HOOK, _FORWARD, *_WARNERS):
        plain.__dict__.pop(name, None)
    if foreign.has_hooks(plain):
        return None
    offloading = next((h for h in hooks if h.offload), None)
    if offloading is not None:
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            if tensor is not None and tensor.is_meta:
                value = offloading.weights_map[name].to(offloading.execution_device, tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    plain._parameters[name] = nn.Parameter(value, requires_grad=False)
                else:
                    plain._buffers[name] = value
    offloaded = offloading is not None or any(
        isinstance(m, QuantizedWeight) and m.keeper is not None for m in layer.children()
    )
    return plain, lambda made: _put_on(made, hooks, offloaded)


def _put_on(layer: nn.Module, hooks: list[Any], offloaded: bool) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    weight = getattr(layer, "weight", None)
    dense = offloaded and isinstance(weight, nn.Parameter)
    if offloaded and isinstance(weight, QuantizedWeight):
        device = next(h.execution_device for h in hooks if h.execution_device is not None)
        Offloaded.keep(weight, torch.device(device))
    for hook in hooks:
        aligned = AlignDevicesHook(
            hook.execution_device, offload=dense, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys
        )
        add_hook_to_module(layer, aligned, append=True)
        dense = False


class Offloaded:
    """The keeper of a weight whose buffers are on the meta device: reads their bytes from elsewhere at each use."""

    def __init__(self, weight: QuantizedWeight, device: torch.device, source: Mapping[str, Tensor | None]) -> None:
        self.weight, self.computing, self.source = weight, device, source

    @classmethod
    def keep(cls, weight: QuantizedWeight, device: torch.device) -> None:
        """Move a weight's bytes to the host."""
        source = {name: None if t is None else t.to("cpu") for name, t in weight.held().items()}
        weight.keeper = cls(weight, device, source)
        for name, tensor in source.items():
            weight._buffers[name] = None if tensor is None else tensor.to("meta")

    @property
    def device(self) -> torch.device:
        return self.computing if self.weight.packed.is_meta else self.weight.packed.device

    def read(self) -> Mapping[str, Any]:
        if not self.weight.packed.is_meta:  # accelerate has taken its hook off
            return self.weight._buffers
        return {name: None if t is None else t.to(self.computing) for name, t in self.source.items()}


class _Entries(Mapping[str, "Tensor | None"]):
    """The buffers of a weight, by name, from entries of a state dict, which accelerate keeps on the host or on disk."""

    def __init__(self, weight: QuantizedWeight, entries: Mapping[str, Tensor], base: str) -> None:
        self.kind, self.dtype, self.names = type(weight), weight.dtype, list(weight._buffers)
        self.entries, self.base = entries, base

    def items(self) -> Any:
        return self.kind._from_entries(self.entries, self.base, self.dtype)._buffers.items()

    def __getitem__(self, name: str) -> Tensor | None:
        return dict(self.items())[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _hooked(weight: QuantizedWeight, hook: Any) -> None:
    """Fetch the bytes of a weight that accelerate has hooked and may have offloaded; nobody calls its forward."""
    for aligned in _align_hooks(hook) or ():
        if not aligned.offload or not aligned.offload_buffers:
            continue
        kept = aligned.weights_map
        if hasattr(kept, "prefix"):  # of a state dict, whose entries have other names than the buffers
            kept = aligned.weights_map = _Entries(weight, kept.dataset, kept.prefix.removesuffix("."))
        weight.keeper = Offloaded(weight, torch.device(aligned.execution_device), kept)


foreign.TAKERS_OFF.append(take_off)
base.ON_ATTRIBUTE[_HOOK] = _hooked
