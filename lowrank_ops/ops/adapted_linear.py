"""y = W x + U_b (D_b x) + bias + s · U C (D drop(x)) and its backward as registered ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..kernels.operands import Branch, Core, Matrix
from . import _cpu, _plan
from ._operands import (
    backward_fake,
    contiguous,
    core_matrix,
    dense,
    empty_for_none,
    unit_stride,
    wide_dtype,
    zero_gradient,
)  # fmt: skip
from ._register import register, register_autograd

_UPDATE = "int rank[R], Matrix? down[R,K], Matrix? up[N,R], Core? core[R]"


def adapted_linear(
    x: Tensor, weight: Matrix, N: int, rank: int, down: Matrix | None, up: Matrix | None, core: Core | None,
    bias: Tensor | None, scale: float, dropout: float, seed: Tensor | None, branch: Branch | None = None,
    plan: _plan.Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, N], h = D drop(x) [M, R]); a plan made earlier for as many tokens may be passed."""
    M, K = x.shape
    plan = plan or _plan.choose_linear(x, weight, K)
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, rank, dtype=wide_dtype(x))
    if plan.implementation == "reference":
        w = dense(weight, N, K, x.dtype)
        d = None if down is None else dense(down, rank, K, x.dtype)
        u = None if up is None else dense(up, N, rank, x.dtype)
        h = x.new_empty(M, 0) if d is None else reference.project(x, d, dropout, seed)
        y = reference.adapted_linear(x, w, d, u, bias, scale, dropout, seed, core_matrix(core, rank), branch)
        return y, h.to(wide_dtype(x))
    run = _cpu.adapted_linear if plan.implementation == "cpp" else _plan.launchers("adapted_linear").forward
    operands = (unit_stride(x), weight, N, rank, down, up, core, contiguous(bias), scale, dropout, seed, plan.form)
    y, h = run(*operands, branch=branch)
    return y, h


def adapted_linear_backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Matrix, K: int, rank: int, down: Matrix | None,
    up: Matrix | None, core: Core | None, scale: float, dropout: float, seed: Tensor | None, need_x: bool,
    need_down: bool, need_up: bool, need_core: bool, branch: Branch | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, dD, dU, dC), each empty if not needed."""
    needs = need_x, need_down, need_up, need_core
    M, N = g.shape
    plan = _plan.choose_linear(g, weight, K)
    if M == 0:
        zeros = (zero_gradient(need, of) for need, of in ((need_down, down), (need_up, up), (need_core, core)))
        return empty_for_none(g, g.new_empty(0, K) if need_x else None, *zeros)
    if plan.implementation == "reference":
        w = dense(weight, N, K, g.dtype)
        d = None if down is None else dense(down, rank, K, g.dtype)
        u = None if up is None else dense(up, N, rank, g.dtype)
        c = core_matrix(core, rank)
        dx, ddown, dup, dcore = reference.adapted_linear_backward(g, x, w, d, u, scale, dropout, seed, h, c, branch)
        if dcore is not None and core is not None:
            dcore = reference.core_values(dcore, *core)
        made = (dx, ddown, dup, dcore)
        return empty_for_none(g, *(grad if need else None for grad, need in zip(made, needs, strict=True)))
    run = _cpu.adapted_linear_backward if plan.implementation == "cpp" else _plan.launchers("adapted_linear").backward
    x, g, h = None if x is None else unit_stride(x), unit_stride(g), contiguous(h)
    operands = (g, x, h, weight, K, rank, down, up, core, scale, dropout, seed, plan.form)
    return empty_for_none(g, *run(*operands, *needs, branch=branch))


def _fake(x: Tensor, out_features: int, rank: int, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], rank, dtype=wide_dtype(x))


register(
    "adapted_linear",
    f"(Tensor x[M,K], Matrix weight[N,K], int out_features[N], {_UPDATE}, Tensor? bias[N], float scale, float dropout, "
    "Tensor? seed[1]:int64, Branch? branch[N,K]=None) -> (Tensor y, Tensor h)",
    adapted_linear,
    _fake,
)
register(
    "adapted_linear_backward",
    f"(Tensor g[M,N], Tensor? x[M,K]:g, Tensor? h[M,R]:wide, Matrix weight[N,K], int in_features[K], {_UPDATE}, "
    "float scale, float dropout, Tensor? seed[1]:int64, bool need_x, bool need_down, bool need_up, bool need_core, "
    "Branch? branch[N,K]=None) "
    "-> (Tensor dx, Tensor ddown, Tensor dup, Tensor dcore)",
    adapted_linear_backward,
    backward_fake,
)
# Of the activations, backward keeps h, R numbers a token, and x only if `down` is trained.
register_autograd("adapted_linear", x=("down",), h=("up", "core"))
