"""NF4 weights: w[n, k] = code[nibble(n·K + k)] · absmax[(n·K + k) // block_size].

The format is that of bitsandbytes: blocks run over the row-major flattened weight, byte j holds element 2j in its high
nibble. ``absmax`` is float32, or under double quantisation uint8 with
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

from .launch import check_dtypes, launch

# Index = nibble. QLoRA (arXiv 2305.14314, appendix E): quantiles of a normal, asymmetric so that 0 is exact.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
ABSMAX_BLOCK = 256  # block scales that share one second-level scale


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
        torch.tensor(NF4_CODE, dtype=torch.float32, device=device),
        torch.tensor(sorted(values), dtype=torch.float32, device=device),
    )


# ---- helpers of the kernels that decode in registers


@triton.jit
def load_levels(levels_ptr):
    """The 16 NF4 levels as a tile [1, 16] for :func:`level_of`."""
    return tl.load(levels_ptr + tl.arange(0, 16))[None, :]


@triton.jit
def level_of(levels, nibble):
    """levels[nibble] for an int32 tile [rows, columns].

    Gathering along the last axis of a tile that every row holds compiles to one warp shuffle a level: fewer
    instructions than a table in memory, and far fewer than a tree of selections.
    """
    return tl.gather(tl.broadcast_to(levels, (nibble.shape[0], 16)), nibble, 1)


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
        half = column0 // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        byte = tl.load(packed_ptr + rows * (K // 2) + half, mask=row_mask & (half < K // 2), other=0).to(tl.int32)
        levels_of_tile = tl.interleave(level_of(levels, byte >> 4), level_of(levels, byte & 15))  # [ROWS, COLUMNS]
        if COLUMNS <= BLOCK_SIZE:
            scale = block_scale(
                absmax_ptr,
                absmax2_ptr,
                offset_ptr,
                dynamic_ptr,
                rows * (K // BLOCK_SIZE) + column0 // BLOCK_SIZE,
                row_mask & (column0 < K),
            )
            w = levels_of_tile * scale
        else:
            GROUPS: tl.constexpr = COLUMNS // BLOCK_SIZE
            group = column0 // BLOCK_SIZE + tl.arange(0, GROUPS)[None, :]
            scale = block_scale(
                absmax_ptr,
                absmax2_ptr,
                offset_ptr,
                dynamic_ptr,
                rows * (K // BLOCK_SIZE) + group,
                row_mask & (group < K // BLOCK_SIZE),
            )
            grouped = tl.reshape(levels_of_tile, (ROWS, GROUPS, BLOCK_SIZE)) * scale[:, :, None]
            w = tl.reshape(grouped, (ROWS, COLUMNS))
    else:
        columns = column0 + tl.arange(0, COLUMNS)[None, :]
        flat = rows * K + columns
        mask = row_mask & (columns < K)
        byte = tl.load(packed_ptr + (flat >> 1), mask=mask, other=0).to(tl.int32)
        nibble = (byte >> (4 - 4 * (flat & 1).to(tl.int32))) & 15
        scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, dynamic_ptr, flat // BLOCK_SIZE, mask)
        w = level_of(levels, nibble) * scale
    return w


# ---- whole weights


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    levels_ptr,
    dynamic_ptr,
    out_ptr,
    packed_bytes,
    numel,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The flattened weight in rows of COLUMNS elements, a divisor of the block size: a row has one scale.
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    half = row * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    byte = tl.load(packed_ptr + half, mask=half < packed_bytes, other=0).to(tl.int32)
    levels = load_levels(levels_ptr)
    levels_of_tile = tl.interleave(level_of(levels, byte >> 4), level_of(levels, byte & 15))
    first = row * COLUMNS
    scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, dynamic_ptr, first // BLOCK_SIZE, first < numel)
    at = first + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + at, (levels_of_tile * scale).to(out_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def _quantize_kernel(w_ptr, levels_ptr, packed_ptr, absmax_ptr, numel, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(w_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), axis=1)
    # Below the smallest normal number a literal would become float64.
    kept = tl.maximum(absmax, tl.full((BLOCKS,), 1e-38, tl.float32))
    scaled = w * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), kept)[:, None]
    short = (block + 1) * BLOCK_SIZE > numel
    # A short last block divides, as bitsandbytes does on a CPU; only the program that holds it pays for the division.
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCKS * BLOCK_SIZE > numel:
        divisor = tl.broadcast_to(kept[:, None], (BLOCKS, BLOCK_SIZE))
        scaled = tl.where(short[:, None], tl.div_rn(w, divisor), scaled)
        absmax = tl.where(short, kept, absmax)
    nibble = tl.zeros((BLOCKS, BLOCK_SIZE), tl.int32)
    for i in tl.static_range(15):
        # The midpoint of two levels is exact in float32; a tie takes the lower level.
        threshold = (tl.load(levels_ptr + i) + tl.load(levels_ptr + i + 1)) * 0.5
        nibble += (scaled > threshold).to(tl.int32)
    high, low = tl.split(tl.reshape(nibble, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte_at = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(packed_ptr + byte_at, ((high << 4) | low).to(tl.uint8), mask=2 * byte_at < numel)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < numel)


@triton.jit
def _absmax_quantize_kernel(absmax_ptr, offset_ptr, dynamic_ptr, index_ptr, absmax2_ptr, blocks):
    at = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    centred = tl.load(absmax_ptr + at, mask=at < blocks, other=0.0) - tl.load(offset_ptr)
    centred = tl.where(at < blocks, centred, 0.0)
    absmax2 = tl.max(tl.abs(centred), axis=0)
    scaled = centred * tl.div_rn(tl.full((256,), 1.0, tl.float32), tl.broadcast_to(absmax2, (256,)))
    # Binary search for the number of midpoints of neighbouring levels below the value: the nearest level.
    index = tl.zeros((256,), tl.int32)
    for bit in tl.static_range(8):
        trial = index + (128 >> bit)
        midpoint = (tl.load(dynamic_ptr + trial - 1) + tl.load(dynamic_ptr + trial)) * 0.5
        index = tl.where(scaled > midpoint, trial, index)
    index = tl.where(absmax2 > 0, index, 0)
    tl.store(index_ptr + at, index.to(tl.uint8), mask=at < blocks)
    tl.store(absmax2_ptr + tl.program_id(0), absmax2)


def quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """nibble[i] = #{t : w[i] / absmax[i // block_size] > t} over the 15 midpoints t of neighbouring NF4 levels.

    Args:
        w: float32, bfloat16 or float16 tensor of any shape.
        block_size: elements that share one scale, a power of two in 32 … 4096.

    Returns:
        packed: uint8 [ceil(numel / 2)]; absmax: float32 [ceil(numel / block_size)].

    Raises:
        TypeError: bfloat16 in the interpreter.

    Numerics: float32, with the operations of ``reference.nf4_quantize`` and hence its bytes: an IEEE reciprocal and a
    product, in a short last block an IEEE division. bitsandbytes on CUDA uses an approximate reciprocal, so its nibble
    may differ by one where w / absmax lies within 2 ulp of a midpoint, and in blocks of zeros, which are nibble 7 here.
    """
    check_dtypes(w)
    w = w.contiguous()
    numel = w.numel()
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=w.device)
    if numel == 0:
        return packed, absmax
    blocks = max(1, 2048 // block_size)
    launch(
        _quantize_kernel,
        (triton.cdiv(absmax.numel(), blocks),),
        w.device,
        num_warps=4,
        num_stages=1,
        w_ptr=w,
        levels_ptr=tables(w.device)[0],
        packed_ptr=packed,
        absmax_ptr=absmax,
        numel=numel,
        BLOCK_SIZE=block_size,
        BLOCKS=blocks,
    )
    return packed, absmax


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """dynamic[index[b]] · absmax2[b // 256] ≈ absmax[b] − offset: the second level of double quantisation.

    Args:
        absmax: float32 [blocks], the first-level scales.
        offset: float32 scalar on the same device, their mean.

    Returns:
        index: uint8 [blocks]; absmax2: float32 [ceil(blocks / 256)].

    Numerics: float32; the index is that of the level nearest to the scaled value, as bitsandbytes takes it on CUDA. On
    a CPU bitsandbytes, and ``reference.absmax_quantize`` with it, rounds the value to a grid of 65,536 points first,
    so about 0.15 % of the indices are one lower or higher there.
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
        num_warps=4,
        num_stages=1,
        absmax_ptr=absmax,
        offset_ptr=offset,
        dynamic_ptr=tables(absmax.device)[1],
        index_ptr=index,
        absmax2_ptr=absmax2,
        blocks=blocks,
    )
    return index, absmax2


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """w[n, k] = code[nibble(n·K + k)] · absmax[(n·K + k) // block_size].

    Args:
        packed: uint8, ceil(N·K / 2) bytes.
        absmax: float32 [blocks], or uint8 [blocks] with ``absmax2`` float32 and ``offset`` float32 scalar.
        out_features, in_features: N and K.
        block_size: elements that share one scale.
        dtype: of the result.
        out: where to write, contiguous [N, K] of ``dtype``; made where it is None.

    Returns:
        [N, K] of ``dtype``.

    Raises:
        TypeError: bfloat16 in the interpreter.

    Numerics: bit-equal to ``reference.nf4_dequantize``: float32 product, rounded once to ``dtype``.
    """
    check_dtypes(dtype)
    if out is None:
        out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    levels, dynamic = tables(packed.device)
    columns = min(block_size, 128)
    rows = 4096 // columns
    launch(
        _dequantize_kernel,
        (triton.cdiv(out_features * in_features, rows * columns),),
        packed.device,
        num_warps=4,
        num_stages=1,
        packed_ptr=packed,
        absmax_ptr=absmax,
        absmax2_ptr=absmax2,
        offset_ptr=offset,
        levels_ptr=levels,
        dynamic_ptr=dynamic,
        out_ptr=out,
        packed_bytes=packed.numel(),
        numel=out_features * in_features,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        COLUMNS=columns,
    )
    return out
