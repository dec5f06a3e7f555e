"""Quantise and dequantise whole matrices, in every format of :mod:`operands`; :mod:`matrix` describes the layout."""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FLAT
from .launch import check_dtypes, launch
from .matrix import block_scale, dynamic_table, level_of, levels_table, load_levels, load_signed, matrix_argument
from .operands import FORMATS, Format, Matrix

ABSMAX_BLOCK = 256  # block scales that share one second-level scale


@triton.jit
def _dequantize_kernel(matrix, out_ptr, packed_bytes, numel, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Read the flattened weight as rows of COLUMNS elements, a divisor of the block size, so that each row has one
    # scale.
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    first = row * COLUMNS
    at = first + tl.arange(0, COLUMNS)[None, :]
    if matrix.SCALES == "bytes":
        levels_of_tile = load_signed(matrix, at, at < numel)
    else:
        half = row * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
        byte = tl.load(matrix.data + half, mask=half < packed_bytes, other=0).to(tl.int32)
        levels = load_levels(matrix.levels)
        levels_of_tile = tl.interleave(level_of(levels, byte >> 4), level_of(levels, byte))
    scale = block_scale(matrix, first // matrix.BLOCK, first < numel)
    tl.store(out_ptr + at, (levels_of_tile * scale).to(out_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def _quantize_kernel(
    w_ptr, levels_ptr, order_ptr, packed_ptr, absmax_ptr, numel, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """``levels_ptr`` holds levels in ascending order, ``order_ptr`` their nibbles; it is None if these are 0 … 15."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(w_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), axis=1)
    # As a literal, a number below the smallest normal one would become float64.
    kept = tl.maximum(absmax, tl.full((BLOCKS,), 1e-38, tl.float32))
    scaled = w * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), kept)[:, None]
    short = (block + 1) * BLOCK_SIZE > numel
    # A short last block divides, like bitsandbytes on a CPU; only the program that holds it pays for the division.
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCKS * BLOCK_SIZE > numel:
        divisor = tl.broadcast_to(kept[:, None], (BLOCKS, BLOCK_SIZE))
        scaled = tl.where(short[:, None], tl.div_rn(w, divisor), scaled)
        absmax = tl.where(short, kept, absmax)
    nibble = tl.zeros((BLOCKS, BLOCK_SIZE), tl.int32)
    for i in tl.static_range(15):
        # The midpoint of two levels is exact in float32; a tie takes the lower level.
        threshold = (tl.load(levels_ptr + i) + tl.load(levels_ptr + i + 1)) * 0.5
        nibble += (scaled > threshold).to(tl.int32)
    if order_ptr is not None:
        nibble = tl.load(order_ptr + nibble)
    _store_nibbles(packed_ptr, nibble, block, numel)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < numel)


@triton.jit
def _quantize_exponents_kernel(
    w_ptr, levels_ptr, packed_ptr, exponents_ptr, numel, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """The first eight levels are the positive ones of E2M1: they ascend, and even indices have an even mantissa."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    bits = tl.load(w_ptr + at, mask=at < numel, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Bit patterns of non-negative floats sort like the floats, with infinity and NaN last.
    largest = tl.max(size, axis=1) >> 23
    exponent = tl.where(largest == 255, 255, tl.maximum(largest - 2, 0))
    # 2^(127 - exponent), a subnormal for 255. The product is exact wherever it reaches the first threshold.
    inverse = tl.where(exponent == 255, 1 << 21, (254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = size.to(tl.float32, bitcast=True) * inverse[:, None]
    nibble = tl.full((BLOCKS, BLOCK_SIZE), 7, tl.int32)  # also for NaN
    for i in tl.static_range(7):
        threshold = (tl.load(levels_ptr + i) + tl.load(levels_ptr + i + 1)) * 0.5
        # A tie takes the even nibble.
        nibble -= ((scaled < threshold) if i % 2 else (scaled <= threshold)).to(tl.int32)
    nibble = nibble | (bits >> 31 & 1) << 3
    _store_nibbles(packed_ptr, nibble, block, numel)
    tl.store(exponents_ptr + block, exponent.to(tl.uint8), mask=block * BLOCK_SIZE < numel)


@triton.jit
def _quantize_bytes_kernel(w_ptr, packed_ptr, scales_ptr, numel, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(w_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    absmax = tl.maximum(tl.max(tl.abs(w), axis=1), tl.full((BLOCKS,), 2.0**-119, tl.float32))
    largest = tl.full((BLOCKS,), 127.0, tl.float32)
    scaled = w * tl.div_rn(largest, absmax)[:, None]
    # The sum with 1.5 · 2^23 is rounded to a whole number, half to even, and its bits end in the byte.
    byte = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    tl.store(packed_ptr + at, byte, mask=at < numel)
    tl.store(scales_ptr + block, tl.div_rn(absmax, largest), mask=block * BLOCK_SIZE < numel)


@triton.jit
def _store_nibbles(packed_ptr, nibble, block, numel):
    """Pack the nibbles [len(block), BLOCK_SIZE] of blocks, the even element in the high nibble."""
    BLOCKS: tl.constexpr = nibble.shape[0]
    BLOCK_SIZE: tl.constexpr = nibble.shape[1]
    high, low = tl.split(tl.reshape(nibble, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte_at = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(packed_ptr + byte_at, ((high << 4) | low).to(tl.uint8), mask=2 * byte_at < numel)


@triton.jit
def _absmax_quantize_kernel(absmax_ptr, offset_ptr, dynamic_ptr, index_ptr, absmax2_ptr, blocks):
    at = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    centred = tl.load(absmax_ptr + at, mask=at < blocks, other=0.0) - tl.load(offset_ptr)
    centred = tl.where(at < blocks, centred, 0.0)
    absmax2 = tl.max(tl.abs(centred), axis=0)
    scaled = centred * tl.div_rn(tl.full((256,), 1.0, tl.float32), tl.broadcast_to(absmax2, (256,)))
    # Bisect for the number of midpoints below the value; that number is the index of the nearest level.
    index = tl.zeros((256,), tl.int32)
    for bit in tl.static_range(8):
        trial = index + (128 >> bit)
        midpoint = (tl.load(dynamic_ptr + trial - 1) + tl.load(dynamic_ptr + trial)) * 0.5
        index = tl.where(scaled > midpoint, trial, index)
    index = tl.where(absmax2 > 0, index, 0)
    tl.store(index_ptr + at, index.to(tl.uint8), mask=at < blocks)
    tl.store(absmax2_ptr + tl.program_id(0), absmax2)


@functools.cache
def ascending_levels(name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The 16 levels of a format in ascending order, float32, and their nibbles, int32, or None if these are 0 … 15."""
    levels = FORMATS[name].levels
    order = sorted(range(16), key=levels.__getitem__)
    nibbles = None if order == list(range(16)) else torch.tensor(order, dtype=torch.int32, device=device)
    return torch.tensor([levels[nibble] for nibble in order], dtype=torch.float32, device=device), nibbles


def quantize(format: Format, w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """level(nibble[i]) = the level nearest to w[i] / scale[i // block_size], in the blocks of the flattened w.

    With absmax scales nibble[i] counts the midpoints of neighbouring levels that are smaller than w[i] / absmax.
    Bytes are w · 127 / absmax, rounded to the nearest whole number, half to even, and their scales absmax / 127.
    Exponents are floor(log2(max |w|)) - 2 + 127; values beyond 6 · scale saturate to 6 · scale, ties take the even
    mantissa, and a block that contains NaN or infinity gets the exponent 255, which stands for NaN.

    Args:
        format: nf4, fp4, mxfp4 or int8.
        w: float32, bfloat16 or float16 tensor of any shape.
        block_size: elements that share one scale, one of ``format.block_sizes``.

    Returns:
        packed: uint8 [ceil(numel / 2)], or [numel] in int8; scales [ceil(numel / block_size)]: float32, or exponents
        uint8.

    Raises:
        TypeError: bfloat16 in the interpreter.

    Numerics: float32, the same operations and therefore the same bytes as the reference: an IEEE reciprocal and a
    product, in a short last block an IEEE division. bitsandbytes on CUDA uses an approximate reciprocal, so its nibble
    may differ by one level where w / absmax lies within 2 ulp of a midpoint, and in blocks of zeros. Products with
    exponents are exact.
    """
    check_dtypes(w)
    w = w.contiguous()
    numel, blocks = w.numel(), -(-w.numel() // block_size)
    packed = torch.empty(format.bytes_of(numel), dtype=torch.uint8, device=w.device)
    scales = torch.empty(blocks, dtype=torch.uint8 if format.exponents else torch.float32, device=w.device)
    if numel == 0:
        return packed, scales
    blocks_of_program = max(1, 2048 // block_size)
    grid = (triton.cdiv(blocks, blocks_of_program),)
    flat: dict[str, Any] = {"w_ptr": w, "packed_ptr": packed, "numel": numel}
    flat |= {"BLOCK_SIZE": block_size, "BLOCKS": blocks_of_program}
    if format.bits == 8:
        launch(_quantize_bytes_kernel, grid, w.device, FLAT, scales_ptr=scales, **flat)
    elif format.exponents:
        levels = levels_table(format.name, w.device)
        launch(_quantize_exponents_kernel, grid, w.device, FLAT, levels_ptr=levels, exponents_ptr=scales, **flat)
    else:
        levels, order = ascending_levels(format.name, w.device)
        launch(_quantize_kernel, grid, w.device, FLAT, levels_ptr=levels, order_ptr=order, absmax_ptr=scales, **flat)
    return packed, scales


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """dynamic[index[b]] · absmax2[b // 256] ≈ absmax[b] − offset: the second level of double quantisation.

    Args:
        absmax: float32 [blocks], the first-level scales.
        offset: float32 scalar on the same device, their mean.

    Returns:
        index: uint8 [blocks]; absmax2: float32 [ceil(blocks / 256)].

    Numerics: float32; the index is that of the level nearest to the scaled value, as in bitsandbytes on CUDA. On a CPU
    bitsandbytes, and ``reference.absmax_quantize`` with it, first rounds the value to a grid of 65,536 points, so about
    0.15 % of its indices differ by one.
    """
    absmax = absmax.contiguous()
    blocks = absmax.numel()
    index = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(-(-blocks // ABSMAX_BLOCK), dtype=torch.float32, device=absmax.device)
    if blocks == 0:
        return index, absmax2
    launch(
        _absmax_quantize_kernel,
        (absmax2.numel(),),
        absmax.device,
        FLAT,
        absmax_ptr=absmax,
        offset_ptr=offset,
        dynamic_ptr=dynamic_table(absmax.device),
        index_ptr=index,
        absmax2_ptr=absmax2,
        blocks=blocks,
    )
    return index, absmax2


def dequantize(matrix: Matrix, rows: int, columns: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """w[n, k] = levels[code(n·K + k)] · scale[(n·K + k) // block_size].

    Args:
        matrix: [rows, columns], quantised.
        dtype: element type of the result.
        out: contiguous [rows, columns] of ``dtype`` to write to; None allocates it.

    Returns:
        [rows, columns] of ``dtype``.

    Raises:
        TypeError: bfloat16 in the interpreter.

    Numerics: bit-equal to the reference: a float32 product, rounded once to ``dtype``.
    """
    check_dtypes(dtype)
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=matrix.data.device)
    tile_columns = min(matrix.block_size, 128)
    tile_rows = 4096 // tile_columns
    launch(
        _dequantize_kernel,
        (triton.cdiv(rows * columns, 4096),),
        matrix.data.device,
        FLAT,
        matrix=matrix_argument(matrix, matrix.block_size),  # the kernel reads it flattened, in whole blocks
        out_ptr=out,
        packed_bytes=matrix.data.numel(),
        numel=rows * columns,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
    )
    return out
