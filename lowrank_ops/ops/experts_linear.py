"""y[p] = W_e x[p] + U_be (D_be x[p]) + b_e + s · U_e C_e (D_e drop(x[p])), rows sorted by expert, and its backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..kernels.operands import Branch, Core, Matrix
from . import _cpu, _plan
from ._operands import (
    backward_fake,
    contiguous,
    core_matrices,
    dense,
    empty_for_none,
    unit_stride,
    wide_dtype,
    zero_gradient,
)  # fmt: skip
from ._register import register, register_autograd

_UPDATE = "int rank[R], Matrix? down[E,R,K], Matrix? up[E,N,R], Core? core[E,R]"


def experts_linear(
    x: Tensor, weight: Matrix, offsets: Tensor, N: int, rank: int, down: Matrix | None, up: Matrix | None,
    core: Core | None, bias: Tensor | None, scale: float, dropout: float, seed: Tensor | None,
    branch: Branch | None = None, plan: _plan.Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [P, N], h [P, R], h[p] = D_e drop(x[p])); a plan made earlier for as many rows may be passed."""
    P, K = x.shape
    plan = plan or _plan.choose_experts(x, weight, offsets, K)
    check_offsets(offsets, P)
    if P == 0:
        return x.new_empty(0, N), x.new_empty(0, rank, dtype=wide_dtype(x))
    if plan.implementation == "reference":
        w, d, u, c = _dense(weight, down, up, core, N, K, rank, x.dtype)
        h = x.new_empty(P, 0) if d is None else reference.project_experts(x, d, offsets, dropout, seed)
        y = reference.experts_linear(x, w, offsets, d, u, bias, scale, dropout, seed, c, branch)
        return y, h.to(wide_dtype(x))
    operands = (unit_stride(x), weight, offsets.contiguous(), N, rank, down, up, core, contiguous(bias), scale, dropout)
    if plan.implementation == "cpp":
        return _cpu.experts_linear(*operands, seed, _plan.few_tokens(x, weight, K), branch)
    y, h = _plan.launchers("experts_linear").forward(*operands, seed, plan.form, branch=branch)
    return y, h


def experts_linear_backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Matrix, offsets: Tensor, K: int, rank: int,
    down: Matrix | None, up: Matrix | None, core: Core | None, scale: float, dropout: float, seed: Tensor | None,
    need_x: bool, need_down: bool, need_up: bool, need_core: bool, branch: Branch | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, dD, dU, dC), each empty if not needed."""
    needs = need_x, need_down, need_up, need_core
    P, N = g.shape
    plan = _plan.choose_experts(g, weight, offsets, K)
    check_offsets(offsets, P)
    if P == 0:
        zeros = (zero_gradient(need, of) for need, of in ((need_down, down), (need_up, up), (need_core, core)))
        return empty_for_none(g, g.new_empty(0, K) if need_x else None, *zeros)
    if plan.implementation == "reference":
        w, d, u, c = _dense(weight, down, up, core, N, K, rank, g.dtype)
        dx, ddown, dup, dcore = reference.experts_linear_backward(
            g, x, w, offsets, d, u, scale, dropout, seed, h, c, branch
        )
        if dcore is not None and core is not None:
            pairs = zip(dcore, core.values, strict=True)
            dcore = torch.stack([reference.core_values(matrix, values, core.index) for matrix, values in pairs])
        made = (dx, ddown, dup, dcore)
        return empty_for_none(g, *(grad if need else None for grad, need in zip(made, needs, strict=True)))
    run = _cpu.experts_linear_backward if plan.implementation == "cpp" else _plan.launchers("experts_linear").backward
    x, g, h = None if x is None else unit_stride(x), unit_stride(g), contiguous(h)
    operands = (g, x, h, weight, offsets.contiguous(), K, rank, down, up, core, scale, dropout, seed, plan.form)
    return empty_for_none(g, *run(*operands, *needs, branch=branch))


def check_offsets(offsets: Tensor, P: int) -> None:
    """Raise unless the offsets rise from 0 to at most P; on a GPU that would need the host to wait, and is not done."""
    if offsets.device.type != "cpu":
        return
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"offsets must begin with 0, got {values[0]}")
    if values[-1] > P:
        raise ValueError(f"offsets must end at most at the {P} rows of x, got {values[-1]}")
    for expert, (begin, end) in enumerate(pairwise(values)):
        if end < begin:
            raise ValueError(f"offsets must not fall, got {begin} and then {end} for expert {expert}")


def _dense(
    weight: Matrix, down: Matrix | None, up: Matrix | None, core: Core | None, N: int, K: int, rank: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """W, D, U and C [E, R, R] for the reference."""
    d = None if down is None else dense(down, rank, K, dtype)
    u = None if up is None else dense(up, N, rank, dtype)
    return dense(weight, N, K, dtype), d, u, core_matrices(core, rank)


def _fake(x: Tensor, out_features: int, rank: int, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], rank, dtype=wide_dtype(x))


register(
    "experts_linear",
    f"(Tensor x[P,K], Matrix weight[E,N,K], Tensor offsets[E+1]:int32, int out_features[N], {_UPDATE}, "
    "Tensor? bias[E,N], float scale, float dropout, Tensor? seed[1]:int64, Branch? branch[E,N,K]=None) "
    "-> (Tensor y, Tensor h)",
    experts_linear,
    _fake,
)
register(
    "experts_linear_backward",
    "(Tensor g[P,N], Tensor? x[P,K]:g, Tensor? h[P,R]:wide, Matrix weight[E,N,K], Tensor offsets[E+1]:int32, "
    f"int in_features[K], {_UPDATE}, float scale, float dropout, Tensor? seed[1]:int64, bool need_x, bool need_down, "
    "bool need_up, bool need_core, Branch? branch[E,N,K]=None) "
    "-> (Tensor dx, Tensor ddown, Tensor dup, Tensor dcore)",
    experts_linear_backward,
    backward_fake,
)
# Of the activations, backward keeps h, R numbers a row, and x only if `down` is trained.
register_autograd("experts_linear", x=("down",), h=("up", "core"))
