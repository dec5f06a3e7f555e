"""y = W x + bias + s · U C (D drop(x)) and its backward as registered ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _cpu, _plan
from ._cpu import Core, Matrix
from ._operands import (
    bias_gradient,
    contiguous,
    core_matrix,
    dense,
    empty,
    h_dtype,
    matrix_schema,
    or_empty,
    rows,
    zeros,
)
from ._register import differentiate_twice, keep, kept, register, register_autograd

_UPDATE = f"int rank, {matrix_schema('down', '?')}, {matrix_schema('up', '?')}, Tensor? core, Tensor? core_index"
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
    plan = _plan.choose_linear(x, weight, K)
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, rank, dtype=h_dtype(x))
    if plan.implementation == "reference":
        w, d, u = dense(weight, N, K, x.dtype), dense(down, rank, K, x.dtype), dense(up, N, rank, x.dtype)
        assert w is not None
        h = x.new_empty(M, 0) if d is None else reference.project(x, d, dropout, seed)
        y = reference.adapted_linear(x, w, d, u, bias, scale, dropout, seed, core_matrix(core, rank))
        return y, h.to(h_dtype(x))
    run = _cpu.adapted_linear if plan.implementation == "cpp" else _plan.launchers("adapted_linear").forward
    y, h = run(rows(x), weight, N, rank, down, up, core, contiguous(bias), scale, dropout, seed, plan.form)
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
    plan = _plan.choose_linear(g, weight, K)
    if M == 0:
        dx = g.new_empty(0, K) if need_x else None
        return or_empty(g, dx, zeros(need_down, down), zeros(need_up, up), zeros(need_core, core))
    if plan.implementation == "reference":
        w, d, u = dense(weight, N, K, g.dtype), dense(down, rank, K, g.dtype), dense(up, N, rank, g.dtype)
        assert w is not None
        c = core_matrix(core, rank)
        dx, ddown, dup, dcore = reference.adapted_linear_backward(g, x, w, d, u, scale, dropout, seed, h, c)
        if dcore is not None and core is not None:
            dcore = reference.core_values(dcore, *core)
        made = (dx, ddown, dup, dcore)
        return or_empty(g, *(grad if need else None for grad, need in zip(made, needs, strict=True)))
    run = _cpu.adapted_linear_backward if plan.implementation == "cpp" else _plan.launchers("adapted_linear").backward
    x = None if x is None else rows(x)
    return or_empty(g, *run(rows(g), x, h, weight, K, rank, down, up, core, scale, dropout, seed, plan.form, *needs))


def _adapted_linear_fake(x: Tensor, weight: Matrix, N: int, rank: int, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], rank, dtype=h_dtype(x))


def _adapted_linear_backward_fake(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Matrix, K: int, rank: int, *others: Any
) -> tuple[Tensor, ...]:
    down, up, core, _, _, _, need_x, need_down, need_up, need_core = others
    dx = g.new_empty(g.shape[0], K) if need_x else g.new_empty(0)
    return dx, empty(need_down, down, g), empty(need_up, up, g), empty(need_core, core, g)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *arguments = inputs
    ctx.needs = [ctx.needs_input_grad[at + 1] for at in (_X, _DOWN, _UP, _CORE)]  # the first is the keyset
    _, need_down, need_up, need_core = ctx.needs
    # Of the activations: h, R numbers a token, and x only where `down` is trained.
    keep(ctx, x if need_down else None, output[1] if need_up or need_core else None, arguments)
    ctx.in_features = x.shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g: Tensor | None, _gh: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _ARGUMENTS
    if g is None:
        return tuple(grads)
    x, h, arguments = kept(ctx)
    bias = arguments.pop(_BIAS - 1)
    if any(ctx.needs):
        arguments[5] = ctx.in_features  # in the place of out_features
        made = torch.ops.lowrank_ops.adapted_linear_backward.default(g, x, h, *arguments, *ctx.needs)
        for at, need, grad in zip((_X, _DOWN, _UP, _CORE), ctx.needs, made, strict=True):
            grads[at] = grad if need else None
    if ctx.needs_input_grad[_BIAS + 1]:
        grads[_BIAS] = bias_gradient(g, bias.dtype)
    return tuple(grads)


register(
    "adapted_linear",
    f"(Tensor x, {matrix_schema('weight')}, int out_features, {_UPDATE}, Tensor? bias, float scale, float dropout, "
    "Tensor? seed) -> (Tensor y, Tensor h)",
    adapted_linear,
    _adapted_linear_fake,
)
register(
    "adapted_linear_backward",
    f"(Tensor g, Tensor? x, Tensor? h, {matrix_schema('weight')}, int in_features, {_UPDATE}, float scale, float dropout, "
    "Tensor? seed, bool need_x, bool need_down, bool need_up, bool need_core) "
    "-> (Tensor dx, Tensor ddown, Tensor dup, Tensor dcore)",
    adapted_linear_backward,
    _adapted_linear_backward_fake,
)
register_autograd("adapted_linear", _save, _differentiate)
register_autograd("adapted_linear_backward", lambda ctx, inputs, output: None, differentiate_twice)
