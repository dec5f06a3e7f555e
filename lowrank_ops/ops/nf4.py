"""Quantise and dequantise in each 4-bit format, and quantise block scales to 8 bits, as registered ops."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import reference
from ..kernels.operands import FORMATS, Format, Matrix
from . import _cpu, _plan
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


def _quantize_fake(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
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
        "(Tensor w, int block_size) -> (Tensor, Tensor)",
        partial(quantize, _format),
        partial(_quantize_fake, _format),
    )
    register(
        f"{_format.name}_dequantize",
        "(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int out_features, int in_features, "
        "int block_size, ScalarType dtype) -> Tensor",
        partial(dequantize, _format),
        _dequantize_fake,
    )
register(
    "absmax_quantize",
    "(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    absmax_quantize,
    _absmax_quantize_fake,
)
