"""Quantise and dequantise in each format, and quantise block scales to 8 bits, as registered ops."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import reference
from ..kernels.operands import FORMATS, Format, Matrix
from . import _cpu, _plan
from ._contract import FLOATS, check_packed
from ._register import register


def quantize(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(packed, scales): absmax float32 [blocks], or exponents uint8 [blocks]."""
    chosen = _plan.choose_nf4(w.device)
    if chosen == "cpp":
        return _cpu.quantize(format, w, block_size)
    if chosen == "triton":
        return _plan.launchers("nf4").quantize(format, w, block_size)
    return reference.quantize(format, w, block_size)


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(index uint8 [blocks], absmax2 float32)."""
    chosen = _plan.choose_nf4(absmax.device)
    if chosen == "cpp":
        return _cpu.absmax_quantize(absmax, offset)
    if chosen == "triton":
        return _plan.launchers("nf4").absmax_quantize(absmax, offset)
    return reference.absmax_quantize(absmax, offset)


def dequantize(
    format: Format, packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, out_features: int,
    in_features: int, block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """w [N, K]; ``absmax`` holds the exponents for a format with exponents."""
    operands = (packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype)
    chosen = _plan.choose_nf4(packed.device, _cpu.has_cuda(packed.device))
    if chosen == "reference":
        return reference.dequantize(format, *operands).clone()
    out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    if chosen == "triton":
        scales = tuple(scale for scale in (absmax, absmax2, offset) if scale is not None)
        matrix = Matrix(packed, scales, block_size, format)
        return _plan.launchers("nf4").dequantize(matrix, out_features, in_features, dtype, out)
    return _cpu.dequantize(format, packed, absmax, absmax2, offset, out, block_size)


def _check_quantize(format: Format, w: Tensor, block_size: int, **_: object) -> None:
    _check_block_size(f"{format.name}_quantize", format, block_size)


def _check_block_size(op: str, format: Format, block_size: int) -> None:
    if block_size not in format.block_sizes:
        need = ", ".join(map(str, format.block_sizes))
        raise ValueError(f"lowrank_ops::{op}: block_size must be one of {need}, got {block_size}")


def _check_dequantize(
    format: Format, packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, N: int, K: int,
    block_size: int, dtype: torch.dtype, **_: object,
) -> None:  # fmt: skip
    op, parts = f"{format.name}_dequantize", {"packed": packed, "absmax": absmax, "absmax2": absmax2, "offset": offset}
    _check_block_size(op, format, block_size)
    if dtype not in FLOATS and not (dtype == torch.float64 and _plan.forced() == "reference"):
        raise TypeError(f"lowrank_ops::{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    check_packed(op, parts, format, (), N, K, block_size)


def _quantize_fake(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    _check_quantize(format, w, block_size)
    packed = w.new_empty(format.bytes_of(w.numel()), dtype=torch.uint8)
    scales = torch.uint8 if format.exponents else torch.float32
    return packed, w.new_empty((w.numel() + block_size - 1) // block_size, dtype=scales)


def _absmax_quantize_fake(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    blocks = (absmax.numel() + reference.ABSMAX_BLOCK - 1) // reference.ABSMAX_BLOCK
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(blocks, dtype=torch.float32)


def _dequantize_fake(packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype, **_: object) -> Tensor:
    return packed.new_empty(out_features, in_features, dtype=dtype)


for _format in FORMATS.values():
    register(
        f"{_format.name}_quantize",
        "(Tensor w[...], int block_size) -> (Tensor, Tensor)",
        partial(quantize, _format),
        partial(_quantize_fake, _format),
        partial(_check_quantize, _format),
    )
    register(
        f"{_format.name}_dequantize",
        "(Tensor packed[...]:uint8, Tensor absmax[...]:any, Tensor? absmax2[...]:any, Tensor? offset[...]:any, "
        "int out_features[N], int in_features[K], int block_size, ScalarType dtype) -> Tensor",
        partial(dequantize, _format),
        _dequantize_fake,
        partial(_check_dequantize, _format),
    )
register(
    "absmax_quantize",
    "(Tensor absmax[...]:float32, Tensor offset[]:float32) -> (Tensor, Tensor)",
    absmax_quantize,
    _absmax_quantize_fake,
)
