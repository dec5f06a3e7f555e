"""What the kernels of several modules share: tiles of a matrix and of h, the dropout mask, and how launchers pass them."""

# mypy: allow-untyped-defs
# The parameters of a kernel have types of Triton.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .nf4 import decode_tile, load_levels


@triton.jit
def keep_tile(seed_ptr, threshold, rows, column0, COLUMNS: tl.constexpr):
    """keep[m, k] = philox(key=seed, counter=(k // 4, m, 0, 0))[k % 4] >= threshold, a tile [len(rows), COLUMNS].

    ``column0`` must be a multiple of four: all four words of a counter are used.
    """
    quad = (column0 // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    row = rows.to(tl.int32)[:, None]
    zero = tl.zeros((rows.shape[0], COLUMNS // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), zero + quad, zero + row, zero, zero, 10)
    # Two joins put word 2a + b at [..., a, b].
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], COLUMNS))
    return words >= threshold.to(tl.uint32)


@triton.jit
def load_tile(ptr, rows, columns, stride_row, stride_column, row_count, column_count):
    """[len(rows), len(columns)] of a strided matrix, zero outside of it."""
    at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + at, mask=(rows < row_count)[:, None] & (columns < column_count)[None, :], other=0.0)


@triton.jit
def matrix_tile(
    ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    levels,
    dynamic_ptr,
    row0,
    column0,
    row_count,
    column_count,
    stride_row,
    stride_column,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of a matrix [ROWS, COLUMNS]: NF4 in float32, dense in its own dtype. Outside of the matrix it is finite.

    ``levels`` are those of :func:`nf4.load_levels`; ALIGNED and ``column0`` as in :func:`nf4.decode_tile`, where the
    matrix has the strides of its shape. BLOCK_SIZE is 0 where it is dense.
    """
    if BLOCK_SIZE == 0:
        rows = row0 + tl.arange(0, ROWS)
        columns = column0 + tl.arange(0, COLUMNS)
        tile = load_tile(ptr, rows, columns, stride_row, stride_column, row_count, column_count)
    else:
        tile = decode_tile(
            ptr,
            absmax_ptr,
            absmax2_ptr,
            offset_ptr,
            levels,
            dynamic_ptr,
            row0,
            column0,
            row_count,
            column_count,
            BLOCK_SIZE,
            ALIGNED,
            ROWS,
            COLUMNS,
        )
    return tile


@triton.jit
def shrink_tile(
    x_ptr,
    factor_ptr,
    factor_absmax_ptr,
    factor_absmax2_ptr,
    factor_offset_ptr,
    levels_ptr,
    dynamic_ptr,
    seed_ptr,
    h_ptr,
    m,
    r0,
    M,
    K,
    R,
    stride_xm,
    stride_fr,
    stride_fk,
    scale,
    threshold,
    FACTOR_BLOCK: tl.constexpr,
    FACTOR_ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h[m, r] = scale · Σ_k drop(x[m, k]) · factor[r, k], float32, written, for BLOCK_R ranks r from ``r0`` on."""
    BLOCK_M: tl.constexpr = m.shape[0]
    r = r0 + tl.arange(0, BLOCK_R)
    levels = load_levels(levels_ptr)
    acc = tl.zeros((BLOCK_R, BLOCK_K) if BLOCK_M == 1 else (BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, m, k, stride_xm, 1, M, K)
        factor = matrix_tile(
            factor_ptr,
            factor_absmax_ptr,
            factor_absmax2_ptr,
            factor_offset_ptr,
            levels,
            dynamic_ptr,
            r0,
            k0,
            R,
            K,
            stride_fr,
            stride_fk,
            FACTOR_BLOCK,
            FACTOR_ALIGNED,
            BLOCK_R,
            BLOCK_K,
        )
        if seed_ptr is not None:
            x = tl.where(keep_tile(seed_ptr, threshold, m, k0, BLOCK_K), x, 0.0)
        if BLOCK_M == 1:
            acc = tl.fma(factor.to(tl.float32), tl.broadcast_to(x.to(tl.float32), (BLOCK_R, BLOCK_K)), acc)
        else:
            acc = tl.dot(x, tl.trans(factor.to(x.dtype)), acc, input_precision="ieee")
    h = tl.sum(acc, axis=1)[None, :] if BLOCK_M == 1 else acc
    at = m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(h_ptr + at, scale * h, mask=(m < M)[:, None] & (r < R)[None, :])


def drop_arguments(dropout: float = 0.0, seed: Tensor | None = None) -> dict[str, Any]:
    """The mask's arguments of a kernel; the threshold is the smallest 32-bit word that is kept."""
    if dropout == 0:
        return {"seed_ptr": None, "threshold": 0}
    return {"seed_ptr": seed, "threshold": min(round(dropout * 2**32), 2**32 - 1)}


def unit_rows(x: Tensor) -> Tensor:
    """x, copied unless the elements of a row are neighbours: kernels take any row stride, but no column stride."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
