"""Linear layers and convolutions of other libraries: torch, transformers (Conv1D), bitsandbytes (Linear4bit), PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from ..formats import QuantizedWeight, from_state_dict
from .frozen import FrozenLinear

# A copy of a layer without the hooks of another library, and a function that puts like hooks on a replacement.
Unhooked = tuple[nn.Module, Callable[[nn.Module], None]]
# Functions of integrations that take hooks off; None if they do not know them.
TAKERS_OFF: list[Callable[[nn.Module], Unhooked | None]] = []


def weight_of(linear: nn.Module) -> QuantizedWeight | Tensor:
    """W [N, K] of a :class:`Linear`, a layer that :func:`is_linear` accepts, an embedding (K its tokens), or a convolution
    (K = C / groups · kernel).

    A view, or the module that holds W.
    """
    if is_4bit(linear):
        if getattr(linear.weight, "quant_state", None) is None:
            raise ValueError("linear is a bitsandbytes layer that is not quantised yet; move it to a device first")
        return from_state_dict(linear.state_dict(), "weight")
    weight = linear.weight
    if isinstance(weight, QuantizedWeight):
        return weight
    assert isinstance(weight, Tensor)
    if weight.dim() > 2:
        return weight.detach().flatten(1)
    return weight.detach().t() if is_conv1d(linear) or isinstance(linear, nn.Embedding) else weight.detach()


def is_linear(module: nn.Module) -> bool:
    """Tell whether :meth:`Linear.from_linear` takes the module."""
    # A subclass that computes something else with its weight is not a linear layer.
    forwards = (nn.Linear.forward, FrozenLinear.forward)
    plain = isinstance(module, nn.Linear) and type(module).forward in forwards
    return plain or is_4bit(module) or is_conv1d(module) or _is_falcon(module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a :class:`Linear`, or of any layer that :func:`is_linear` accepts; (N, V) of an embedding of V tokens; of a
    convolution (N, C · kernel), as a LoRA's D has it."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if is_conv1d(module):
        K, N = module.weight.shape  # type: ignore[misc]
        return N, K
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def is_conv(module: nn.Module) -> bool:
    """Tell whether this is an ``nn.Conv1d`` or ``nn.Conv2d`` with torch's meaning and a kernel of its own."""
    forwards = (nn.Conv1d.forward, nn.Conv2d.forward)
    plain = isinstance(module, nn.Conv1d | nn.Conv2d) and type(module).forward in forwards
    return plain and type(module._parameters.get("weight")) is nn.Parameter


def is_conv1d(module: nn.Module) -> bool:
    # GPT-2's linear layer, W stored as [K, N]; recognised by name so that transformers need not be imported.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_falcon(module: nn.Module) -> bool:
    # Falcon's linear layer has a forward of its own, which computes x Wᵀ + bias too.
    return type(module).__name__ == "FalconLinear" and isinstance(module, nn.Linear)


def is_4bit(module: nn.Module) -> bool:
    # An Embedding4bit has such a weight too.
    return isinstance(module, nn.Linear) and type(getattr(module, "weight", None)).__name__ == "Params4bit"


def has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def known_hooks(module: nn.Module) -> Unhooked | None:
    """The layer without hooks, and how to hook a replacement; None if it has hooks that no integration knows."""
    if not has_hooks(module):
        return module, lambda made: None
    return next((unhooked for take_off in TAKERS_OFF if (unhooked := take_off(module)) is not None), None)


def check_in_place(weight: object) -> None:
    """Raise if a dense weight is offloaded: it would come to the device beside the trained parameters of an adapter."""
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ValueError(
            "the layer is offloaded, and a dense weight would stay on the device beside the trained parameters of an "
            "adapter; quantise it (quantize='nf4'), or give the device more memory in device_map"
        )


def check_peft(model: nn.Module) -> None:
    """Raise if PEFT has put adapters into the model: its layers are where ours would be."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.Module):
            raise ValueError(f"layer {name!r} is adapted by PEFT already; merge and unload its adapter first")
