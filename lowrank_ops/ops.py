"""The registered ops: schema, fake, implementation per device, autograd.

They are what torch.compile, opcheck and the dispatcher see; :mod:`lowrank_ops.functional` is the checked way in. NF4
weights travel as their tensors: ``weight`` is then the packed bytes and ``block_size`` is positive; with
``block_size = 0`` it is the dense W [N, K]. The schemas are registered with the low-level Library because a call through
it costs less than one through a custom_op.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _native, _plan, reference

LIBRARY = torch.library.Library("lowrank_ops", "DEF")
_NF4 = "Tensor weight, Tensor? absmax, Tensor? absmax2, Tensor? offset"
SCHEMAS = {
    "nf4_quantize": "(Tensor w, int block_size) -> (Tensor, Tensor)",
    "absmax_quantize": "(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    "nf4_dequantize": "(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int out_features, "
    "int in_features, int block_size, ScalarType dtype) -> Tensor",
    "adapted_linear": f"(Tensor x, {_NF4}, int out_features, int block_size, Tensor? down, Tensor? up, Tensor? bias, "
    "float scale, float dropout, Tensor? seed) -> (Tensor y, Tensor h)",
    "adapted_linear_backward": f"(Tensor g, Tensor? x, Tensor? h, {_NF4}, int in_features, int block_size, "
    "Tensor? down, Tensor? up, float scale, float dropout, Tensor? seed, bool need_x, bool need_down, bool need_up) "
    "-> (Tensor dx, Tensor ddown, Tensor dup)",
}
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _kernels(family: str) -> ModuleType:
    # Imported at first use: importing the package must not need Triton, and TRITON_INTERPRET is read then.
    import importlib

    return importlib.import_module(f"lowrank_ops.kernels.{family}")


def _plan_nf4(device: torch.device, cuda_kernel: bool = False) -> str:
    return _plan.plan_nf4(device.type, _plan.forced(), cuda_kernel).implementation


def _decodes_with_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and _native.missing() is None and bool(_native.module().cuda_targets())


def _rows(x: Tensor) -> Tensor:
    """The kernels take any row stride, but unit stride within a row."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _h_dtype(x: Tensor) -> torch.dtype:
    """h is kept in float32, so that the update is rounded once (in float64 where the reference computes in it)."""
    return torch.promote_types(x.dtype, torch.float32)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ---- nf4 ----


def nf4_quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    chosen = _plan_nf4(w.device)
    if chosen == "cpp":
        return _native.nf4_quantize(w, block_size)
    if chosen == "triton":
        return _kernels("nf4").quantize(w, block_size)
    return reference.nf4_quantize(w, block_size)


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    chosen = _plan_nf4(absmax.device)
    if chosen == "cpp":
        return _native.absmax_quantize(absmax, offset)
    if chosen == "triton":
        return _kernels("nf4").absmax_quantize(absmax, offset)
    return reference.absmax_quantize(absmax, offset)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    chosen = _plan_nf4(packed.device, _decodes_with_cuda(packed.device))
    if chosen == "reference":
        return reference.nf4_dequantize(
            packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype
        ).clone()
    out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    if chosen == "triton":
        return _kernels("nf4").dequantize(
            packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype, out=out
        )
    return _native.nf4_dequantize(packed, absmax, absmax2, offset, out, block_size)


