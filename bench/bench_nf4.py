"""nf4_quantize, absmax_quantize and nf4_dequantize, against bitsandbytes on the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_ops import NF4Weight

from .common import Call, Provider, copies
from .report import Report

OPS = ("nf4_quantize", "absmax_quantize", "nf4_dequantize")
DTYPE = torch.bfloat16


def run(report: Report) -> None:
    asked = [op for op in OPS if op in report.settings.ops]
    for N, K in report.settings.shapes((4096, 4096), (14336, 4096)):
        if not asked or report.skip(f"{', '.join(asked)}, {N} x {K}"):
            return
        dense = torch.randn(N, K, device=report.settings.device).to(DTYPE)
        weight, scales = NF4Weight.quantize(dense), NF4Weight.quantize(dense, double_quant=False).absmax
        # What is rotated, its bytes, and the bytes of the result. The first includes absmax_quantize, as quantising a
        # model does; the second is absmax_quantize alone.
        cases: dict[str, tuple[Any, int, int]] = {
            "nf4_quantize": (dense, dense.nbytes, weight.nbytes),
            "absmax_quantize": (scales, scales.nbytes, weight.absmax.nbytes),
            "nf4_dequantize": (weight, weight.nbytes, dense.nbytes),
        }
        for op in asked:
            source, read, written = cases[op]
            inputs = [copy.deepcopy(source) for _ in range(copies(read, report.settings))]
            providers = {}
            for name, make in MAKERS[op].items():
                calls = report.build(name, partial(_all, make, inputs))
                if calls:
                    providers[name] = Provider(calls, read + written)
            report.case(op, (N, K), 0, DTYPE, providers, graph=op != "nf4_quantize")


def _all(make: Callable[[Any], Call], inputs: Sequence[Any]) -> list[Call]:
    return [make(i) for i in inputs]


def bitsandbytes_weight(weight: NF4Weight) -> Any:
    """The same bytes as bitsandbytes' Params4bit."""
    from bitsandbytes.nn import Params4bit

    stats = {key.removeprefix("weight."): tensor.clone() for key, tensor in weight.to_bitsandbytes().items()}
    return Params4bit.from_prequantized(stats.pop("weight"), stats, device=weight.device)


def bitsandbytes_linear(weight: NF4Weight, dtype: torch.dtype) -> Any:
    """A Linear4bit over the same bytes, without a bias."""
    from bitsandbytes.nn import Linear4bit

    N, K = weight.shape
    linear = Linear4bit(K, N, False, compute_dtype=dtype, quant_type="nf4", device="meta")
    linear.weight = bitsandbytes_weight(weight)
    return linear


def _absmax(absmax: Tensor) -> object:
    return torch.ops.lowrank_ops.absmax_quantize(absmax, absmax.mean())


def _bitsandbytes_quantize(w: Tensor) -> Call:
    from bitsandbytes.functional import quantize_4bit

    return partial(quantize_4bit, w, blocksize=64, compress_statistics=True, quant_type="nf4")


def _bitsandbytes_absmax(absmax: Tensor) -> Call:
    from bitsandbytes.functional import quantize_blockwise

    return lambda: quantize_blockwise(absmax - absmax.mean(), blocksize=256)


def _bitsandbytes_dequantize(weight: NF4Weight) -> Call:
    from bitsandbytes.functional import dequantize_4bit

    theirs = bitsandbytes_weight(weight)
    return partial(dequantize_4bit, theirs.data, theirs.quant_state)


MAKERS: dict[str, dict[str, Callable[[Any], Call]]] = {
    "nf4_quantize": {"ours": lambda w: partial(NF4Weight.quantize, w), "bitsandbytes": _bitsandbytes_quantize},
    "absmax_quantize": {"ours": lambda absmax: partial(_absmax, absmax), "bitsandbytes": _bitsandbytes_absmax},
    "nf4_dequantize": {"ours": lambda w: partial(w.dequantize, DTYPE), "bitsandbytes": _bitsandbytes_dequantize},
}
