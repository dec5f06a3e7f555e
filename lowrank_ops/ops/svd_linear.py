"""y = U C (Vᵀ x) + bias and its backward as registered ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _cpu, _plan
from ._cpu import Core, Matrix
from ._operands import bias_gradient, contiguous, core_matrix, dense, empty, matrix_schema, or_empty, rows, zeros
from ._register import differentiate_twice, keep, kept, register, register_autograd

_X = 0
_SVD_CORE, _SVD_OUT, _SVD_BIAS, _SVD_ARGUMENTS = 6, 13, 15, 16


def svd_linear(
    x: Tensor, u: Matrix, core: Core, vt: Matrix, N: int, rank: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    plan = _plan.choose_linear(x, u, K)
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, rank)
    if plan.implementation == "reference":
        left, right, c = dense(u, N, rank, x.dtype), dense(vt, rank, K, x.dtype), core_matrix(core, rank)
        assert left is not None and right is not None and c is not None
        return reference.svd_linear(x, left, c, right, bias), x @ right.to(x.dtype).T
    operands = (rows(x), u, core, vt, contiguous(bias), N, rank)
    if plan.implementation == "triton":
        y, h = _plan.launchers("svd_linear").forward(*operands)
        return y, h
    return _cpu.svd_linear(*operands, plan.form)


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
    plan = _plan.choose_linear(g, u, K)
    if M == 0:
        return or_empty(g, g.new_empty(0, K) if need_x else None, zeros(need_core, core))
    if plan.implementation == "reference":
        left, right, c = dense(u, N, rank, g.dtype), dense(vt, rank, K, g.dtype), core_matrix(core, rank)
        assert left is not None and right is not None and c is not None
        dx, dcore = reference.svd_linear_backward(g, h, left, c, right)
        kept = reference.core_values(dcore, *core) if need_core and dcore is not None else None
        return or_empty(g, dx if need_x else None, kept)
    run = _cpu.svd_linear_backward if plan.implementation == "cpp" else _plan.launchers("svd_linear").backward
    return or_empty(g, *run(rows(g), h, u, core, vt, K, rank, need_x, need_core))


def _svd_linear_fake(
    x: Tensor, u: Matrix, core: Core, vt: Matrix, N: int, rank: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], rank)


def _svd_linear_backward_fake(
    g: Tensor, h: Tensor | None, u: Matrix, core: Core, vt: Matrix, K: int, rank: int, need_x: bool, need_core: bool
) -> tuple[Tensor, ...]:
    return g.new_empty(g.shape[0], K) if need_x else g.new_empty(0), empty(need_core, core, g)


def _save_svd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *arguments = inputs
    ctx.needs = [ctx.needs_input_grad[at + 1] for at in (_X, _SVD_CORE)]
    keep(ctx, None, output[1] if ctx.needs[1] else None, arguments)
    ctx.in_features = x.shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_svd(ctx: Any, g: Tensor | None, _gh: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _SVD_ARGUMENTS
    if g is None:
        return tuple(grads)
    _, h, arguments = kept(ctx)
    bias = arguments.pop(_SVD_BIAS - 1)
    if any(ctx.needs):
        arguments[_SVD_OUT - 1] = ctx.in_features  # in the place of out_features
        made = torch.ops.lowrank_ops.svd_linear_backward.default(g, h, *arguments, *ctx.needs)
        for at, need, grad in zip((_X, _SVD_CORE), ctx.needs, made, strict=True):
            grads[at] = grad if need else None
    if ctx.needs_input_grad[_SVD_BIAS + 1]:
        grads[_SVD_BIAS] = bias_gradient(g, bias.dtype)
    return tuple(grads)


register(
    "svd_linear",
    f"(Tensor x, {matrix_schema('u')}, Tensor core, Tensor? core_index, {matrix_schema('vt')}, int out_features, int rank, "
    "Tensor? bias) -> (Tensor y, Tensor h)",
    svd_linear,
    _svd_linear_fake,
)
register(
    "svd_linear_backward",
    f"(Tensor g, Tensor? h, {matrix_schema('u')}, Tensor core, Tensor? core_index, {matrix_schema('vt')}, int in_features, "
    "int rank, bool need_x, bool need_core) -> (Tensor dx, Tensor dcore)",
    svd_linear_backward,
    _svd_linear_backward_fake,
)
register_autograd("svd_linear", _save_svd, _differentiate_svd)
register_autograd("svd_linear_backward", lambda ctx, inputs, output: None, differentiate_twice)
