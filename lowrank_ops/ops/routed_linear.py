"""y[t] = W x[t] + bias + s · U C (D x[t]) of the update that row t is routed to, as a registered op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from . import _cpu, _plan
from . import arena as resident
from ._cpu import Matrix
from ._operands import contiguous, core_matrix, dense, matrix_schema, rows
from ._register import register


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
    plan = _plan.choose_routed(x, weight)
    if M == 0:
        return x.new_empty(0, N)
    if plan.implementation == "reference":
        w = dense(weight, N, K, x.dtype)
        assert w is not None
        updates: list[tuple[Tensor, Tensor, Tensor | None, float] | None] = []
        for fields in table.tolist():
            rank, down, up, core, scale = resident.update(arena, fields, N, K)
            d, u = dense(down, rank, K, x.dtype), dense(up, N, rank, x.dtype)
            updates.append(None if d is None or u is None else (d, u, core_matrix(core, rank), scale))
        return reference.routed_linear(x, w, bias, updates, slots)
    operands = (rows(x), weight, N, contiguous(bias), arena, table, slots, plan.form)
    if plan.implementation == "cpp":
        return _cpu.routed_linear(*operands)
    if plan.implementation == "triton":
        return _plan.launchers("routed_linear").forward(*operands, capacity)
    y = _plan.launchers("routed_linear").base(*operands[:4], plan.form)
    return _cpu.routed_update_cuda(operands[0], arena, table, slots, y, capacity)


def _routed_linear_fake(x: Tensor, weight: Matrix, N: int, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], N)


register(
    "routed_linear",
    f"(Tensor x, {matrix_schema('weight')}, int out_features, Tensor? bias, Tensor arena, Tensor table, Tensor slots, "
    "int capacity=512) -> Tensor",
    routed_linear,
    _routed_linear_fake,
)
