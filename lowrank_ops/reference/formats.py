"""The formats in plain PyTorch: encode, decode, and double quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.operands import FP4, INT8, MXFP4, NF4, Format

NF4_CODE = NF4.levels
BLOCK_SIZES = NF4.block_sizes
ABSMAX_BLOCK = 256  # block scales that share one second-level scale under double quantisation


def nf4_code(device: torch.device | str | None = None) -> Tensor:
    """The 16 NF4 levels, float32 [16]; the index is the nibble."""
    return levels(NF4, device)


def levels(format: Format, device: torch.device | str | None = None) -> Tensor:
    """The levels of a format, float32 [16] or [256]; the index is the code."""
    return torch.tensor(format.levels, dtype=torch.float32, device=device)


def dynamic_code(device: torch.device | str | None = None) -> Tensor:
    """The signed 8-bit dynamic map of double quantisation, float32 [256], ascending, 0 at index 127.

    For i = 0 … 6 the midpoints of 2^i equal parts of [0.1, 1], times 10^(i-6), with both signs; then 0 and 1
    (Dettmers et al., arXiv 2110.02861, section 2.1). Each mantissa is rounded to float32 before it is scaled in
    double precision: this order decides the last bit.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        midpoints = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += midpoints + [-m for m in midpoints]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def nf4_quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """nibble[i] = #{t : w[i] / absmax[i // block_size] > t} over the 15 midpoints t of neighbouring NF4 levels.

    Blocks run over the row-major flattened tensor, so they straddle rows unless ``K`` is a multiple of ``block_size``;
    the last may be short. A tie takes the lower level. Byte j holds element 2j in its high nibble and 2j+1 in its low
    one; an odd count is padded with the nibble of zero.

    Args:
        w: float tensor of any shape.
        block_size: elements that share one scale.

    Returns:
        packed: uint8 [ceil(numel / 2)]; absmax: float32 [ceil(numel / block_size)].

    Numerics: float32, by the rule of bitsandbytes 0.50.2 on a CPU, bit for bit: full blocks multiply by the reciprocal
    of absmax, a short last block divides by it; absmax is at least 1e-38 inside the division.
    """
    return _quantize_by_absmax(NF4, w, block_size)


def fp4_quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """level(nibble[i]) = the FP4 level nearest to w[i] / absmax[i // block_size]; a tie takes the lower level.

    FP4 is bitsandbytes' table: a sign, two bits of exponent, one of mantissa, over the largest level. Two nibbles mean
    0: 8 for small positive numbers, 0 for 0 and small negative ones.

    Args, Returns and Numerics as :func:`nf4_quantize`.
    """
    return _quantize_by_absmax(FP4, w, block_size)


def _quantize_by_absmax(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    flat = w.reshape(-1).float()
    full = flat.numel() - flat.numel() % block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1).reshape(-1)
    if full < flat.numel():
        last = flat[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, (flat[full:] / last).clamp(-1, 1)])
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    ascending, order = levels(format, w.device).sort(stable=True)
    nibbles = order[torch.bucketize(scaled, (ascending[:-1] + ascending[1:]) / 2)]
    return pack(nibbles), absmax


def mxfp4_quantize(w: Tensor, block_size: int = 32) -> tuple[Tensor, Tensor]:
    """byte[b] = floor(log2(max |w| of block b)) − 2 + 127, nibble[i] = the E2M1 number nearest to w[i] / 2^(byte − 127).

    Ties take the even mantissa, numbers beyond 6 saturate to 6, and zeros keep their sign. A block of zeros has byte 0.
    A block that contains NaN or infinity has byte 255, which makes the whole block NaN.

    Args:
        w: float tensor of any shape.
        block_size: 32.

    Returns:
        packed: uint8 [ceil(numel / 2)]; exponents: uint8 [ceil(numel / block_size)].

    Numerics: exact except for one rounding, because scales are powers of two.

    Source: OCP Microscaling formats (MX) v1.0, sections 5.3.3, 5.4.1 and 6.3.
    """
    flat = w.reshape(-1).double()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    largest = blocks.abs().amax(dim=1)
    # frexp: m · 2^e with ½ <= m < 1, so that floor(log2) is e − 1.
    exponents = torch.where(largest > 0, torch.frexp(largest)[1] - 3 + 127, 0).clamp(0, 254)
    exponents = torch.where(largest.isfinite(), exponents, 255)
    scaled = blocks * torch.exp2(127.0 - exponents.double()).unsqueeze(1)
    size = levels(MXFP4, w.device)[:8].double()
    between = (size[:-1] + size[1:]) / 2
    below, above = (torch.bucketize(scaled.abs(), between, right=right) for right in (False, True))
    # The two differ only in a tie. Even mantissas have even nibbles.
    nibbles = torch.where(below % 2 == 0, below, above) + 8 * scaled.signbit()
    nibbles = nibbles.reshape(-1)[: flat.numel()]
    return pack(torch.nn.functional.pad(nibbles, (0, nibbles.numel() % 2))), exponents.to(torch.uint8)


