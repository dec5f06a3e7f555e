"""Tiles of a matrix [rows, columns], decoded in registers where it is NF4.

w[n, k] = code[nibble(n·K + k)] · absmax[(n·K + k) // block_size]: blocks run over the row-major flattened weight, byte j
holds element 2j in its high nibble. ``absmax`` is float32, or under double quantisation uint8 with
absmax[b] = dynamic[index[b]] · absmax2[b // 256] + offset, product and sum each rounded to float32.
"""

# mypy: allow-untyped-defs
# The parameters of a kernel have types of Triton.

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted
from .operands import NF4


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 NF4 levels and the 256 levels of the dynamic map of the scales, float32, made once per device."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        # The mantissa is rounded to float32 before it is scaled in double precision: the order fixes the last bit.
        midpoints = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += midpoints + [-m for m in midpoints]
    return (
        torch.tensor(NF4.levels, dtype=torch.float32, device=device),
        torch.tensor(sorted(values), dtype=torch.float32, device=device),
    )


# ---- decoding in registers

LANE = tl.constexpr("mov.u32 $0, %laneid;")
# Width 16: the lanes of a half share the upper bit of the lane, 0x10 in the second byte; 0x1f lets every lane answer.
LOOK_UP = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;")
# The interpreter knows no assembly and gathers instead.
SHUFFLE = tl.constexpr(not interpreted())


@triton.jit
def load_levels(levels_ptr):
    """The 16 NF4 levels for :func:`level_of`: lane i of a warp has level i % 16, each in one register. None for None."""
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
    """levels[index % 16] for an int32 tile [rows, columns], by one warp shuffle a level.

    A shuffle of width 16 reads the low four bits of its index and nothing else, so a nibble needs no mask. Against other
    ways see docs/gpu-decoding.md.
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
def block_scale(absmax_ptr, absmax2_ptr, offset_ptr, dynamic_ptr, block, mask):
    """absmax of the blocks ``block`` (int64 tile), float32; outside ``mask`` finite and without meaning."""
    if absmax2_ptr is None:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:
        index = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        absmax2 = tl.load(absmax2_ptr + (block >> 8), mask=mask, other=0.0)
        scale = tl.load(dynamic_ptr + index) * absmax2 + tl.load(offset_ptr)
    return scale


@triton.jit
def load_words(packed_ptr, rows, row_mask, column0, K, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Packed weights of ``rows`` [ROWS, 1] from ``column0`` on: int32 [ROWS, COLUMNS // 8], eight weights in each.

    K must be a multiple of BLOCK_SIZE and the bytes start at a multiple of 16.
    """
    # Written with whole blocks, so that Triton sees that sixteen bytes lie on one side of every mask.
    words_of_row = K // BLOCK_SIZE * (BLOCK_SIZE // 8)
    word = column0 // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
    return tl.load(words_ptr + rows * words_of_row + word, mask=row_mask & (word < words_of_row), other=0)


@triton.jit
def scale_tile(
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    dynamic_ptr,
    rows,
    row_mask,
    column0,
    K,
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The scales of every STEP-th of COLUMNS columns from ``column0`` on, float32 [ROWS, COLUMNS // STEP] or [ROWS, 1].

    One load for each row and block; K is a multiple of BLOCK_SIZE. STEP must divide BLOCK_SIZE.
    """
    GROUPS: tl.constexpr = COLUMNS // BLOCK_SIZE if COLUMNS > BLOCK_SIZE else 1
    groups_of_row = K // BLOCK_SIZE
    group = column0 // BLOCK_SIZE + tl.arange(0, GROUPS)[None, :]
    block = rows * groups_of_row + group
    scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, dynamic_ptr, block, row_mask & (group < groups_of_row))
    if GROUPS > 1:
        ROWS: tl.constexpr = rows.shape[0]
        scale = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, BLOCK_SIZE // STEP))
        scale = tl.reshape(scale, (ROWS, COLUMNS // STEP))
    return scale


@triton.jit
def _split_words(tile):
    """The eight elements of the last three axes, in their order."""
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

    The scale of a block is left to the caller: once for eight weights instead of once for each.
    """
    ROWS: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1]
    x = tl.reshape(x, (1, COLUMNS, 2, 2, 2)).to(tl.float32)
    x = tl.broadcast_to(x, (ROWS, COLUMNS, 2, 2, 2))
    # Joined, so that the compiler brings x into the layout of the words as a whole and not eight times in pieces.
    w, x = tl.split(tl.join(levels_of_words(levels, words), x))
    w0, w1, w2, w3, w4, w5, w6, w7 = _split_words(w)
    x0, x1, x2, x3, x4, x5, x6, x7 = _split_words(x)
    p = tl.fma(w1, x1, w0 * x0)
    p = tl.fma(w3, x3, tl.fma(w2, x2, p))
    p = tl.fma(w5, x5, tl.fma(w4, x4, p))
    return tl.fma(w7, x7, tl.fma(w6, x6, p))


@triton.jit
def decode_tile(
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    levels,
    dynamic_ptr,
    row0,
    column0,
    N,
    K,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """w[row0 : row0 + ROWS, column0 : column0 + COLUMNS] in float32; outside [N, K] finite and without meaning.

    ``ALIGNED`` says that K is a multiple of BLOCK_SIZE: then rows start on a byte and no block straddles two rows, so a
    byte is loaded once and a scale once per row and block. ``column0`` must be a multiple of COLUMNS.
    """
    rows = row0 + tl.arange(0, ROWS)
    row_mask = (rows < N)[:, None]
    rows = rows.to(tl.int64)[:, None]
    if ALIGNED:
        words = load_words(packed_ptr, rows, row_mask, column0, K, BLOCK_SIZE, COLUMNS)
        levels_of_tile = tl.reshape(levels_of_words(levels, words), (ROWS, COLUMNS))
        w = levels_of_tile * scale_tile(
            absmax_ptr, absmax2_ptr, offset_ptr, dynamic_ptr, rows, row_mask, column0, K, BLOCK_SIZE, COLUMNS, 1
        )
    else:
        columns = column0 + tl.arange(0, COLUMNS)[None, :]
        flat = rows * K + columns
        mask = row_mask & (columns < K)
        byte = tl.load(packed_ptr + (flat >> 1), mask=mask, other=0).to(tl.int32)
        nibble = byte >> (4 - 4 * (flat & 1).to(tl.int32))
        scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, dynamic_ptr, flat // BLOCK_SIZE, mask)
        w = level_of(levels, nibble) * scale
    return w


# ---- tiles of any matrix


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


def unit_rows(x: Tensor) -> Tensor:
    """x, copied unless the elements of a row are neighbours: kernels take any row stride, but no column stride."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
