"""The ops of NF4: quantise, quantise the scales, dequantise."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import _cpu, _plan
from ._register import register


def nf4_quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    chosen = _plan.choose_nf4(w.device)
    if chosen == "cpp":
        return _cpu.nf4_quantize(w, block_size)
    if chosen == "triton":
        return _plan.launchers("nf4").quantize(w, block_size)
    return reference.nf4_quantize(w, block_size)


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    chosen = _plan.choose_nf4(absmax.device)
    if chosen == "cpp":
        return _cpu.absmax_quantize(absmax, offset)
    if chosen == "triton":
        return _plan.launchers("nf4").absmax_quantize(absmax, offset)
    return reference.absmax_quantize(absmax, offset)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    chosen = _plan.choose_nf4(packed.device, _plan.decodes_with_cuda(packed.device))
    if chosen == "reference":
        return reference.nf4_dequantize(
            packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype
        ).clone()
    out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    if chosen == "triton":
        return _plan.launchers("nf4").dequantize(
            packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype, out=out
        )
    return _cpu.nf4_dequantize(packed, absmax, absmax2, offset, out, block_size)


def _nf4_quantize_fake(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return packed, w.new_empty((w.numel() + block_size - 1) // block_size, dtype=torch.float32)


def _absmax_quantize_fake(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    blocks = (absmax.numel() + reference.ABSMAX_BLOCK - 1) // reference.ABSMAX_BLOCK
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(blocks, dtype=torch.float32)


def _nf4_dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(out_features, in_features, dtype=dtype)


register("nf4_quantize", "(Tensor w, int block_size) -> (Tensor, Tensor)", nf4_quantize, _nf4_quantize_fake)
register(
    "absmax_quantize", "(Tensor absmax, Tensor offset) -> (Tensor, Tensor)", absmax_quantize, _absmax_quantize_fake
)
register(
    "nf4_dequantize",
    "(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int out_features, int in_features, "
    "int block_size, ScalarType dtype) -> Tensor",
    nf4_dequantize,
    _nf4_dequantize_fake,
)
