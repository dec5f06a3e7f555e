"""The registered ops: schema, fake, implementation per device, autograd.

They are what torch.compile, opcheck and the dispatcher see; :mod:`lowrank_ops.functional` is the checked way in, through
:func:`call`. A matrix is (data, scales, block size): the tensor itself, no scales and 0 where it is dense; the packed bytes,
(absmax,) or (absmax, absmax2, offset), and the block size where it is NF4. A core is (values, index), the index that of a
sparse one (:mod:`lowrank_ops.cores`). Both are None where they are absent.

A schema has no such groups. There a matrix is five arguments (data, absmax, absmax2, offset, block size) and a core two: a
list of scales would cost more than all the rest where autograd has to take it apart. The schemas are registered with the
low-level Library because a call through it costs less than one through a custom_op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _native, _plan, reference
from . import arena as resident
from ._native import Core, Matrix

LIBRARY = torch.library.Library("lowrank_ops", "DEF")


def _matrix(name: str, optional: str = "") -> str:
    scales = ", ".join(f"Tensor? {name}_{scale}" for scale in ("absmax", "absmax2", "offset"))
    return f"Tensor{optional} {name}, {scales}, int {name}_block"


_UPDATE = f"int rank, {_matrix('down', '?')}, {_matrix('up', '?')}, Tensor? core, Tensor? core_index"
_PAIRS = "Tensor chosen, Tensor rejected, Tensor? margin, Tensor? labels, float center"
SCHEMAS = {
    "nf4_quantize": "(Tensor w, int block_size) -> (Tensor, Tensor)",
    "absmax_quantize": "(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    "nf4_dequantize": "(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int out_features, "
    "int in_features, int block_size, ScalarType dtype) -> Tensor",
    "adapted_linear": f"(Tensor x, {_matrix('weight')}, int out_features, {_UPDATE}, Tensor? bias, float scale, "
    "float dropout, Tensor? seed) -> (Tensor y, Tensor h)",
    "adapted_linear_backward": f"(Tensor g, Tensor? x, Tensor? h, {_matrix('weight')}, int in_features, {_UPDATE}, "
    "float scale, float dropout, Tensor? seed, bool need_x, bool need_down, bool need_up, bool need_core) "
    "-> (Tensor dx, Tensor ddown, Tensor dup, Tensor dcore)",
    "svd_linear": f"(Tensor x, {_matrix('u')}, Tensor core, Tensor? core_index, {_matrix('vt')}, int out_features, "
    "int rank, Tensor? bias) -> (Tensor y, Tensor h)",
    "svd_linear_backward": f"(Tensor g, Tensor? h, {_matrix('u')}, Tensor core, Tensor? core_index, {_matrix('vt')}, "
    "int in_features, int rank, bool need_x, bool need_core) -> (Tensor dx, Tensor dcore)",
    "routed_linear": f"(Tensor x, {_matrix('weight')}, int out_features, Tensor? bias, Tensor arena, Tensor table, "
    "Tensor slots, int capacity=512) -> Tensor",
    "bradley_terry_loss": f"({_PAIRS}) -> Tensor",
    "bradley_terry_loss_backward": f"(Tensor g, {_PAIRS}) -> (Tensor dchosen, Tensor drejected)",
}
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _kernels(family: str) -> ModuleType:
    # Imported at first use: importing the package must not need Triton, and TRITON_INTERPRET is read then.
    import importlib

    return importlib.import_module(f"lowrank_ops.kernels.{family}")


def _plan_nf4(device: torch.device, cuda_kernel: bool = False) -> str:
    return _plan.plan_nf4(device.type, _plan.forced(), cuda_kernel).implementation


def _plan_linear(x: Tensor, weight: Matrix, K: int) -> _plan.Plan:
    return _plan.plan_linear(x.device.type, x.shape[0], K, x.dtype, weight[2], _plan.forced(), _native.isa())


def _plan_routed(x: Tensor, weight: Matrix) -> _plan.Plan:
    isa, cuda_kernel = _native.isa(), _native.has_cuda(x.device)
    M, K = x.shape
    return _plan.plan_routed(x.device.type, M, K, x.dtype, weight[2], _plan.forced(), isa, cuda_kernel)


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


# ---- matrices and cores ----


# The arguments of the ops that have groups: a matrix "m", a core "c", and "." all else.
LAYOUTS = {
    "adapted_linear": ".m..mmc....",
    "adapted_linear_backward": "...m..mmc.......",
    "svd_linear": ".mcm...",
    "svd_linear_backward": "..mcm....",
    "routed_linear": ".m......",
}


def _grouped(layout: str, arguments: Sequence[Any]) -> list[Any]:
    """Arguments in groups from those of the schema; a default at the end may be left out."""
    grouped: list[Any] = []
    take = iter(arguments)
    for letter, value in zip(layout, take, strict=False):
        if letter == "m":
            absmax, absmax2, offset, block = next(take), next(take), next(take), next(take)
            if value is not None:
                scales = () if absmax is None else (absmax,) if absmax2 is None else (absmax, absmax2, offset)
                value = value if block else value.contiguous(), scales, block
        elif letter == "c":
            index = next(take)
            value = None if value is None else (value.contiguous(), index)
        grouped.append(value)
    return grouped


def _flat(layout: str, grouped: Sequence[Any]) -> list[Any]:
    """The inverse of _grouped."""
    flat: list[Any] = []
    for letter, value in zip(layout, grouped, strict=True):
        if letter == "m":
            data, scales, block = value or (None, (), 0)
            flat += [data, *scales, *[None] * (3 - len(scales)), block]
        elif letter == "c":
            flat += value or (None, None)
        else:
            flat.append(value)
    return flat


def _dense(matrix: Matrix | None, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """The matrix [rows, columns] as the reference takes it."""
    if matrix is None or not matrix[2]:
        return None if matrix is None else matrix[0]
    data, scales, block = matrix
    absmax, absmax2, offset = scales if len(scales) == 3 else (scales[0], None, None)
    return reference.nf4_dequantize(data, absmax, absmax2, offset, rows, columns, block, dtype)


def _core_matrix(core: Core | None, rank: int) -> Tensor | None:
    return None if core is None else reference.core_matrix(*core, rank)


def _or_empty(g: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(g.new_empty(0) if grad is None else grad for grad in grads)


def _zeros(needed: bool, like: tuple[Tensor, Any] | tuple[Tensor, Any, Any] | None) -> Tensor | None:
    return torch.zeros_like(like[0]) if needed and like is not None else None


def _empty(needed: bool, like: tuple[Tensor, Any] | tuple[Tensor, Any, Any] | None, g: Tensor) -> Tensor:
    if not needed or like is None:
        return g.new_empty(0)
    return torch.empty_like(like[0], memory_format=torch.contiguous_format)


def _bias_gradient(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(dtype)


# ---- adapted_linear ----

# Where the differentiable operands stand among the arguments of the forward's schema.
_X, _DOWN, _UP, _CORE, _BIAS, _ARGUMENTS = 0, 8, 13, 18, 20, 24


def adapted_linear(
    x: Tensor,
    weight: Matrix,
    N: int,
    rank: int,
    down: Matrix | None,
    up: Matrix | None,
    core: Core | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    plan = _plan_linear(x, weight, K)
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, rank, dtype=_h_dtype(x))
    if plan.implementation == "reference":
        w, d, u = _dense(weight, N, K, x.dtype), _dense(down, rank, K, x.dtype), _dense(up, N, rank, x.dtype)
        assert w is not None
        h = x.new_empty(M, 0) if d is None else reference.project(x, d, dropout, seed)
        y = reference.adapted_linear(x, w, d, u, bias, scale, dropout, seed, _core_matrix(core, rank))
        return y, h.to(_h_dtype(x))
    run = _native.adapted_linear if plan.implementation == "cpp" else _kernels("adapted_linear").forward
    y, h = run(_rows(x), weight, N, rank, down, up, core, _contiguous(bias), scale, dropout, seed, plan.form)
    return y, h


def adapted_linear_backward(
    g: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Matrix,
    K: int,
    rank: int,
    down: Matrix | None,
    up: Matrix | None,
    core: Core | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    *needs: bool,
) -> tuple[Tensor, ...]:
    need_x, need_down, need_up, need_core = needs
    M, N = g.shape
    plan = _plan_linear(g, weight, K)
    if M == 0:
        dx = g.new_empty(0, K) if need_x else None
        return _or_empty(g, dx, _zeros(need_down, down), _zeros(need_up, up), _zeros(need_core, core))
    if plan.implementation == "reference":
        w, d, u = _dense(weight, N, K, g.dtype), _dense(down, rank, K, g.dtype), _dense(up, N, rank, g.dtype)
        assert w is not None
        c = _core_matrix(core, rank)
        dx, ddown, dup, dcore = reference.adapted_linear_backward(g, x, w, d, u, scale, dropout, seed, h, c)
        if dcore is not None and core is not None:
            dcore = reference.core_values(dcore, *core)
        made = (dx, ddown, dup, dcore)
        return _or_empty(g, *(grad if need else None for grad, need in zip(made, needs, strict=True)))
    run = _native.adapted_linear_backward if plan.implementation == "cpp" else _kernels("adapted_linear").backward
    x = None if x is None else _rows(x)
    return _or_empty(g, *run(_rows(g), x, h, weight, K, rank, down, up, core, scale, dropout, seed, plan.form, *needs))


def _adapted_linear_fake(x: Tensor, weight: Matrix, N: int, rank: int, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], rank, dtype=_h_dtype(x))


def _adapted_linear_backward_fake(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Matrix, K: int, rank: int, *others: Any
) -> tuple[Tensor, ...]:
    down, up, core, _, _, _, need_x, need_down, need_up, need_core = others
    dx = g.new_empty(g.shape[0], K) if need_x else g.new_empty(0)
    return dx, _empty(need_down, down, g), _empty(need_up, up, g), _empty(need_core, core, g)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *arguments = inputs
    ctx.needs = [ctx.needs_input_grad[at + 1] for at in (_X, _DOWN, _UP, _CORE)]  # the first is the keyset
    _, need_down, need_up, need_core = ctx.needs
    # Of the activations: h, R numbers a token, and x only where `down` is trained.
    _keep(ctx, x if need_down else None, output[1] if need_up or need_core else None, arguments)
    ctx.in_features = x.shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _keep(ctx: Any, x: Tensor | None, h: Tensor | None, arguments: Sequence[Any]) -> None:
    """Save the tensors of all arguments as autograd wants them, and the rest beside them."""
    ctx.save_for_backward(x, h, *(a if isinstance(a, Tensor) else None for a in arguments))
    ctx.plain = [None if isinstance(a, Tensor) else a for a in arguments]


def _kept(ctx: Any) -> tuple[Tensor | None, Tensor | None, list[Any]]:
    x, h, *tensors = ctx.saved_tensors
    return x, h, [a if t is None else t for t, a in zip(tensors, ctx.plain, strict=True)]


def _differentiate(ctx: Any, g: Tensor | None, _gh: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _ARGUMENTS
    if g is None:
        return tuple(grads)
    x, h, arguments = _kept(ctx)
    bias = arguments.pop(_BIAS - 1)
    if any(ctx.needs):
        arguments[5] = ctx.in_features  # in the place of out_features
        made = torch.ops.lowrank_ops.adapted_linear_backward.default(g, x, h, *arguments, *ctx.needs)
        for at, need, grad in zip((_X, _DOWN, _UP, _CORE), ctx.needs, made, strict=True):
            grads[at] = grad if need else None
    if ctx.needs_input_grad[_BIAS + 1]:
        grads[_BIAS] = _bias_gradient(g, bias.dtype)
    return tuple(grads)


# ---- svd_linear ----

_SVD_CORE, _SVD_OUT, _SVD_BIAS, _SVD_ARGUMENTS = 6, 13, 15, 16


def svd_linear(
    x: Tensor, u: Matrix, core: Core, vt: Matrix, N: int, rank: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    plan = _plan_linear(x, u, K)
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, rank)
    if plan.implementation == "reference":
        left, right, c = _dense(u, N, rank, x.dtype), _dense(vt, rank, K, x.dtype), _core_matrix(core, rank)
        assert left is not None and right is not None and c is not None
        return reference.svd_linear(x, left, c, right, bias), x @ right.to(x.dtype).T
    operands = (_rows(x), u, core, vt, _contiguous(bias), N, rank)
    if plan.implementation == "triton":
        y, h = _kernels("svd_linear").forward(*operands)
        return y, h
    return _native.svd_linear(*operands, plan.form)


def svd_linear_backward(
    g: Tensor,
    h: Tensor | None,
    u: Matrix,
    core: Core,
    vt: Matrix,
    K: int,
    rank: int,
    need_x: bool,
    need_core: bool,
) -> tuple[Tensor, ...]:
    M, N = g.shape
    plan = _plan_linear(g, u, K)
    if M == 0:
        return _or_empty(g, g.new_empty(0, K) if need_x else None, _zeros(need_core, core))
    if plan.implementation == "reference":
        left, right, c = _dense(u, N, rank, g.dtype), _dense(vt, rank, K, g.dtype), _core_matrix(core, rank)
        assert left is not None and right is not None and c is not None
        dx, dcore = reference.svd_linear_backward(g, h, left, c, right)
        kept = reference.core_values(dcore, *core) if need_core and dcore is not None else None
        return _or_empty(g, dx if need_x else None, kept)
    run = _native.svd_linear_backward if plan.implementation == "cpp" else _kernels("svd_linear").backward
    return _or_empty(g, *run(_rows(g), h, u, core, vt, K, rank, need_x, need_core))


def _svd_linear_fake(
    x: Tensor, u: Matrix, core: Core, vt: Matrix, N: int, rank: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], rank)


def _svd_linear_backward_fake(
    g: Tensor, h: Tensor | None, u: Matrix, core: Core, vt: Matrix, K: int, rank: int, need_x: bool, need_core: bool
) -> tuple[Tensor, ...]:
    return g.new_empty(g.shape[0], K) if need_x else g.new_empty(0), _empty(need_core, core, g)


def _save_svd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *arguments = inputs
    ctx.needs = [ctx.needs_input_grad[at + 1] for at in (_X, _SVD_CORE)]
    _keep(ctx, None, output[1] if ctx.needs[1] else None, arguments)
    ctx.in_features = x.shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_svd(ctx: Any, g: Tensor | None, _gh: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _SVD_ARGUMENTS
    if g is None:
        return tuple(grads)
    _, h, arguments = _kept(ctx)
    bias = arguments.pop(_SVD_BIAS - 1)
    if any(ctx.needs):
        arguments[_SVD_OUT - 1] = ctx.in_features  # in the place of out_features
        made = torch.ops.lowrank_ops.svd_linear_backward.default(g, h, *arguments, *ctx.needs)
        for at, need, grad in zip((_X, _SVD_CORE), ctx.needs, made, strict=True):
            grads[at] = grad if need else None
    if ctx.needs_input_grad[_SVD_BIAS + 1]:
        grads[_SVD_BIAS] = _bias_gradient(g, bias.dtype)
    return tuple(grads)


# ---- preference ----


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float
) -> Tensor:
    chosen, rejected = chosen.contiguous(), rejected.contiguous()
    margin, labels = _contiguous(margin), _contiguous(labels)
    by = _plan.plan_preference(chosen.device.type, _plan.forced()).implementation
    if by == "reference":
        return reference.bradley_terry_loss(chosen, rejected, margin, labels, center)
    run = _native.bradley_terry_loss if by == "cpp" else _kernels("preference").forward
    return run(chosen, rejected, margin, labels, center)


def bradley_terry_loss_backward(
    g: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float
) -> tuple[Tensor, Tensor]:
    chosen, rejected = chosen.contiguous(), rejected.contiguous()
    margin, labels = _contiguous(margin), _contiguous(labels)
    by = _plan.plan_preference(chosen.device.type, _plan.forced()).implementation
    if by == "reference":
        return reference.bradley_terry_loss_backward(g, chosen, rejected, margin, labels, center)
    run = _native.bradley_terry_loss_backward if by == "cpp" else _kernels("preference").backward
    return run(g, chosen, rejected, margin, labels, center)


def _bradley_terry_loss_fake(chosen: Tensor, *arguments: Any) -> Tensor:
    return chosen.new_empty((), dtype=_h_dtype(chosen))


def _bradley_terry_loss_backward_fake(g: Tensor, chosen: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return chosen.new_empty(chosen.shape), chosen.new_empty(chosen.shape)


def _save_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.center = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_pairs(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    made = torch.ops.lowrank_ops.bradley_terry_loss_backward.default(g, *ctx.saved_tensors, ctx.center)
    grads = (grad if need else None for grad, need in zip(made, ctx.needs_input_grad[1:3], strict=True))
    return *grads, None, None, None


def _differentiate_twice(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Without this, a gradient taken with create_graph=True would silently miss its own gradient.
    raise RuntimeError(
        "the ops of lowrank_ops can be differentiated once; a second derivative needs plain PyTorch, such as "
        "lowrank_ops.reference.adapted_linear with weight.dequantize()"
    )


# ---- routed_linear ----


def routed_linear(
    x: Tensor,
    weight: Matrix,
    N: int,
    bias: Tensor | None,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    capacity: int = 512,
) -> Tensor:
    M, K = x.shape
    plan = _plan_routed(x, weight)
    if M == 0:
        return x.new_empty(0, N)
    if plan.implementation == "reference":
        w = _dense(weight, N, K, x.dtype)
        assert w is not None
        updates: list[tuple[Tensor, Tensor, Tensor | None, float] | None] = []
        for fields in table.tolist():
            rank, down, up, core, scale = resident.update(arena, fields, N, K)
            d, u = _dense(down, rank, K, x.dtype), _dense(up, N, rank, x.dtype)
            updates.append(None if d is None or u is None else (d, u, _core_matrix(core, rank), scale))
        return reference.routed_linear(x, w, bias, updates, slots)
    operands = (_rows(x), weight, N, _contiguous(bias), arena, table, slots, plan.form)
    if plan.implementation == "cpp":
        return _native.routed_linear(*operands)
    if plan.implementation == "triton":
        return _kernels("routed_linear").forward(*operands, capacity)
    y = _kernels("routed_linear").base(*operands[:4], plan.form)
    return _native.routed_update_cuda(operands[0], arena, table, slots, y, capacity)


def _routed_linear_fake(x: Tensor, weight: Matrix, N: int, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], N)


# ---- registration, and the way in ----


def _from_flat(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation as the dispatcher calls it."""
    if (layout := LAYOUTS.get(name)) is None:
        return implementation
    return lambda *arguments: implementation(*_grouped(layout, arguments))


