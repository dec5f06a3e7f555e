"""A matrix [rows, columns] as one argument of a kernel, and its tiles, which are decoded in registers if it is quantised.

w[n, k] = levels[nibble(n·K + k)] · scale[(n·K + k) // block_size]: blocks run over the row-major flattened weight, and
byte j holds element 2j in its high nibble. In int8 signed bytes stand for the levels. A scale is ``absmax`` in
float32; under double quantisation absmax is uint8 and absmax[b] = dynamic[index[b]] · absmax2[b // 256] + offset, product
and sum each rounded to float32; an exponent means 2^(exponent[b] - 127).
"""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtypes, constant, interpreted
from .operands import FORMATS, Core, Matrix


class MatrixArgument(NamedTuple):
    """A matrix as one argument of a kernel. Members that do not apply are None; without a matrix ``data`` is None.

    Attributes:
        data: pointer to the elements, or to packed bytes.
        scales, absmax2, offset: pointers to the scales of the blocks and to the second level of these scales.
        levels: pointer to the values of the 16 nibbles; None for bytes.
        dynamic: pointer to the 256 values of a quantised scale.
        stride_row, stride_column: of a dense matrix.
        SCALES: "none" for a dense matrix; "absmax" or "exponents" for nibbles; "bytes" for signed bytes with absmax.
        BLOCK: weights that share a scale.
        ALIGNED: rows start with a block and the bytes at a multiple of 16, so that rows are read in 16-byte pieces.
    """

    data: Any
    scales: Any
    absmax2: Any
    offset: Any
    levels: Any
    dynamic: Any
    stride_row: Any
    stride_column: Any
    SCALES: Any
    BLOCK: Any
    ALIGNED: Any


def matrix_argument(matrix: Matrix | None, columns: int) -> MatrixArgument:
    """The kernel argument for a matrix with this many columns, or for a stack of them; None for no matrix.

    A dense matrix may have any strides.
    """
    if matrix is None or matrix.format is None:
        data, (row, column) = (None, (0, 0)) if matrix is None else (matrix.data, matrix.data.stride()[-2:])
        dense = (constant("none"), constant(0), constant(False))
        return MatrixArgument(data, None, None, None, None, None, row, column, *dense)
    data, block_size, device = matrix.data, matrix.block_size, matrix.data.device
    scales, absmax2, offset = (*matrix.scales, None, None)[:3]
    return MatrixArgument(
        data,
        scales,
        absmax2,
        offset,
        None if matrix.format.bits == 8 else levels_table(matrix.format.name, device),
        None if absmax2 is None else dynamic_table(device),
        0,
        0,
        constant("bytes" if matrix.format.bits == 8 else "exponents" if matrix.format.exponents else "absmax"),
        constant(block_size),
        constant(columns % block_size == 0 and data.data_ptr() % 16 == 0),
    )


@functools.cache
def levels_table(name: str, device: torch.device) -> Tensor:
    """The 16 levels of a 4-bit format, float32, cached per device."""
    return torch.tensor(FORMATS[name].levels, dtype=torch.float32, device=device)


@functools.cache
def dynamic_table(device: torch.device) -> Tensor:
    """The 256 levels of the dynamic map of quantised scales, float32, cached per device."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        # The mantissa is rounded to float32 before it is scaled in double precision; this order decides the last bit.
        midpoints = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += midpoints + [-m for m in midpoints]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def unit_rows(x: Tensor) -> Tensor:
    """x, copied unless each row is contiguous: kernels take any row stride, but no column stride."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def weight_argument(weight: Matrix, columns: int) -> MatrixArgument:
    """Call :func:`matrix_argument` for a weight, after making its rows contiguous."""
    return matrix_argument(weight._replace(data=unit_rows(weight.data)) if weight.format is None else weight, columns)


def check_operands(*operands: Tensor | Matrix | Core | None) -> None:
    """Call :func:`launch.check_dtypes` on the data of matrices and the values of cores."""
    check_dtypes(*(operand[0] if isinstance(operand, tuple) else operand for operand in operands))


# ---- decoding in registers

LANE = tl.constexpr("mov.u32 $0, %laneid;")
# Width 16: the lanes of a half warp share the upper bit of the lane, 0x10 in the second byte; 0x1f lets every lane
# answer.
LOOK_UP = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;")
# The interpreter cannot run assembly, so it gathers.
SHUFFLE = tl.constexpr(not interpreted())


