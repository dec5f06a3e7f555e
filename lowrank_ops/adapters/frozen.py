"""Linear layers that stay dense, on a processor without products of bfloat16, where torch's take up to hundreds of times as
long as those of float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import _cpu

_HALVES = (torch.bfloat16, torch.float16)


class FrozenLinear(nn.Linear):
    """y = W x + bias as ``nn.Linear``, whose products of 16 bits on a CPU run in our kernels.

    It differs from ``nn.Linear`` in ``forward`` alone: names, Parameters and ties are the same, and what torch computes
    well goes to torch.

    Numerics: sums in float32, y rounded once; over a trained W, torch's float32 products of the same numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not self.runs_here(x):
            return super().forward(x)
        if not weight.requires_grad:
            return functional.adapted_linear(x, weight, None, bias)
        dtype = functional.cast_input(x).dtype
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)

    def runs_here(self, x: Tensor) -> bool:
        """Tell whether torch's product would be a slow one."""
        weight, autocast = self.weight, torch.is_autocast_enabled("cpu")
        return (
            x.device.type == "cpu"
            and (torch.get_autocast_dtype("cpu") if autocast else x.dtype) in _HALVES
            and (autocast or weight.dtype is x.dtype)
            and type(weight) is nn.Parameter
            and weight.is_contiguous()
        )


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether this is an ``nn.Linear`` with torch's meaning and no more."""
    return type(module) in (nn.Linear, FrozenLinear)


def speed_up(model: nn.Module) -> None:
    """Let every ``nn.Linear`` of a model on a CPU without products of bfloat16 run in our kernels; elsewhere do nothing."""
    if _cpu.has_bfloat16():
        return
    for module in model.modules():
        # A change of class keeps the module itself, so references to it, its hooks and its Parameters stay valid.
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_cpu:
            module.__class__ = FrozenLinear


def restore(model: nn.Module) -> None:
    """Make every :class:`FrozenLinear` of a model an ``nn.Linear`` again."""
    for module in model.modules():
        if type(module) is FrozenLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
