"""The core C [R, R] between the factors: c = C h as a tile of other kernels, and the sums over tokens that use it.

A core is two tensors, ``(values, index)``; values are float32, bfloat16 or float16. The R × R matrix is never built.

none      no core: C is the identity.
diagonal  the banded core with d = 0; separate because it needs no loop.
banded    values 1-D, index None: the diagonals o = -d … d one after another, each with its entries (i, i + o) in order
          of i, R (2d + 1) - d (d + 1) values in all.
sparse    values [nnz] in the order (row, column), and index int32, the concatenation of row_start [R + 1],
          columns [nnz], column_start [R + 1], rows_by_column [nnz], order_by_column [nnz]: C by rows, and by columns
          with the position of each value.
dense     values [R, R], index None.
"""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FLAT, Config, Override, choose
from .dropout import Dropout, keep_tile
from .expert_rows import rows_of_expert
from .launch import arch_of, check_dtypes, constant, launch
from .matrix import load_tile
from .operands import Core


class CoreArgument(NamedTuple):
    """A core as one argument of a kernel; its size is a separate argument, because a kernel must not specialise on it.

    Attributes:
        values_ptr, index_ptr: the members of :class:`operands.Core`, or None. Triton's tuples have their own ``values``
            and ``type``, so these names are not used.
        KIND: "none", "diagonal", "banded", "sparse" or "dense".
    """

    values_ptr: Any
    index_ptr: Any
    KIND: Any


def core_arguments(core: Core | None, R: int) -> dict[str, Any]:
    """Kernel arguments for a core: ``core``, and ``core_size``, which is d for a banded core and nnz for a sparse one."""
    if core is None:
        return {"core": CoreArgument(None, None, constant("none")), "core_size": 0}
    values, index = core
    kind, size = "dense", 0
    if index is not None:
        kind, size = "sparse", (index.numel() - 2 * (R + 1)) // 3
        index = index.contiguous()
    elif values.dim() == 1:
        # The smaller root of R (2d + 1) - d (d + 1) = len(values).
        size = (2 * R - 1 - math.isqrt((2 * R - 1) ** 2 - 4 * (values.numel() - R))) // 2
        kind = "banded" if size else "diagonal"
    return {"core": CoreArgument(values.contiguous(), index, constant(kind)), "core_size": size}


def stacked_core_arguments(core: Core | None, R: int) -> dict[str, Any]:
    """As :func:`core_arguments`, for a stack: values [E, …] and one index; also ``core_entries``, the values of a core."""
    if core is None:
        return {**core_arguments(None, R), "core_entries": None}
    values = core.values.contiguous()
    return {**core_arguments(Core(values[0], core.index), R), "core_entries": values[0].numel()}


@triton.jit
def core_values(core, core_entries, e):
    """The values of core ``e`` (int64) of a stack with ``core_entries`` values each, or of a single core (None)."""
    if core.values_ptr is None or core_entries is None:
        values = core.values_ptr
    else:
        values = core.values_ptr + e * core_entries
    return values


