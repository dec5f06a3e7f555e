"""Tell which kernel a layer would run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import cores
from ..formats import FLOAT_DTYPES, QuantizedWeight
from ..ops import _cpu, _plan
from .conv import Convolution
from .experts import Experts, ExpertsLinear
from .frozen import FrozenLinear
from .linear import AdaptedLayer, Linear
from .route import route_of


def explain(layer: nn.Module, x: Tensor) -> str:
    """Tell which kernel would run for this input, and why. Runs nothing; x may be on the meta device.

    Args:
        layer: a :class:`Linear`, a layer of ``lowrank_ops.peft``, a :class:`Conv1d` or :class:`Conv2d`, or an
            :class:`Experts`, which has two products and more.
        x: an input of the layer, [..., K]; for experts with a row for each token and each of its experts.

    Raises:
        TypeError: layer is another module, or x no tensor of float32, bfloat16 or float16.
        ValueError: x has another K.
    """
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be a float32, bfloat16 or float16 Tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if isinstance(layer, Experts):
        parts = zip(layer._layout.matrices, layer.layers(), strict=True)
        *others, (last, down) = ((matrix.name, stack) for matrix, stack in parts)
        between = torch.empty(*x.shape[:-1], down.in_features, dtype=x.dtype, device="meta")
        return "\n".join([f"{name}\n{explain(s, x)}" for name, s in others] + [f"{last}\n{explain(down, between)}"])
    if isinstance(layer, Convolution):
        return _explain_convolution(layer, x)
    note = ""
    if isinstance(layer, FrozenLinear):
        if not layer.runs_here(x):
            raise TypeError("layer is dense, and torch computes it for this x: its products are fast there")
        note = "\ndense     this instruction set has no products of bfloat16, and torch's are slow"
        if layer.weight.requires_grad:
            return f"linear  W dense, trained\nruns      torch's products, in float32{note}"
        layer = Linear.from_linear(layer, None, None)
    if callable(stands_for := getattr(layer, "stands_for", None)):
        layer, text = stands_for()
        note = f"\npeft      {text}"
    if not isinstance(layer, Linear | ExpertsLinear):
        raise TypeError(
            "layer must be a lowrank_ops.Linear, Conv1d, Conv2d or Experts, or a layer of lowrank_ops.peft, got "
            f"{type(layer).__name__}"
        )
    if x.dim() < 1 or x.shape[-1] != layer.in_features:
        raise ValueError(f"x must be [..., K={layer.in_features}], got {list(x.shape)}")
    M = x.numel() // layer.in_features
    weight = layer.weight
    first = layer.up if weight is None else weight
    format, block_size = (first.format, first.block_size) if isinstance(first, QuantizedWeight) else (None, 0)
    routed = layer.pooled is not None and not layer.disabled and route_of(layer) is not None
    sizes = layer.device.type, M, layer.in_features, x.dtype, format, block_size, _plan.forced(), _cpu.isa()
    rows, kind = f"M={M}", "tokens"
    if isinstance(layer, ExpertsLinear):
        E = layer.num_experts
        plan = _plan.plan_experts(sizes[0], M, E, *sizes[2:])
        op, rows, kind = "routed_linear " if routed else "experts_linear", f"P={M} E={E}", "rows of an expert"
    else:
        plan = _plan.plan_routed(*sizes, _cpu.has_cuda(layer.device)) if routed else _plan.plan_linear(*sizes)
        op = "svd_linear    " if weight is None else "routed_linear " if routed else "adapted_linear"
    rank = 0 if layer.down is None else layer.down.shape[-2]
    beside = "" if layer.branch is None else f" + {layer.branch.rank} of the branch"
    core = "" if layer.core is None else f"  C {_core_name(layer)}"
    matrices = {"W": weight, "U": layer.up, "D": layer.down} if core else {"W": weight}
    formats = "  ".join(f"{name} {_format(m)}" for name, m in matrices.items() if m is not None)
    return (
        f"{op}  {rows} N={layer.out_features} K={layer.in_features} R={rank}{beside}  {formats}{core}  "
        f"x {str(x.dtype).removeprefix('torch.')} on {layer.device}\n"
        f"runs      {_plan.IMPLEMENTATIONS[plan.implementation]}, form for {plan.form} {kind}\n"
        f"because   {plan.reason}\n"
        f"rows      {_plan.ROWS[plan.implementation]}{_rows_of(layer)}{note}"
    )


def _explain_convolution(layer: Convolution, x: Tensor) -> str:
    dims = len(layer.kernel_size) + 1
    if not isinstance(x, Tensor) or x.dim() not in (dims, dims + 1):
        raise ValueError(
            f"x must be a Tensor of {dims} or {dims + 1} dimensions, got {getattr(x, 'shape', type(x).__name__)}"
        )
    assert layer.weight is not None
    weight, adapter = layer.weight, layer.adapter
    rank = 0 if adapter is None else adapter.rank
    decoded = isinstance(weight, QuantizedWeight)
    why = "W is decoded at every call and again in the backward" if decoded else "W is dense"
    beside = "" if adapter is None else "; the update is two more convolutions, in float32"
    return (
        f"conv{dims - 1}d  N={layer.out_features} K={layer.in_features} R={rank}  W {_format(weight)}  "
        f"x {str(x.dtype).removeprefix('torch.')} on {layer.device}\n"
        f"runs      torch's convolution\nbecause   {why}{beside}"
    )


def _rows_of(layer: AdaptedLayer) -> str:
    """Tell what is done around the op."""
    if layer.disabled:
        return "\nadapter   switched off by lowrank_ops.disabled: the layer runs as it did before it had one"
    if layer.magnitude is not None:
        return (
            "\nscale     g = m / ‖W + s U D‖ by rows after the op (DoRA); the norm needs a product of W with R tokens"
        )
    return "\nbias      s b is added to the bias before the op (lora_bias)" if layer.up_bias is not None else ""


def _format(matrix: QuantizedWeight | Tensor) -> str:
    if isinstance(matrix, QuantizedWeight):
        return f"{matrix.name()}, block {matrix.block_size}{', 8-bit scales' if matrix.double_quant else ''}"
    return "dense"


def _core_name(layer: AdaptedLayer) -> str:
    core = layer.make_core(layer.core)
    name = type(core).__name__.lower()
    return f"{name} of half-width {core.bandwidth}" if isinstance(core, cores.Banded) else name
