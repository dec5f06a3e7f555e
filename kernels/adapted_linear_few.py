"""Kernels for few tokens: decode a tile of W in registers, multiply, and add the low-rank term and the bias.

:mod:`adapted_linear` runs them in its form "few" and explains letters, matrices and how a sum is split;
:mod:`svd_linear` runs them for each of its factors.

The tile products of both directions are computed transposed, [columns of the result, tokens]: the decoded weight is
then the first operand of the tensor-core instruction, whose 64 rows on Hopper suit the weight rather than a few tokens.
"""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config, Override, choose
from .core import core_arguments, core_tile
from .dropout import Dropout, keep_tile
from .launch import arch_of, launch
from .matrix import (
    decode_tile,
    dot_words,
    load_levels,
    load_tile,
    load_words,
    matrix_argument,
    matrix_tile,
    scale_tile,
    weight_argument,
)  # fmt: skip
from .operands import Core, Matrix

# ---- helpers


@triton.jit
def shrink_tile(
    x_ptr, down, dropout, h_ptr, m, r0, M, K, R, stride_x, scale, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[m, r] = scale · Σ_k drop(x[m, k]) · down[r, k], float32, stored, for BLOCK_R ranks r from ``r0`` on.

    ``dropout`` may be None.
    """
    BLOCK_M: tl.constexpr = m.shape[0]
    r = r0 + tl.arange(0, BLOCK_R)
    levels = load_levels(down.levels)
    acc = tl.zeros((BLOCK_R, BLOCK_K) if BLOCK_M == 1 else (BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, m, k, stride_x, 1, M, K)
        w = matrix_tile(down, levels, r0, k0, R, K, BLOCK_R, BLOCK_K)
        if dropout is not None:  # noqa: SIM102
            if dropout.seed is not None:
                x = tl.where(keep_tile(dropout, m, k0, BLOCK_K), x, 0.0)
        if BLOCK_M == 1:
            acc = tl.fma(w.to(tl.float32), tl.broadcast_to(x.to(tl.float32), (BLOCK_R, BLOCK_K)), acc)
        else:
            acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
    h = tl.sum(acc, axis=1)[None, :] if BLOCK_M == 1 else acc
    at = m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(h_ptr + at, scale * h, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def shrink_both(
    x_ptr, branch, branch_h_ptr, branch_rank, down, dropout, h_ptr, m, tile, M, K, R, stride_x, scale,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """:func:`shrink_tile` for tile number ``tile`` of the ranks of a branch, then of an update; each may be absent."""
    # Nested because whether a factor is there is known when compiling, and the number of the tile is not.
    if branch.data is None:
        if down.data is not None:
            shrink_tile(x_ptr, down, dropout, h_ptr, m, tile * BLOCK_R, M, K, R, stride_x, scale, BLOCK_K, BLOCK_R)
    else:
        before = tl.cdiv(branch_rank, BLOCK_R)
        if tile < before:
            r0 = tile * BLOCK_R
            shrink_tile(x_ptr, branch, None, branch_h_ptr, m, r0, M, K, branch_rank, stride_x, 1.0, BLOCK_K, BLOCK_R)
        if down.data is not None:  # noqa: SIM102
            if tile >= before:
                r0 = (tile - before) * BLOCK_R
                shrink_tile(x_ptr, down, dropout, h_ptr, m, r0, M, K, R, stride_x, scale, BLOCK_K, BLOCK_R)


@triton.jit
def product_tile(
    x_ptr, weight, levels, core, core_size, m, column0, first, last, M, N, K, stride_x, CORE_ON_X: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Σ_k w[n, k] · x[m, k] over first <= k < last for the BLOCK_N rows n from ``column0`` on: float32 [n, m].

    TRANSPOSED: Σ_n w[n, k] · x[m, n] over first <= n < last for the BLOCK_K columns k from ``column0`` on: [k, m].
    ``first`` must be a multiple of the tile. CORE_ON_X replaces x by C x.
    """
    BLOCK_M: tl.constexpr = m.shape[0]
    INSIDE: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    OUTSIDE: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    # For a single token a scale multiplies the sum over a word.
    WORDS: tl.constexpr = BLOCK_M == 1 and weight.ALIGNED and weight.SCALES != "bytes" and not TRANSPOSED
    # Partial sums for one token, the tensor cores' accumulator for more.
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_K // 8 if WORDS else BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((OUTSIDE, BLOCK_M), tl.float32)
    size = N if TRANSPOSED else K
    for i0 in range(first, last, INSIDE):
        i = i0 + tl.arange(0, INSIDE)
        if CORE_ON_X:
            x = core_tile(x_ptr, m, i, M, size, stride_x, core, core_size, TRANSPOSED, DTYPE)
        else:
            x = load_tile(x_ptr, m, i, stride_x, 1, M, size)
        row0 = i0 if TRANSPOSED else column0
        k0 = column0 if TRANSPOSED else i0
        if WORDS:
            rows = row0 + tl.arange(0, BLOCK_N)
            row_mask = (rows < N)[:, None]
            rows = rows.to(tl.int64)[:, None]
            words = load_words(weight, rows, row_mask, k0, K, BLOCK_K)
            scale = scale_tile(weight, rows, row_mask, k0, K, BLOCK_K, 8)
            p = dot_words(levels, words, x)
            acc = tl.fma(p, tl.broadcast_to(scale, p.shape), acc)
        else:
            w = matrix_tile(weight, levels, row0, k0, N, K, BLOCK_N, BLOCK_K)
            if BLOCK_M == 1:
                x = tl.trans(x) if TRANSPOSED else x
                acc = tl.fma(w.to(tl.float32), tl.broadcast_to(x.to(tl.float32), (BLOCK_N, BLOCK_K)), acc)
            else:
                w = w.to(DTYPE)
                w = tl.trans(w) if TRANSPOSED else w
                acc = tl.dot(w, tl.trans(x.to(DTYPE)), acc, input_precision="ieee")
    if BLOCK_M == 1:
        acc = tl.sum(acc, axis=0 if TRANSPOSED else 1)[:, None]
    return acc


@triton.jit
def add_update(
    y, up, levels, h_ptr, core, core_size, m, row0, M, N, R, scale, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """y[n, m] + scale · Σ_r u[n, r] · (C h)[m, r] for the rows n of y from ``row0`` on; without C where core is None."""
    BLOCK_N: tl.constexpr = y.shape[0]
    n = row0 + tl.arange(0, BLOCK_N)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        if up.SCALES == "none":
            u = load_tile(up.data, n, r, up.stride_row, up.stride_column, N, R)
        if core is None:
            c = load_tile(h_ptr, m, r, R, 1, M, R) * scale
        else:
            c = core_tile(h_ptr, m, r, M, R, R, core, core_size, False, DTYPE) * scale
        # Registers cannot hold a decoded tile while the core is applied.
        if up.SCALES != "none":
            u = decode_tile(up, levels, row0, r0, N, R, BLOCK_N, BLOCK_R)
        if m.shape[0] == 1:
            y += tl.sum(u.to(tl.float32) * c, axis=1)[:, None]
        else:
            y = tl.dot(u.to(DTYPE), tl.trans(c.to(DTYPE)), y, input_precision="ieee")
    return y


@triton.jit
def update_gradient_tile(
    down, levels, gh_ptr, core, core_size, dropout, m, k0, M, K, R, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """drop(Σ_r (Cᵀ gh)[m, r] · d[r, k]) for BLOCK_K columns k from ``k0`` on: float32 [m, k].

    ``core`` and ``dropout`` may be None.
    """
    BLOCK_M: tl.constexpr = m.shape[0]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        if down.SCALES == "none":
            d = load_tile(down.data, r, k0 + tl.arange(0, BLOCK_K), down.stride_row, down.stride_column, R, K)
        if core is None:
            c = load_tile(gh_ptr, m, r, R, 1, M, R)
        else:
            c = core_tile(gh_ptr, m, r, M, R, R, core, core_size, True, DTYPE)
        if down.SCALES != "none":
            d = decode_tile(down, levels, r0, k0, R, K, BLOCK_R, BLOCK_K)
        if BLOCK_M == 1:
            acc += tl.sum(d.to(tl.float32) * tl.trans(c), axis=0)[None, :]
        else:
            acc = tl.dot(c.to(DTYPE), d.to(DTYPE), acc, input_precision="ieee")
    if dropout is not None:  # noqa: SIM102
        if dropout.seed is not None:
            acc = tl.where(keep_tile(dropout, m, k0, BLOCK_K), acc, 0.0)
    return acc


# ---- kernels


@triton.jit(do_not_specialize=["core_size"])
def _few_forward_kernel(
    x_ptr, weight, branch, branch_h_ptr, branch_rank, up, h_ptr, core, core_size, bias_ptr, y_ptr, M, N, K, R, stride_x,
    scale, CORE_ON_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = W x + U_b branch_h + bias + scale · U (C h), or y = W (C x) + bias where CORE_ON_X."""
    row0 = tl.program_id(0) * BLOCK_N
    n = row0 + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    levels = load_levels(weight.levels)
    y = product_tile(  # [BLOCK_N, BLOCK_M]
        x_ptr, weight, levels, core, core_size, m, row0, 0, K, M, N, K, stride_x, CORE_ON_X, dtype, BLOCK_N, BLOCK_K
    )
    if branch.data is not None:
        y = add_update(y, branch, None, branch_h_ptr, None, 0, m, row0, M, N, branch_rank, 1.0, dtype, BLOCK_R)
    if up.data is not None:
        # The factor has no table of its own where it shares the weight's.
        up_levels = levels if up.levels is None else load_levels(up.levels)
        y = add_update(y, up, up_levels, h_ptr, core, core_size, m, row0, M, N, R, scale, dtype, BLOCK_R)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, tl.trans(y).to(dtype), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["dropout", "core_size"])
def _few_backward_kernel(
    g_ptr, weight, branch, branch_gh_ptr, branch_rank, down, gh_ptr, core, core_size, dropout, dx_ptr, M, N, K, R,
    stride_g, scale, CORE_ON_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx = Wᵀ g + D_bᵀ branch_gh + scale · keep · Dᵀ (Cᵀ gh), or dx = Wᵀ (Cᵀ g) where CORE_ON_G (then g is float32).

    ``down`` is dense.
    """
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype = dx_ptr.dtype.element_ty if CORE_ON_G else g_ptr.dtype.element_ty
    levels = load_levels(weight.levels)
    dx = product_tile(
        g_ptr, weight, levels, core, core_size, m, k0, 0, N, M, N, K, stride_g, CORE_ON_G, dtype, BLOCK_N, BLOCK_K, True
    )
    dx = tl.trans(dx)  # [BLOCK_M, BLOCK_K]
    if branch.data is not None:
        dx += update_gradient_tile(
            branch, None, branch_gh_ptr, None, 0, None, m, k0, M, K, branch_rank, dtype, BLOCK_K, BLOCK_R
        )
    if down.data is not None:
        through = update_gradient_tile(
            down, None, gh_ptr, core, core_size, dropout, m, k0, M, K, R, dtype, BLOCK_K, BLOCK_R
        )
        dx += scale * through
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["dropout", "shrink_programs", "steps"])
def _few_split_kernel(
    x_ptr, weight, branch, branch_h_ptr, branch_rank, factor, dropout, h_ptr, parts_ptr, M, N, K, R, stride_x, scale,
    shrink_programs, steps, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_R: tl.constexpr,
):  # fmt: skip
    """parts[split, m, n] = Σ_k w[n, k] · x[m, k] over ``steps`` tiles of k a split; also h = scale · D drop(x), D_b x.

    TRANSPOSED: parts[split, m, k] = Σ_n w[n, k] · x[m, n]. The first ``shrink_programs`` programs make h, which needs
    all of x but no part of W, so it takes no launch of its own.
    """
    columns = K if TRANSPOSED else N
    size = N if TRANSPOSED else K
    program = tl.program_id(0)
    # Nested because the first condition is known when compiling and the second is not.
    if factor.data is not None or branch.data is not None:  # noqa: SIM102
        if program < shrink_programs:
            over = tl.cdiv(R, SHRINK_R) + tl.cdiv(branch_rank, SHRINK_R)
            hm = program // over * SHRINK_M + tl.arange(0, SHRINK_M)
            shrink_both(
                x_ptr, branch, branch_h_ptr, branch_rank, factor, dropout, h_ptr, hm, program % over, M, size, R,
                stride_x, scale, SHRINK_K, SHRINK_R,
            )  # fmt: skip
    if program >= shrink_programs:
        program -= shrink_programs
        OUTSIDE: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
        tiles = tl.cdiv(columns, OUTSIDE)
        tiles_m = tl.cdiv(M, BLOCK_M)
        column0 = program % tiles * OUTSIDE
        m = program // tiles % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        split = program // (tiles * tiles_m)
        # Whole tiles, so that Triton knows the alignment of its loads.
        length = steps * (BLOCK_N if TRANSPOSED else BLOCK_K)
        first = split * length
        dtype = x_ptr.dtype.element_ty
        levels = load_levels(weight.levels)
        last = tl.minimum(first + length, size)
        part = product_tile(
            x_ptr, weight, levels, None, 0, m, column0, first, last, M, N, K, stride_x, False, dtype, BLOCK_N,
            BLOCK_K, TRANSPOSED,
        )  # fmt: skip
        n = column0 + tl.arange(0, OUTSIDE)
        at = (split.to(tl.int64) * M + m)[:, None] * columns + n[None, :]
        tl.store(parts_ptr + at, tl.trans(part), mask=(m < M)[:, None] & (n < columns)[None, :])


# ---- launchers


class LowRank(NamedTuple):
    """A dense factor of a branch, [N, R] or transposed [R, K], and the float32 [M, R] that it is multiplied by."""

    factor: Tensor
    h: Tensor


def low_rank_arguments(through: LowRank | None, h: str = "branch_h_ptr") -> dict[str, Any]:
    """The arguments of a kernel for a branch."""
    if through is None:
        return {"branch": matrix_argument(None, 0), h: None, "branch_rank": 0}
    rank = through.h.shape[1]
    return {"branch": matrix_argument(Matrix(through.factor), 0), h: through.h, "branch_rank": rank}


def few_forward(
    x: Tensor, weight: Matrix, N: int, up: Matrix | None = None, h: Tensor | None = None, core: Core | None = None,
    bias: Tensor | None = None, scale: float = 1.0, core_on_x: bool = False, through: LowRank | None = None,
    config: Override = None,
) -> Tensor:  # fmt: skip
    """y = W x + U_b D_b x + bias + s · U C h in one kernel, or y = W C x + bias where ``core_on_x``.

    y is [M, N] in the dtype of x, ``through`` U_b with D_b x.
    """
    (M, K), R = x.shape, 0 if h is None else h.shape[1]
    shape = {"M": M, "N": N, "K": K, "R": R}
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    cfg = choose(config, "few_forward", arch_of(x.device), M, N, K, R, 8 * x.itemsize, weight.block_size)
    up_argument = matrix_argument(up, R)
    if up is not None and up.format == weight.format:
        up_argument = up_argument._replace(levels=None)
    launch(
        _few_forward_kernel,
        (triton.cdiv(N, cfg.BLOCK_N), triton.cdiv(M, cfg.BLOCK_M)),
        x.device,
        cfg,
        x_ptr=x,
        weight=weight_argument(weight, K),
        **low_rank_arguments(through),
        up=up_argument,
        h_ptr=None if up is None else h,
        **core_arguments(core, K if core_on_x else R),
        CORE_ON_X=core_on_x,
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        stride_x=x.stride(0),
        scale=float(scale),
        **shape,
    )
    return y


def few_backward(
    g: Tensor,
    weight: Matrix,
    K: int,
    dtype: torch.dtype,
    down: Matrix | None = None,
    gh: Tensor | None = None,
    core: Core | None = None,
    scale: float = 1.0,
    dropout: Dropout = Dropout(),  # noqa: B008
    core_on_g: bool = False,
    through: LowRank | None = None,
    config: Override = None,
) -> Tensor:
    """dx = Wᵀ g + D_bᵀ U_bᵀ g + s · drop(Dᵀ Cᵀ gh) in one kernel, or dx = Wᵀ Cᵀ g where ``core_on_g``.

    dx is [M, K] in ``dtype``. ``down`` is D [R, K], dense; ``through`` is D_b with U_bᵀ g.
    Products use the dtype of g, or ``dtype`` where ``core_on_g``.
    """
    (M, N), R = g.shape, 0 if gh is None else gh.shape[1]
    shape = {"M": M, "N": N, "K": K, "R": R}
    dx = torch.empty(M, K, dtype=dtype, device=g.device)
    bits = 8 * (dtype if core_on_g else g.dtype).itemsize
    cfg = choose(config, "few_backward", arch_of(g.device), M, N, K, R, bits, weight.block_size)
    launch(
        _few_backward_kernel,
        (triton.cdiv(K, cfg.BLOCK_K), triton.cdiv(M, cfg.BLOCK_M)),
        g.device,
        cfg,
        g_ptr=g,
        weight=weight_argument(weight, K),
        **low_rank_arguments(through, "branch_gh_ptr"),
        down=matrix_argument(down, K),
        gh_ptr=None if down is None else gh,
        **core_arguments(core, N if core_on_g else R),
        CORE_ON_G=core_on_g,
        dropout=dropout,
        dx_ptr=dx,
        stride_g=g.stride(0),
        scale=float(scale),
        **shape,
    )
    return dx


def few_split(
    x: Tensor, weight: Matrix, columns: int, factor: Matrix | None, h: Tensor, scale: float, dropout: Dropout,
    transposed: bool, through: LowRank | None, cfg: Config, config: Override,
) -> Tensor:  # fmt: skip
    """Partial sums of W x (Wᵀ x where ``transposed``), float32 [splits, M, columns]; and h = scale · drop(x) factorᵀ.

    Also the h of ``through``, of its factor [R_b, K].
    """
    (M, size), R = x.shape, h.shape[1]
    N, K = (size, columns) if transposed else (columns, size)
    shape = {"M": M, "N": N, "K": K, "R": R}
    outside, inside = (cfg.BLOCK_K, cfg.BLOCK_N) if transposed else (cfg.BLOCK_N, cfg.BLOCK_K)
    ranks = [R, 0 if through is None else through.h.shape[1]]
    block_size = factor.block_size if factor else 0
    shrink = choose(config, "shrink", arch_of(x.device), M, max(ranks), size, max(ranks), 8 * x.itemsize, block_size)
    shrink_programs = triton.cdiv(M, shrink.BLOCK_M) * sum(triton.cdiv(rank, shrink.BLOCK_R) for rank in ranks)
    steps = triton.cdiv(triton.cdiv(size, inside), cfg.SPLITS)
    parts = torch.empty(triton.cdiv(size, steps * inside), M, columns, dtype=torch.float32, device=x.device)
    launch(
        _few_split_kernel,
        (shrink_programs + triton.cdiv(columns, outside) * triton.cdiv(M, cfg.BLOCK_M) * parts.shape[0],),
        x.device,
        cfg,
        x_ptr=x,
        weight=weight_argument(weight, K),
        **low_rank_arguments(through),
        factor=matrix_argument(factor, size),
        TRANSPOSED=transposed,
        h_ptr=None if factor is None else h,
        dropout=dropout,
        parts_ptr=parts,
        stride_x=x.stride(0),
        scale=float(scale),
        shrink_programs=shrink_programs,
        steps=steps,
        **shape,
        SHRINK_M=shrink.BLOCK_M,
        SHRINK_K=shrink.BLOCK_K,
        SHRINK_R=shrink.BLOCK_R,
    )
    return parts