@triton.jit
def load_levels(levels_ptr):
    """The levels of a matrix for :func:`level_of`: lane i of a warp has level i % 16. None for no nibbles."""
    if levels_ptr is None:
        levels = levels_ptr
    elif SHUFFLE:
        lane = tl.inline_asm_elementwise(LANE, "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        levels = tl.load(levels_ptr + (lane & 15))
    else:
        levels = tl.load(levels_ptr + tl.arange(0, 16))[None, :]
    return levels


@triton.jit
def level_of(levels, index):
    """levels[index % 16] for an int32 tile [rows, columns], one warp shuffle for each level.

    A shuffle of width 16 reads only the low four bits of its index, so a nibble needs no mask. docs/gpu-decoding.md
    compares this with other ways.
    """
    if SHUFFLE:
        level = tl.inline_asm_elementwise(LOOK_UP, "=f,f,r", [levels, index], dtype=tl.float32, is_pure=True, pack=1)
    else:
        level = tl.gather(tl.broadcast_to(levels, (index.shape[0], 16)), index & 15, 1)
    return level


@triton.jit
def levels_of_words(levels, words):
    """Levels of packed int32 words [rows, columns], eight in each: float32 [rows, columns, 2, 2, 2] in their order.

    A word is little-endian and the high nibble of a byte comes first: element i sits at bit 4 (i ^ 1).
    """
    # The index after the words is [i // 4, i // 2 % 2, i % 2]: a join adds the last axis.
    i0 = tl.join(level_of(levels, words >> 4), level_of(levels, words >> 20))
    i1 = tl.join(level_of(levels, words), level_of(levels, words >> 16))
    i2 = tl.join(level_of(levels, words >> 12), level_of(levels, words >> 28))
    i3 = tl.join(level_of(levels, words >> 8), level_of(levels, words >> 24))
    return tl.join(tl.join(i0, i2), tl.join(i1, i3))


@triton.jit
def block_scale(matrix, block, mask):
    """The scales of the blocks ``block`` (int64 tile), float32; outside ``mask`` finite but meaningless."""
    if matrix.SCALES == "exponents":
        scale = exponent_scale(tl.load(matrix.scales + block, mask=mask, other=0))
    elif matrix.absmax2 is None:
        scale = tl.load(matrix.scales + block, mask=mask, other=0.0)
    else:
        index = tl.load(matrix.scales + block, mask=mask, other=0).to(tl.int32)
        absmax2 = tl.load(matrix.absmax2 + (block >> 8), mask=mask, other=0.0)
        scale = tl.load(matrix.dynamic + index) * absmax2 + tl.load(matrix.offset)
    return scale


@triton.jit
def exponent_scale(byte):
    """2^(byte - 127) in float32; NaN for 255."""
    exponent = byte.to(tl.int32)
    # 2^-127 is the subnormal with the top bit of the fraction set; with all exponent bits set that bit makes a NaN.
    half = ((exponent == 0) | (exponent == 255)).to(tl.int32)
    return (exponent << 23 | half << 22).to(tl.float32, bitcast=True)


@triton.jit
def load_words(matrix, rows, row_mask, column0, K, COLUMNS: tl.constexpr):
    """Packed weights of ``rows`` [ROWS, 1] from ``column0`` on: int32 [ROWS, COLUMNS // 8], eight weights in each.

    The matrix must be ALIGNED.
    """
    # Counted in whole blocks, so that Triton sees that sixteen bytes never straddle the edge of a mask.
    words_of_row = K // matrix.BLOCK * (matrix.BLOCK // 8)
    word = column0 // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    words_ptr = matrix.data.to(tl.pointer_type(tl.int32))
    return tl.load(words_ptr + rows * words_of_row + word, mask=row_mask & (word < words_of_row), other=0)


@triton.jit
def load_signed(matrix, at, mask):
    """Signed bytes at positions ``at``, float32."""
    return tl.load(matrix.data + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def scale_tile(matrix, rows, row_mask, column0, K, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """The scale of every STEP-th column, for COLUMNS columns from ``column0``: float32 [ROWS, COLUMNS // STEP] or [ROWS, 1].

    One load for each row and block; K is a multiple of BLOCK. STEP must divide BLOCK.
    """
    GROUPS: tl.constexpr = COLUMNS // matrix.BLOCK if COLUMNS > matrix.BLOCK else 1
    groups_of_row = K // matrix.BLOCK
    group = column0 // matrix.BLOCK + tl.arange(0, GROUPS)[None, :]
    scale = block_scale(matrix, rows * groups_of_row + group, row_mask & (group < groups_of_row))
    if GROUPS > 1:
        ROWS: tl.constexpr = rows.shape[0]
        scale = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, matrix.BLOCK // STEP))
        scale = tl.reshape(scale, (ROWS, COLUMNS // STEP))
    return scale


@triton.jit
def _elements_of_words(tile):
    """The eight elements in the last three axes, in order."""
    even, odd = tl.split(tile)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def dot_words(levels, words, x):
    """p[n, j] = Σ_i level[n, 8j + i] · x[8j + i] for words [rows, columns] and x [1, 8 · columns]: float32.

    The caller multiplies by the scale of the block, once for eight weights instead of once for each.
    """
    ROWS: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1]
    x = tl.reshape(x, (1, COLUMNS, 2, 2, 2)).to(tl.float32)
    x = tl.broadcast_to(x, (ROWS, COLUMNS, 2, 2, 2))
    # Join first, so that the compiler converts x to the layout of the words as a whole and not in eight pieces.
    w, x = tl.split(tl.join(levels_of_words(levels, words), x))
    w0, w1, w2, w3, w4, w5, w6, w7 = _elements_of_words(w)
    x0, x1, x2, x3, x4, x5, x6, x7 = _elements_of_words(x)
    p = tl.fma(w1, x1, w0 * x0)
    p = tl.fma(w3, x3, tl.fma(w2, x2, p))
    p = tl.fma(w5, x5, tl.fma(w4, x4, p))
    return tl.fma(w7, x7, tl.fma(w6, x6, p))


@triton.jit
def decode_tile(matrix, levels, row0, column0, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """w[row0 : row0 + ROWS, column0 : column0 + COLUMNS] in float32; outside [N, K] finite but meaningless.

    If the matrix is ALIGNED, each byte is loaded once, and each scale once per row and block. ``column0`` must be a
    multiple of COLUMNS.
    """
    rows = row0 + tl.arange(0, ROWS)
    row_mask = (rows < N)[:, None]
    rows = rows.to(tl.int64)[:, None]
    if matrix.ALIGNED:
        if matrix.SCALES == "bytes":
            # Counted in whole blocks, as in load_words.
            row_bytes = K // matrix.BLOCK * matrix.BLOCK
            columns = column0 + tl.arange(0, COLUMNS)[None, :]
            levels_of_tile = load_signed(matrix, rows * row_bytes + columns, row_mask & (columns < row_bytes))
        else:
            words = load_words(matrix, rows, row_mask, column0, K, COLUMNS)
            levels_of_tile = tl.reshape(levels_of_words(levels, words), (ROWS, COLUMNS))
        w = levels_of_tile * scale_tile(matrix, rows, row_mask, column0, K, COLUMNS, 1)
    else:
        columns = column0 + tl.arange(0, COLUMNS)[None, :]
        flat = rows * K + columns
        mask = row_mask & (columns < K)
        if matrix.SCALES == "bytes":
            levels_of_tile = load_signed(matrix, flat, mask)
        else:
            byte = tl.load(matrix.data + (flat >> 1), mask=mask, other=0).to(tl.int32)
            levels_of_tile = level_of(levels, byte >> (4 - 4 * (flat & 1).to(tl.int32)))
        w = levels_of_tile * block_scale(matrix, flat // matrix.BLOCK, mask)
    return w


# ---- a matrix of a stack [E, N, K]

# A kernel shifts a stack to its matrix e where it passes it on:
#
#     MatrixArgument(
#         stack_data(w, e, N, K), stack_scales(w.scales, w, e, N, K, 1), stack_scales(w.absmax2, w, e, N, K, 256),
#         shifted(w.offset, e), w.levels, w.dynamic, w.stride_row, w.stride_column, w.SCALES, w.BLOCK, w.ALIGNED,
#     )
#
# It does so in place, because Triton turns the constants of a tuple into tensors where a function returns the tuple.


@triton.jit
def shifted(ptr, by):
    """ptr + by; None without a pointer."""
    if ptr is None:  # noqa: SIM108
        moved = ptr
    else:
        moved = ptr + by
    return moved


@triton.jit
def stack_data(stack, e, N, K):
    """The data of matrix ``e`` (int64) of a stack [E, N, K]; a dense stack is contiguous but for its last two axes."""
    if stack.SCALES == "none":
        by = e * N * K
    elif stack.ALIGNED:
        # Counted in whole blocks, so that Triton sees the alignment.
        by = e * N * (K // stack.BLOCK * (stack.BLOCK if stack.SCALES == "bytes" else stack.BLOCK // 2))
    elif stack.SCALES == "bytes":
        by = tl.cast(N, tl.int64) * K * e
    else:
        by = (tl.cast(N, tl.int64) * K + 1) // 2 * e
    return shifted(stack.data, by)


@triton.jit
def stack_scales(scales, stack, e, N, K, GROUP: tl.constexpr):
    """The scales of matrix ``e`` of a stack, where one of ``scales`` belongs to GROUP blocks; None if there are none."""
    if scales is None:
        moved = scales
    else:
        moved = scales + e * tl.cdiv(tl.cast(N, tl.int64) * K, stack.BLOCK * GROUP)
    return moved


# ---- tiles of any matrix


@triton.jit
def load_tile(ptr, rows, columns, stride_row, stride_column, row_count, column_count):
    """A tile [len(rows), len(columns)] of a strided matrix, zero outside the matrix."""
    at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + at, mask=(rows < row_count)[:, None] & (columns < column_count)[None, :], other=0.0)


@triton.jit
def matrix_tile(matrix, levels, row0, column0, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a matrix [N, K]: in its own dtype if dense, otherwise in float32; finite outside the matrix.

    ``levels`` come from :func:`load_levels`; ``column0`` as in :func:`decode_tile`.
    """
    if matrix.SCALES == "none":
        rows = row0 + tl.arange(0, ROWS)
        columns = column0 + tl.arange(0, COLUMNS)
        tile = load_tile(matrix.data, rows, columns, matrix.stride_row, matrix.stride_column, N, K)
    else:
        tile = decode_tile(matrix, levels, row0, column0, N, K, ROWS, COLUMNS)
    return tile
