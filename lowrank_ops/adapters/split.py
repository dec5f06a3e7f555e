"""Layers split over processes (tensor parallelism): each computes with some rows or columns of W."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..formats import QuantizedWeight

# A layer's parts that have the rows of W, and those that have its columns.
_ROWS = ("weight", "bias", "up", "base_up", "branch_up")
_COLUMNS = ("weight", "down", "base_down", "branch_down")


@dataclass(eq=False)
class Split:
    """How a layer is split over the processes of a group.

    Attributes:
        group: the processes; this one is number ``rank`` of ``size``.
        dim: 0 if W [N, K] is split by rows (the output of every process is a part of y), 1 by columns (it is a summand).
        gather: whether the parts of y are put together.
        whole: (N, K) of the layer before.
        frozen: the whole of frozen factors, on the host, by name.
        key: what identifies the whole W in files of kinds with frozen factors.
    """

    group: Any
    rank: int
    size: int
    dim: int
    gather: bool
    whole: tuple[int, int]
    frozen: dict[str, Any] = field(default_factory=dict)
    key: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return self

    # ---- splitting

    def check(self, layer: nn.Module) -> None:
        """Raise unless the layer can be split."""
        if getattr(layer, "scales_rows", False):
            raise ValueError(
                "a layer with a DoRA or a lora_bias cannot be split over processes; merge the adapter first"
            )
        N, K = self.whole
        if self.whole[self.dim] % self.size:
            raise ValueError(
                f"{'out_features' if self.dim == 0 else 'in_features'} must be a multiple of the {self.size} processes, got "
                f"{self.whole[self.dim]}"
            )
        if isinstance(weight := getattr(layer, "weight", None), QuantizedWeight):
            for begin, end in (self._range(rank) for rank in range(self.size)):
                weight.check_cut(self.dim, begin, end)

    def _range(self, rank: int) -> tuple[int, int]:
        part = self.whole[self.dim] // self.size
        return rank * part, (rank + 1) * part

    def _part(self, held: Any) -> Any:
        """This process's part of a matrix or a bias."""
        begin, end = self._range(self.rank)
        if isinstance(held, QuantizedWeight):
            try:
                return held.cut(self.dim, begin, end)
            except ValueError:  # a factor whose blocks run across the parts
                held = nn.Parameter(held.dequantize(torch.float32), requires_grad=False)
        part = held.detach().narrow(min(self.dim, held.dim() - 1), begin, end - begin).clone()
        return nn.Parameter(part, held.requires_grad) if isinstance(held, nn.Parameter) else part

    def apply(self, layer: Any) -> None:
        """Leave this process's part in the layer, in place."""
        for name in (_ROWS, _COLUMNS)[self.dim]:
            if (held := getattr(layer, name, None)) is None:
                continue
            part = self._part(held)
            for store in (layer._modules, layer._parameters, layer._buffers):
                store.pop(name, None)
            if isinstance(part, nn.Parameter | nn.Module):
                setattr(layer, name, part)
            else:
                layer.register_buffer(name, part)
        if self.dim and self.rank and layer.bias is not None:
            layer.register_parameter("bias", None)  # the first process adds it, once
        self.resize(layer, self.whole[self.dim] // self.size)
        layer.split = self
        layer.register_forward_pre_hook(self.before)
        layer.register_forward_hook(self.after)
        layer.register_state_dict_pre_hook(refuse_state)

    def resize(self, layer: nn.Module, size: int) -> None:
        setattr(layer, ("out_features", "in_features")[self.dim], size)

    # ---- computing

    def before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        if self.dim == 0:
            return (enter(x, self.group), *inputs[1:])
        if x.shape[-1] == self.whole[1]:  # the whole input
            begin, end = self._range(self.rank)
            return (enter(x, self.group)[..., begin:end], *inputs[1:])
        return inputs

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        if self.dim:
            return _Leave.apply(y, self.group)
        return _Gather.apply(y, self.group, self.rank, self.size) if self.gather else y

    def shared(self, down: Any, up: Any, core: Any) -> tuple[Any, Any, Any]:
        """D, U and the values of C, of which each process has the whole of some; their gradients are summed."""
        if self.dim == 0:
            return enter(down, self.group), up, enter(core, self.group)
        return down, enter(up, self.group), enter(core, self.group)

    # ---- putting together

    def join(self, layer: nn.Module) -> dict[str, Any]:
        """Make whole what a file holds of the layer, in place; every process must take part. Returns what to set back."""
        stores = ("_parameters", "_buffers", "_modules")
        state = {name: vars(layer)[name] for name in (*stores, "in_features", "out_features")}
        parts = {
            name: held for name in (_ROWS, _COLUMNS)[self.dim][1:] if (held := getattr(layer, name, None)) is not None
        }
        whole = {name: self._whole(held) for name, held in parts.items() if name not in self.frozen} | self.frozen
        if self.dim:
            bias: Any = layer.bias
            boxes = [None if bias is None else nn.Parameter(_gathered(bias), bias.requires_grad)]
            dist.broadcast_object_list(boxes, dist.get_global_rank(self.group, 0), group=self.group)
            whole["bias"] = boxes[0]
        for name in stores:
            vars(layer)[name] = {key: value for key, value in state[name].items() if key not in whole}
        for name, value in whole.items():
            store = "_parameters" if isinstance(value, nn.Parameter) or name == "bias" else "_buffers"
            vars(layer)["_modules" if isinstance(value, nn.Module) else store][name] = value
        self.resize(layer, self.whole[self.dim])
        return state

    def _whole(self, held: Tensor) -> Tensor:
        part = _gathered(held).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part, group=self.group)
        joined = torch.cat(parts, min(self.dim, held.dim() - 1))
        return nn.Parameter(joined, held.requires_grad) if isinstance(held, nn.Parameter) else joined


def _gathered(held: Any) -> Tensor:
    """The whole of a part that fully_shard has sharded too."""
    part: Tensor = (held.full_tensor() if hasattr(held, "full_tensor") else held).detach()
    return part


def refuse_state(layer: nn.Module, prefix: str = "", keep_vars: bool = False) -> None:
    """Raise: this process holds a part of a split layer, which would be saved as if it were the whole."""
    name = f"layer {prefix.removesuffix('.')!r}: " if prefix else ""
    raise ValueError(
        f"{name}the layer is split over processes by lowrank_ops.parallelize, and this process has a part of it alone; save "
        "the adapter with lowrank_ops.save_adapter, which gathers it, and other states before parallelize"
    )


def enter(x: Any, group: Any) -> Any:
    """x, whose gradient is the sum of the processes' gradients."""
    if not isinstance(x, Tensor) or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _Enter.apply(x, group)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        total = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    """The sum of the processes' y; each gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        total = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Gather(torch.autograd.Function):
    """The processes' y side by side; each gets the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any, rank: int, size: int) -> Tensor:
        ctx.columns = rank * y.shape[-1], y.shape[-1]
        parts = [torch.empty_like(y, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, y.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return g.narrow(-1, *ctx.columns), None, None, None
