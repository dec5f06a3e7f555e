"""y = U C (Vᵀ x) + bias and its backward as registered ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..kernels.operands import Core, Matrix
from . import _cpu, _plan
from ._operands import backward_fake, contiguous, core_matrix, dense, empty_for_none, unit_stride, zero_gradient
from ._register import register, register_autograd


def svd_linear(
    x: Tensor, u: Matrix, core: Core, vt: Matrix, N: int, rank: int, bias: Tensor | None,
    plan: _plan.Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, N], h = Vᵀ x [M, R]). A plan made earlier for as many tokens may be passed."""
    M, K = x.shape
    plan = plan or _plan.choose_linear(x, u, K)
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, rank)
    if plan.implementation == "reference":
        left, right, c = dense(u, N, rank, x.dtype), dense(vt, rank, K, x.dtype), core_matrix(core, rank)
        assert c is not None
        return reference.svd_linear(x, left, c, right, bias), x @ right.to(x.dtype).T
    operands = (unit_stride(x), u, core, vt, contiguous(bias), N, rank)
    if plan.implementation == "triton":
        y, h = _plan.launchers("svd_linear").forward(*operands)
        return y, h
    return _cpu.svd_linear(*operands, plan.form)


def svd_linear_backward(
    g: Tensor, h: Tensor | None, u: Matrix, core: Core, vt: Matrix, K: int, rank: int, need_x: bool, need_core: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, dC), each empty if not needed."""
    M, N = g.shape
    plan = _plan.choose_linear(g, u, K)
    if M == 0:
        return empty_for_none(g, g.new_empty(0, K) if need_x else None, zero_gradient(need_core, core))
    if plan.implementation == "reference":
        left, right, c = dense(u, N, rank, g.dtype), dense(vt, rank, K, g.dtype), core_matrix(core, rank)
        assert c is not None
        dx, dcore = reference.svd_linear_backward(g, h, left, c, right)
        values = reference.core_values(dcore, *core) if need_core and dcore is not None else None
        return empty_for_none(g, dx if need_x else None, values)
    run = _cpu.svd_linear_backward if plan.implementation == "cpp" else _plan.launchers("svd_linear").backward
    return empty_for_none(g, *run(unit_stride(g), contiguous(h), u, core, vt, K, rank, need_x, need_core))


def _fake(x: Tensor, out_features: int, rank: int, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], rank)


register(
    "svd_linear",
    "(Tensor x[M,K], Matrix u[N,R], Core core[R], Matrix vt[R,K], int out_features[N], int rank[R], Tensor? bias[N]) "
    "-> (Tensor y, Tensor h)",
    svd_linear,
    _fake,
)
register(
    "svd_linear_backward",
    "(Tensor g[M,N], Tensor? h[M,R]:g, Matrix u[N,R], Core core[R], Matrix vt[R,K], int in_features[K], int rank[R], "
    "bool need_x, bool need_core) "
    "-> (Tensor dx, Tensor dcore)",
    svd_linear_backward,
    backward_fake,
)
register_autograd("svd_linear", h=("core",))
