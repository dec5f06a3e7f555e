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

from .launch import check_dtypes, interpreted, launch

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
    levels_of_tile = tl.interleave(level_of(levels, byte >> 4), level_of(levels, byte))
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