def int8_quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """byte[i] = w[i] · 127 / absmax[i // block_size], rounded to the nearest whole number, half to even.

    absmax is the largest magnitude of a block, at least 2^-119. Blocks run over the row-major flattened tensor, as in
    :func:`nf4_quantize`. Where a block has NaN or infinity, its scale has too, and its bytes mean nothing.

    Args:
        w: float tensor of any shape.
        block_size: elements that share one scale.

    Returns:
        bytes: uint8 [numel], signed by two's complement; scales: float32 [ceil(numel / block_size)], absmax / 127.

    Numerics: float32: the factor 127 / absmax is rounded, and so is its product with w.
    """
    flat = w.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1).clamp(min=2.0**-119)
    largest = torch.full_like(absmax, 127.0)  # torch divides a number or by a number with a reciprocal
    rounded = (blocks * (largest / absmax).unsqueeze(1)).round().nan_to_num(0.0, 0.0, 0.0)
    return rounded.reshape(-1)[: flat.numel()].to(torch.int8).view(torch.uint8), absmax / largest


def pack(nibbles: Tensor) -> Tensor:
    """Pack an even number of nibbles, two in a byte, the first in the high half."""
    nibbles = nibbles.to(torch.uint8)
    return (nibbles[::2] << 4) | nibbles[1::2]


def quantize(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(packed, scales) = ``{format}_quantize(w)``."""
    return _QUANTIZE[format.name](w, block_size)


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """code[index[b]] · absmax2[b // 256] ≈ absmax[b] − offset: the second level of double quantisation.

    Args:
        absmax: float32 [blocks], the first-level scales.
        offset: float32 scalar, their mean.

    Returns:
        index: uint8 [blocks] into :func:`dynamic_code`; absmax2: float32 [ceil(blocks / 256)].

    Numerics: float32, bit for bit as bitsandbytes 0.50.2 on a CPU: the scaled value is rounded to a grid of
    65,536 points of [-1, 1] and the level nearest to the grid point is taken, which differs from the level nearest to
    the value in about one index of a thousand.
    """
    centred = absmax.float() - offset
    pad = -centred.numel() % ABSMAX_BLOCK
    blocks = torch.nn.functional.pad(centred, (0, pad)).view(-1, ABSMAX_BLOCK)
    absmax2 = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax2).unsqueeze(1)).clamp(-1, 1)
    position = ((scaled + 1.0) * 0.5 * 65535 + 0.5).to(torch.int64).clamp(0, 65535)
    grid = -1.0 + (2.0 * torch.arange(65536, dtype=torch.float32, device=absmax.device)) / 65535
    code = dynamic_code(absmax.device)
    nearest = torch.bucketize(grid, 0.5 * (code[:-1] + code[1:]))
    index = torch.where(absmax2.unsqueeze(1) > 0, nearest[position], 0).to(torch.uint8)
    return index.reshape(-1)[: centred.numel()].contiguous(), absmax2


def absmax_dequantize(index: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """absmax[b] = code[index[b]] · absmax2[b // 256] + offset, float32 [blocks]; product and sum each rounded."""
    code = dynamic_code(index.device)
    return code[index.long()] * absmax2.repeat_interleave(ABSMAX_BLOCK)[: index.numel()] + offset


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = code[nibble(n·K + k)] · absmax[(n·K + k) // block_size].

    Args:
        packed: uint8, ceil(N·K / 2) bytes in any shape.
        absmax: float32 [blocks], or uint8 [blocks] with ``absmax2`` float32 and ``offset`` float32 scalar.
        out_features, in_features: ``N`` and ``K``.
        block_size: elements that share one scale.
        dtype: of the result.

    Returns:
        [N, K] of ``dtype``.

    Numerics: the product is computed in float32 and rounded once to ``dtype`` (float64 holds the float32 product,
    because every kernel computes with it).
    """
    return dequantize(NF4, packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype)


def fp4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = level[nibble(n·K + k)] · absmax[(n·K + k) // block_size], as :func:`nf4_dequantize` with FP4's levels."""
    return dequantize(FP4, packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype)


def mxfp4_dequantize(
    packed: Tensor,
    exponents: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = E2M1[nibble(n·K + k)] · 2^(exponents[(n·K + k) // block_size] − 127); the exponent 255 is NaN.

    Args:
        packed: uint8, ceil(N·K / 2) bytes in any shape.
        exponents: uint8 [blocks].
        absmax2, offset: None; other formats use them.
        out_features, in_features: ``N`` and ``K``.
        block_size: 32.
        dtype: of the result.

    Returns:
        [N, K] of ``dtype``, rounded once.
    """
    return dequantize(MXFP4, packed, exponents, absmax2, offset, out_features, in_features, block_size, dtype)


def int8_dequantize(
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = byte[n·K + k] · scale[(n·K + k) // block_size], as :func:`nf4_dequantize` with signed bytes."""
    return dequantize(INT8, packed, scales, absmax2, offset, out_features, in_features, block_size, dtype)


def dequantize(
    format: Format,
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = level[code(n·K + k)] · scale[(n·K + k) // block_size] with the levels and the scales of a format.

    Args, Returns and Numerics as :func:`nf4_dequantize`.
    """
    numel = out_features * in_features
    packed = packed.reshape(-1)
    if format.exponents:
        scales = torch.where(scales < 255, torch.exp2(scales.double() - 127), torch.nan).float()
    elif absmax2 is not None:
        assert offset is not None
        scales = absmax_dequantize(scales, absmax2, offset)
    codes = packed if format.bits == 8 else torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:numel]
    scales = scales.repeat_interleave(block_size)[:numel]
    return (levels(format, packed.device)[codes.long()] * scales).view(out_features, in_features).to(dtype)


_QUANTIZE = {"nf4": nf4_quantize, "fp4": fp4_quantize, "mxfp4": mxfp4_quantize, "int8": int8_quantize}