_KERNELS: dict[str, Callable[..., Any]] = {}
for _name, _implementation, _fake in (
    ("nf4_quantize", nf4_quantize, _nf4_quantize_fake),
    ("absmax_quantize", absmax_quantize, _absmax_quantize_fake),
    ("nf4_dequantize", nf4_dequantize, _nf4_dequantize_fake),
    ("adapted_linear", adapted_linear, _adapted_linear_fake),
    ("adapted_linear_backward", adapted_linear_backward, _adapted_linear_backward_fake),
    ("svd_linear", svd_linear, _svd_linear_fake),
    ("svd_linear_backward", svd_linear_backward, _svd_linear_backward_fake),
    ("routed_linear", routed_linear, _routed_linear_fake),
    ("bradley_terry_loss", bradley_terry_loss, _bradley_terry_loss_fake),
    ("bradley_terry_loss_backward", bradley_terry_loss_backward, _bradley_terry_loss_backward_fake),
):
    _KERNELS[_name] = _implementation
    for _device in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _from_flat(_name, _implementation), _device)
    torch.library.register_fake(f"lowrank_ops::{_name}", _from_flat(_name, _fake), lib=LIBRARY)


def _register_autograd(name: str, save: Callable[..., None], differentiate: Callable[..., tuple[Any, ...]]) -> None:
    """What torch.library.register_autograd does, which reads the schema anew at each call: as long as all the rest."""
    op, kernel = getattr(torch.ops.lowrank_ops, name).default, _from_flat(name, _KERNELS[name])
    after, devices = torch._C._after_autograd_keyset, (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)

    def below(keyset: Any, *arguments: Any) -> Any:
        rest = keyset & after
        # Where nothing is left but the device's kernel it is called here: the dispatcher's way to it costs as much again.
        if rest.highestPriorityTypeId() in devices:
            return kernel(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(rest, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            output = below(keyset, *arguments)
            save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return None, *differentiate(ctx, *grads)

    def implementation(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return Differentiable.apply(keyset, *arguments)
        return below(keyset, *arguments)

    LIBRARY.impl(name, implementation, "Autograd", with_keyset=True)


for _name, _backward, _setup in (
    ("adapted_linear", _differentiate, _save),
    ("svd_linear", _differentiate_svd, _save_svd),
    ("bradley_terry_loss", _differentiate_pairs, _save_pairs),
):
    _register_autograd(_name, _setup, _backward)
    _register_autograd(f"{_name}_backward", lambda ctx, inputs, output: None, _differentiate_twice)


# The dispatcher's state in a thread where it has nothing to do beside autograd: no transform of torch.func, no mode (fake
# tensors, counters), no tracing, no autocast. The first one is that of inference mode.
_BARE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_IDLE = (_BARE.raw_repr(), _BARE.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr())

# What a kernel may be given as it is; a subclass of Tensor may hold its numbers elsewhere.
_PLAIN = {Tensor, torch.nn.Parameter, float, int, bool, type(None)}


def call(name: str, x: Tensor, *arguments: Any) -> Any:
    """The op of that name, its matrices and cores in groups; where the dispatcher would but pass the call on, its kernel.

    Passing two dozen arguments on takes longer than one token through a small matrix. Tensors with a minus that is put off
    (``is_neg``) are for the caller to resolve.
    """
    if (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _IDLE
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.autograd._profiler_enabled()
        and (x.is_cpu or x.is_cuda)
        and {type(x), *(type(a[0] if type(a) is tuple else a) for a in arguments)} <= _PLAIN
    ):
        return _KERNELS[name](x, *arguments)
    return getattr(torch.ops.lowrank_ops, name).default(*_flat(LAYOUTS[name], (x, *arguments)))
