"""y[t] = W x[t] + U_b (D_b x[t]) + bias + Σ_j w_j s · U C (D x[t]) with the updates that row t is routed to and their
strengths w, as a registered op.

With offsets rows are sorted by expert as for experts_linear, and W, the branch, the bias, D, U and C are those of the
row's expert.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..kernels.arena_layout import FIELDS
from ..kernels.operands import Branch, Matrix
from . import _cpu, _plan
from . import arena as arenas
from ._operands import contiguous, core_matrices, core_matrix, dense, unit_stride
from ._register import register
from .experts_linear import check_offsets


def routed_linear(
    x: Tensor, weight: Matrix, N: int, bias: Tensor | None, arena: Tensor, table: Tensor, slots: Tensor,
    capacity: int = 512, offsets: Tensor | None = None, branch: Branch | None = None, strengths: Tensor | None = None,
    plan: _plan.Plan | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N]; a plan made earlier for as many tokens may be passed."""
    M, K = x.shape
    if offsets is not None:
        check_offsets(offsets, M)
        offsets = offsets.contiguous()
    plan = plan or _plan.choose_routed(x, weight, offsets)
    if M == 0:
        return x.new_empty(0, N)
    if plan.implementation == "reference":
        return _by_reference(x, weight, N, bias, arena, table, slots, offsets, branch, strengths)
    operands = (unit_stride(x), weight, N, contiguous(bias), arena, table, slots, plan.form)
    if plan.implementation == "cpp":
        few = 0 if offsets is None else _plan.few_tokens(x, weight, K)
        return _cpu.routed_linear(*operands, offsets, few, branch, strengths)
    if plan.implementation == "triton":
        return _plan.launchers("routed_linear").forward(
            *operands, capacity, offsets, branch=branch, strengths=strengths
        )
    y = _plan.launchers("routed_linear").base(*operands[:4], plan.form, branch)
    return _cpu.routed_update_cuda(operands[0], arena, table, slots, y, capacity, strengths)


def _by_reference(
    x: Tensor, weight: Matrix, N: int, bias: Tensor | None, arena: Tensor, table: Tensor, slots: Tensor,
    offsets: Tensor | None, branch: Branch | None, strengths: Tensor | None,
) -> Tensor:  # fmt: skip
    K, experts = x.shape[1], 0 if offsets is None else offsets.numel() - 1
    updates: list[tuple[Tensor, Tensor, Tensor | None, float] | None] = []
    for fields in table.tolist():
        update = arenas.update(arena, fields, N, K, experts)
        if update is None:
            updates.append(None)
            continue
        rank, down, up, core, scale = update
        d, u = dense(down, rank, K, x.dtype), dense(up, N, rank, x.dtype)
        updates.append((d, u, core_matrices(core, rank) if experts else core_matrix(core, rank), scale))
    return reference.routed_linear(x, dense(weight, N, K, x.dtype), bias, updates, slots, offsets, branch, strengths)


def _check(
    arena: Tensor, table: Tensor, slots: Tensor, strengths: Tensor | None, capacity: int, N: int, K: int, E: int = 1,
    **_: Any,
) -> None:  # fmt: skip
    """Raise unless slots name rows of the table, and these rows describe updates in the arena.

    On a GPU that would make the host wait; there its caller answers for the table.
    """
    if not 0 < capacity < 2**31:
        raise ValueError(f"lowrank_ops::routed_linear: capacity must be at least 1 and below 2^31, got {capacity}")
    if (slots.dim() == 2) != (strengths is not None) or (strengths is not None and strengths.shape != slots.shape):
        needed = "None for slots [M]" if slots.dim() == 1 else str(list(slots.shape))
        got = None if strengths is None else list(strengths.shape)
        raise ValueError(f"lowrank_ops::routed_linear: strengths must be {needed}, got {got}")
    if arena.is_cpu and arena.data_ptr() % 4:
        raise ValueError(
            "lowrank_ops::routed_linear: arena must begin at a multiple of 4 bytes, got a view that does not"
        )
    if fault := _cpu.arena_fault(arena, table, slots, N, K, E):
        raise ValueError(f"lowrank_ops::routed_linear: {fault}")


def _fake(x: Tensor, out_features: int, **_: Any) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


register(
    "routed_linear",
    "(Tensor x[M,K], Matrix weight[E?,N,K], int out_features[N], Tensor? bias[E?,N], Tensor arena[bytes]:uint8, "
    f"Tensor table[rows,{len(FIELDS)}]:int64, Tensor slots[M,S?]:int32, int capacity=512, Tensor? offsets[E+1]:int32=None, "
    "Branch? branch[E?,N,K]=None, Tensor? strengths[M,S?]:float32=None) -> Tensor",
    routed_linear,
    _fake,
    _check,
)