@triton.jit
def core_tile(h_ptr, m, r, M, R, stride_hm, core, core_size, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr):
    """c[m, r] = Σ_j C[r, j] · h[m, j], or Σ_i C[i, r] · h[m, i] if TRANSPOSED; float32 [len(m), len(r)].

    Args:
        h_ptr: [M, R] of any float dtype, unit stride within a row.
        m, r: rows and columns of the tile; zero outside [M, R].
        core, core_size: see :func:`core_arguments`.
        DTYPE: type to which the operands of a dense core's product are rounded.

    Numerics: float32 throughout. With a dense core and more than one row in the tile the product runs on the tensor
    cores: h and C are rounded to DTYPE and accumulate in float32. The order in which a row of h is summed depends on
    C alone.
    """
    if core.KIND == "none":
        c = load_tile(h_ptr, m, r, stride_hm, 1, M, R).to(tl.float32)
    elif core.KIND == "diagonal":
        value = tl.load(core.values_ptr + r, mask=r < R, other=0.0).to(tl.float32)
        c = load_tile(h_ptr, m, r, stride_hm, 1, M, R).to(tl.float32) * value[None, :]
    else:
        c = tl.zeros((m.shape[0], r.shape[0]), tl.float32)
        if core.KIND == "banded":
            start = tl.full((), 0, tl.int64)  # of the diagonal in values
            for o in range(-core_size, core_size + 1):
                other = r - o if TRANSPOSED else r + o
                inside = (r < R) & (other >= 0) & (other < R)
                i = other if TRANSPOSED else r
                value = tl.load(core.values_ptr + (start + tl.minimum(o, 0)) + i, mask=inside, other=0.0).to(tl.float32)
                h = load_tile(h_ptr, m, tl.where(inside, other, R), stride_hm, 1, M, R).to(tl.float32)
                c = tl.fma(h, tl.broadcast_to(value[None, :], (m.shape[0], r.shape[0])), c)
                start += R - tl.abs(o)
        elif core.KIND == "sparse":
            nnz = tl.cast(core_size, tl.int64)
            starts = core.index_ptr + (R + 1 + nnz if TRANSPOSED else 0)
            others = starts + R + 1
            first = tl.load(starts + r, mask=r < R, other=0)
            last = tl.load(starts + r + 1, mask=r < R, other=0)
            for entry in range(tl.max(last - first)):
                at = first + entry
                inside = at < last
                other = tl.load(others + at, mask=inside, other=R)
                if TRANSPOSED:
                    at = tl.load(others + nnz + at, mask=inside, other=0)
                value = tl.load(core.values_ptr + at, mask=inside, other=0.0).to(tl.float32)
                h = load_tile(h_ptr, m, other, stride_hm, 1, M, R).to(tl.float32)
                c = tl.fma(h, tl.broadcast_to(value[None, :], (m.shape[0], r.shape[0])), c)
        else:
            # Limit a slice of C to about 1024 elements, so that it fits in registers; a product needs 16 rows of it.
            COLUMNS: tl.constexpr = r.shape[0]
            LEAST: tl.constexpr = 1 if m.shape[0] == 1 else 16
            THIN: tl.constexpr = 1024 // COLUMNS if 1024 // COLUMNS > LEAST else LEAST
            STEP: tl.constexpr = COLUMNS if COLUMNS < THIN else THIN
            stride_s = R if TRANSPOSED else 1
            stride_r = 1 if TRANSPOSED else R
            for s0 in range(0, R, STEP):
                s = s0 + tl.arange(0, STEP)
                h = load_tile(h_ptr, m, s, stride_hm, 1, M, R)
                value = load_tile(core.values_ptr, s, r, stride_s, stride_r, R, R)
                if m.shape[0] == 1:
                    c += tl.sum(value.to(tl.float32) * tl.trans(h.to(tl.float32)), axis=0)[None, :]
                else:
                    c = tl.dot(h.to(DTYPE), value.to(DTYPE), c, input_precision="ieee")
    return c


# ---- sums over tokens


@triton.jit
def _rows_of_split(offsets_ptr, tokens, M):
    """(first row, end) of program 2's split: ``tokens`` rows, or with offsets the rows of an expert."""
    if offsets_ptr is None:
        first = tl.program_id(2) * tokens
        end = tl.minimum(first + tokens, M)
    else:
        first, end = rows_of_expert(offsets_ptr, tl.program_id(2), M)
    return first, end