def _nf4_quantize_fake(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return packed, w.new_empty((w.numel() + block_size - 1) // block_size, dtype=torch.float32)


def _absmax_quantize_fake(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    blocks = (absmax.numel() + reference.ABSMAX_BLOCK - 1) // reference.ABSMAX_BLOCK
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(blocks, dtype=torch.float32)


def _nf4_dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(out_features, in_features, dtype=dtype)


# ---- adapted_linear ----


def _dense(
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    if not block_size:
        return weight
    assert absmax is not None
    return reference.nf4_dequantize(weight, absmax, absmax2, offset, out_features, in_features, block_size, dtype)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    block_size: int,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    R = 0 if down is None else down.shape[0]
    plan = _plan.plan_linear(x.device.type, M, x.dtype, block_size > 0, _plan.forced())
    if M == 0:
        return x.new_empty(0, out_features), x.new_empty(0, R, dtype=_h_dtype(x))
    if plan.implementation == "reference":
        w = _dense(weight, absmax, absmax2, offset, out_features, K, block_size, x.dtype)
        h = x.new_empty(M, 0) if down is None else reference.project(x, down, dropout, seed)
        return reference.adapted_linear(x, w, down, up, bias, scale, dropout, seed), h.to(_h_dtype(x))
    x, down, up, bias = _rows(x), _contiguous(down), _contiguous(up), _contiguous(bias)
    arguments = (x, weight, absmax, absmax2, offset, out_features, block_size, down, up, bias, scale, dropout, seed)
    if plan.implementation == "triton":
        return _kernels("adapted_linear").forward(*arguments, plan.form)
    return _native.adapted_linear(*arguments, plan.form)


def adapted_linear_backward(
    g: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_x: bool,
    need_down: bool,
    need_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    M, N = g.shape
    plan = _plan.plan_linear(g.device.type, M, g.dtype, block_size > 0, _plan.forced())
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    if M == 0:
        grads = (
            g.new_empty(0, in_features) if need_x else None,
            torch.zeros_like(down) if need_down and down is not None else None,
            torch.zeros_like(up) if need_up and up is not None else None,
        )
    elif plan.implementation == "reference":
        w = _dense(weight, absmax, absmax2, offset, N, in_features, block_size, g.dtype)
        dx, ddown, dup = reference.adapted_linear_backward(g, x, w, down, up, scale, dropout, seed, h)
        grads = (dx if need_x else None, ddown if need_down else None, dup if need_up else None)
    else:
        g, down, up = _rows(g), _contiguous(down), _contiguous(up)
        x = None if x is None else _rows(x)
        run = _native.adapted_linear_backward
        if plan.implementation == "triton":
            run = _kernels("adapted_linear").backward
        grads = run(
            g, x, h, weight, absmax, absmax2, offset, in_features, block_size, down, up, scale, dropout, seed,
            plan.form, need_x, need_down, need_up,
        )  # fmt: skip
    dx, ddown, dup = (g.new_empty(0) if grad is None else grad for grad in grads)
    return dx, ddown, dup


def _adapted_linear_fake(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    block_size: int,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    R = 0 if down is None else down.shape[0]
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], R, dtype=_h_dtype(x))


def _adapted_linear_backward_fake(
    g: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_x: bool,
    need_down: bool,
    need_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        g.new_empty(g.shape[0], in_features) if need_x else g.new_empty(0),
        torch.empty_like(down, memory_format=torch.contiguous_format)
        if need_down and down is not None
        else g.new_empty(0),
        torch.empty_like(up, memory_format=torch.contiguous_format) if need_up and up is not None else g.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, absmax, absmax2, offset, _, block_size, down, up, bias, scale, dropout, seed = inputs
    ctx.need_x, ctx.need_down, ctx.need_up = (ctx.needs_input_grad[i] for i in (0, 7, 8))
    # Of the activations: h, R numbers a token, and x only where `down` is trained.
    ctx.save_for_backward(
        x if ctx.need_down else None, output[1] if ctx.need_up else None,
        weight, absmax, absmax2, offset, down, up, seed,
    )  # fmt: skip
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.in_features, ctx.block_size, ctx.scale, ctx.dropout = x.shape[1], block_size, scale, dropout
    ctx.bias_dtype = bias.dtype if ctx.needs_input_grad[9] else None


def _differentiate(ctx: Any, g: Tensor | None, _gh: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 13
    if g is None:
        return tuple(grads)
    x, h, weight, absmax, absmax2, offset, down, up, seed = ctx.saved_tensors
    if ctx.need_x or ctx.need_down or ctx.need_up:
        dx, ddown, dup = torch.ops.lowrank_ops.adapted_linear_backward.default(
            g, x, h, weight, absmax, absmax2, offset, ctx.in_features, ctx.block_size, down, up, ctx.scale,
            ctx.dropout, seed, ctx.need_x, ctx.need_down, ctx.need_up,
        )  # fmt: skip
        grads[0] = dx if ctx.need_x else None
        grads[7] = ddown if ctx.need_down else None
        grads[8] = dup if ctx.need_up else None
    if ctx.bias_dtype is not None:
        grads[9] = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(ctx.bias_dtype)
    return tuple(grads)


def _differentiate_twice(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Without this, a gradient taken with create_graph=True would silently miss its own gradient.
    raise RuntimeError(
        "adapted_linear can be differentiated once; a second derivative needs plain PyTorch, such as "
        "lowrank_ops.reference.adapted_linear with weight.dequantize()"
    )


for _name, _implementation, _fake in (
    ("nf4_quantize", nf4_quantize, _nf4_quantize_fake),
    ("absmax_quantize", absmax_quantize, _absmax_quantize_fake),
    ("nf4_dequantize", nf4_dequantize, _nf4_dequantize_fake),
    ("adapted_linear", adapted_linear, _adapted_linear_fake),
    ("adapted_linear_backward", adapted_linear_backward, _adapted_linear_backward_fake),
):
    LIBRARY.impl(_name, _implementation, "CPU")
    LIBRARY.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"lowrank_ops::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("lowrank_ops::adapted_linear", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("lowrank_ops::adapted_linear_backward", _differentiate_twice, lib=LIBRARY)