@triton.jit(do_not_specialize=["dropout", "core_size"])
def _token_sum_kernel(
    h_ptr, x_ptr, offsets_ptr, core, core_size, core_entries, dropout, out_ptr, M, N, R, stride_x, stride_or, stride_on,
    stride_split, tokens, scale, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split, r, n] = scale · Σ_m (C h)[m, r] · drop(x[m, n]) over the ``tokens`` tokens of the split.

    With offsets a split is an expert: the sum is over its rows, and C is its core.
    """
    column0 = tl.program_id(0) * BLOCK_N
    n = column0 + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    first, end = _rows_of_split(offsets_ptr, tokens, M)
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for m0 in range(first, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        h = core_tile(
            h_ptr, m, r, end, R, R, CoreArgument(core_values(core, core_entries, split), core.index_ptr, core.KIND),
            core_size, TRANSPOSED, dtype,
        )  # fmt: skip
        x = load_tile(x_ptr, m, n, stride_x, 1, end, N)
        if dropout.seed is not None:
            x = tl.where(keep_tile(dropout, m, column0, BLOCK_N), x, 0.0)
        acc = tl.dot(tl.trans(h.to(dtype)), x, acc, input_precision="ieee")
    at = r.to(tl.int64)[:, None] * stride_or + n.to(tl.int64)[None, :] * stride_on
    out = (scale * acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + split * stride_split + at, out, mask=(r < R)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["core_size", "steps"])
def _core_gradient_kernel(
    gh_ptr, h_ptr, offsets_ptr, index_ptr, core_size, out_ptr, M, R, stride_split, tokens, steps, scale,
    SPARSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split, e] = scale · Σ_m gh[m, i] · h[m, j] over the rows of the split, where entry e of C is (i, j).

    With offsets a split is an expert.
    A program takes BLOCK_R entries: consecutive ones of a sparse core, entries of one diagonal of a banded one.
    """
    entry = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if SPARSE:
        at = entry.to(tl.int64)
        inside = entry < core_size
        # Find the row: row_start[i] <= entry < row_start[high]; bisect until high = i + 1, which also skips empty rows.
        i = tl.zeros((BLOCK_R,), tl.int32)
        high = i + R
        for _ in range(steps):
            middle = (i + high) // 2
            above = tl.load(index_ptr + middle) <= entry
            i = tl.where(above, middle, i)
            high = tl.where(above, high, middle)
        j = tl.load(index_ptr + R + 1 + at, mask=inside, other=0)
    else:
        o = tl.program_id(1) - core_size
        i = entry
        j = entry + o
        inside = (i < R) & (j >= 0) & (j < R)
        # The diagonals p before o have length R - |p|: p = -d … o - 1, of which p = 0 … o - 1 lie above the main one.
        d, size = tl.cast(core_size, tl.int64), tl.cast(R, tl.int64)
        below, above = tl.minimum(o, 0), tl.maximum(o, 0)
        start = (d + o) * size - (d * (d + 1) - below * (below - 1) + above * (above - 1)) // 2
        at = start + below + i
    first, end = _rows_of_split(offsets_ptr, tokens, M)
    # One partial sum for each token of a tile and entry.
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for m0 in range(first, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        gh = load_tile(gh_ptr, m, tl.where(inside, i, R), R, 1, end, R).to(tl.float32)
        h = load_tile(h_ptr, m, tl.where(inside, j, R), R, 1, end, R).to(tl.float32)
        acc = tl.fma(gh, h, acc)
    out = (scale * tl.sum(acc, axis=0)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.program_id(2).to(tl.int64) * stride_split + at, out, mask=inside)


@triton.jit
def _sum_splits_kernel(parts_ptr, out_ptr, numel, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ_split parts[split, i], in the order of the splits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(parts_ptr + split * tl.cast(numel, tl.int64) + at, mask=at < numel, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < numel)


# ---- launchers


def token_sum(
    h: Tensor,
    x: Tensor,
    out: Tensor,
    stride_or: int,
    stride_on: int,
    scale: float = 1.0,
    dropout: Dropout = Dropout(),  # noqa: B008
    core: Core | None = None,
    transposed: bool = False,
    config: Override = None,
    offsets: Tensor | None = None,
) -> None:
    """out[r, n] = scale · Σ_m (C h)[m, r] · drop(x[m, n]), or with Cᵀ for C where ``transposed``.

    With offsets, see :mod:`expert_rows`, there is such a sum for each expert, over its rows; 0 without rows.

    Args:
        h: [M, R] of any float dtype, contiguous.
        x: [M, N], any row stride.
        out: R · N elements of any float dtype, element [r, n] at r · stride_or + n · stride_on; with offsets E times as
            many, an expert's after another's.
        dropout: applied to x.
        core: as described in this module, or None; with offsets a stack of them, values [E, …] and one index.
        offsets: int32 [E + 1], or None.

    Numerics: c is rounded to the dtype of x as an operand of the product, which accumulates in float32. Each program
    adds
    its tokens in order, and a second kernel adds the splits in order: the bits are the same in every run.
    """
    (M, N), R = x.shape, h.shape[1]
    cfg = choose(config, "token_sum", arch_of(x.device), M, N, 0, R, 8 * x.itemsize)
    tokens, parts, splits = _split_tokens(M, cfg, out, offsets)
    strides = {"stride_x": x.stride(0), "stride_or": stride_or, "stride_on": stride_on, "stride_split": R * N}
    launch(
        _token_sum_kernel,
        (triton.cdiv(N, cfg.BLOCK_N), triton.cdiv(R, cfg.BLOCK_R), splits),
        x.device,
        cfg,
        h_ptr=h,
        x_ptr=x,
        offsets_ptr=offsets,
        **_core_arguments(core, R, offsets),
        TRANSPOSED=core is not None and transposed,
        dropout=dropout,
        out_ptr=parts,
        tokens=tokens,
        scale=float(scale),
        M=M,
        N=N,
        R=R,
        **strides,
    )
    _sum_splits(parts, out)


def core_gradient(
    gh: Tensor, h: Tensor, core: Core, scale: float = 1.0, config: Override = None, offsets: Tensor | None = None
) -> Tensor:
    """dC[i, j] = scale · Σ_m gh[m, i] · h[m, j] on the pattern of C, in the layout and dtype of its values.

    Args:
        gh, h: [M, R], float32, bfloat16 or float16, contiguous; M >= 1.
        core, offsets: as in :func:`token_sum`.

    Raises:
        TypeError: bfloat16 in the interpreter.

    Numerics: float32 products and sums, rounded once to the dtype of the values; with a dense core gh is first rounded
    to the dtype of h. Tokens are summed in the order of :func:`token_sum`.
    """
    check_dtypes(gh, h, core[0])
    M, R = h.shape
    out = torch.empty(core[0].shape, dtype=core[0].dtype, device=h.device)
    arguments = _core_arguments(core, R, offsets)
    kind, size = arguments["core"].KIND.value, arguments["core_size"]
    if kind == "dense":
        token_sum(gh, h, out, R, 1, scale, config=config, offsets=offsets)
        return out
    entries = out.shape[-1]
    cfg = choose(config, "core_gradient", arch_of(h.device), M, entries, 0, R, 8 * h.itemsize)
    tokens, parts, splits = _split_tokens(M, cfg, out, offsets)
    sparse = kind == "sparse"
    launch(
        _core_gradient_kernel,
        (triton.cdiv(size if sparse else R, cfg.BLOCK_R), 1 if sparse else 2 * size + 1, splits),
        h.device,
        cfg,
        gh_ptr=gh,
        h_ptr=h,
        offsets_ptr=offsets,
        index_ptr=arguments["core"].index_ptr,
        core_size=size,
        out_ptr=parts,
        M=M,
        R=R,
        stride_split=entries,
        tokens=tokens,
        steps=R.bit_length(),
        scale=float(scale),
        SPARSE=sparse,
    )
    _sum_splits(parts, out)
    return out


def _core_arguments(core: Core | None, R: int, offsets: Tensor | None) -> dict[str, Any]:
    if offsets is not None:
        return stacked_core_arguments(core, R)
    return {**core_arguments(core, R), "core_entries": None}


def _split_tokens(M: int, cfg: Config, out: Tensor, offsets: Tensor | None) -> tuple[int, Tensor, int]:
    """The tokens of a split, the tensor for the sums, and the number of splits.

    The tensor is ``out`` itself if there is one split, or if each split is an expert.
    """
    if offsets is not None:
        return 0, out, offsets.numel() - 1
    tokens = cfg.BLOCK_M * triton.cdiv(triton.cdiv(M, cfg.BLOCK_M), cfg.SPLITS)
    splits = triton.cdiv(M, tokens)
    if splits == 1:
        return tokens, out, 1
    return tokens, torch.empty(splits, out.numel(), dtype=torch.float32, device=out.device), splits


def _sum_splits(parts: Tensor, out: Tensor) -> None:
    if parts is out:
        return
    launch(
        _sum_splits_kernel,
        (triton.cdiv(out.numel(), 1024),),
        out.device,
        FLAT,
        parts_ptr=parts,
        out_ptr=out,
        numel=out.numel(),
        SPLITS=parts.shape[0],
        BLOCK=1024,
    )
