"""nf4_quantize, absmax_quantize, nf4_dequantize, and adapt of a block, against bitsandbytes on the same numbers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops import NF4Weight
from lowrank_ops.kernels.operands import FP4, INT8, MXFP4, Format

from ..common import Call, Provider, copies
from ..report import Report

OPS = (
    "nf4_quantize", "absmax_quantize", "nf4_dequantize", "fp4_quantize", "fp4_dequantize", "mxfp4_quantize",
    "mxfp4_dequantize", "int8_quantize", "int8_dequantize", "adapt",
)  # fmt: skip
DTYPE = torch.bfloat16


def run(report: Report) -> None:
    _run_kernels(report)
    _run_adapt(report)


def _run_kernels(report: Report) -> None:
    asked = [op for op in MAKERS if op in report.settings.ops]
    for N, K in report.settings.shapes((4096, 4096), (14336, 4096)):
        if not asked or report.skip(f"{', '.join(asked)}, {N} x {K}"):
            return
        dense = torch.randn(N, K, device=report.settings.device).to(DTYPE)
        weight, scales = NF4Weight.quantize(dense), NF4Weight.quantize(dense, double_quant=False).absmax
        # For each op: what is rotated, its bytes, and the bytes of the result. nf4_quantize includes absmax_quantize,
        # as when quantising a model; absmax_quantize is also timed alone.
        cases: dict[str, tuple[Any, int, int]] = {
            "nf4_quantize": (dense, dense.nbytes, weight.nbytes),
            "absmax_quantize": (scales, scales.nbytes, weight.absmax.nbytes),
            "nf4_dequantize": (weight, weight.nbytes, dense.nbytes),
        }
        for format in (FP4, MXFP4, INT8):
            packed = getattr(torch.ops.lowrank_ops, f"{format.name}_quantize")(dense, _block_size(format))
            written = sum(part.nbytes for part in packed)
            cases[f"{format.name}_quantize"] = dense, dense.nbytes, written
            cases[f"{format.name}_dequantize"] = (*packed, (N, K)), written, dense.nbytes
        for op in asked:
            source, read, written = cases[op]
            inputs = [copy.deepcopy(source) for _ in range(copies(read, report.settings))]
            providers = {}
            for name, make in MAKERS[op].items():
                calls = report.build(name, partial(_all, make, inputs))
                if calls:
                    providers[name] = Provider(calls, read + written)
            report.case(op, (N, K), 0, DTYPE, providers, graph=not op.endswith("_quantize") or op == "absmax_quantize")


def _run_adapt(report: Report) -> None:
    """Time adapting the linear layers of a Llama-shaped block of width K, and reading their weights."""
    K = report.settings.shape[1] if report.settings.shape else 4096
    if "adapt" not in report.settings.ops or report.skip(f"adapt, block of width {K}"):
        return
    shapes = [(K, K), (K // 4, K), (K // 4, K), (K, K), (7 * K // 2, K), (7 * K // 2, K), (K, 7 * K // 2)]
    weights = [torch.randn(*shape, device=report.settings.device).to(DTYPE) for shape in shapes]
    size = sum(weight.nbytes for weight in weights)

    def block() -> nn.Module:
        layers = [nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in weights]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)
        return nn.Sequential(*layers)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.safetensors"
        save_file({str(i): weight for i, weight in enumerate(weights)}, path)
        calls: dict[str, Call] = {
            "ours": lambda: lo.adapt(block(), lo.LoRA(16)),
            "bitsandbytes": partial(_bitsandbytes_block, weights),
            "reading from memory": lambda: [w.view(torch.float32).sum() for w in weights],
            "reading from a file": lambda: [w.clone() for w in load_file(path).values()],
        }
        providers = {name: Provider([call], size) for name, call in calls.items()}
        report.case("adapt", (K, K), 0, DTYPE, providers, graph=False)


def _bitsandbytes_block(weights: Sequence[Tensor]) -> object:
    return [_bitsandbytes_quantize(w)() for w in weights]


def _all(make: Callable[[Any], Call], inputs: Sequence[Any]) -> list[Call]:
    return [make(i) for i in inputs]


def bitsandbytes_weight(weight: NF4Weight) -> Any:
    """Make bitsandbytes' Params4bit over the same bytes."""
    from bitsandbytes.nn import Params4bit

    stats = {key.removeprefix("weight."): tensor.clone() for key, tensor in weight.to_bitsandbytes().items()}
    return Params4bit.from_prequantized(stats.pop("weight"), stats, device=weight.device)


def bitsandbytes_linear(weight: NF4Weight, dtype: torch.dtype) -> Any:
    """Make a Linear4bit over the same bytes, without a bias."""
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


def _block_size(format: Format) -> int:
    return 64 if 64 in format.block_sizes else format.block_sizes[0]


def _quantize(format: Format, w: Tensor) -> Call:
    return partial(getattr(torch.ops.lowrank_ops, f"{format.name}_quantize"), w, _block_size(format))


def _dequantize(format: Format, packed: tuple[Any, ...]) -> Call:
    data, scales, shape = packed
    op = getattr(torch.ops.lowrank_ops, f"{format.name}_dequantize")
    return partial(op, data, scales, None, None, *shape, _block_size(format), DTYPE)


def _bitsandbytes_fp4_quantize(w: Tensor) -> Call:
    from bitsandbytes.functional import quantize_4bit

    return partial(quantize_4bit, w, blocksize=64, quant_type="fp4")


def _bitsandbytes_fp4_dequantize(packed: tuple[Any, ...]) -> Call:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    data, absmax, shape = packed
    state = QuantState(absmax, torch.Size(shape), blocksize=64, quant_type="fp4", dtype=DTYPE)
    return partial(dequantize_4bit, data.unsqueeze(1), state)


MAKERS: dict[str, dict[str, Callable[[Any], Call]]] = {
    "nf4_quantize": {"ours": lambda w: partial(NF4Weight.quantize, w), "bitsandbytes": _bitsandbytes_quantize},
    "absmax_quantize": {"ours": lambda absmax: partial(_absmax, absmax), "bitsandbytes": _bitsandbytes_absmax},
    "nf4_dequantize": {"ours": lambda w: partial(w.dequantize, DTYPE), "bitsandbytes": _bitsandbytes_dequantize},
    "fp4_quantize": {"ours": partial(_quantize, FP4), "bitsandbytes": _bitsandbytes_fp4_quantize},
    "fp4_dequantize": {"ours": partial(_dequantize, FP4), "bitsandbytes": _bitsandbytes_fp4_dequantize},
    "mxfp4_quantize": {"ours": partial(_quantize, MXFP4)},
    "mxfp4_dequantize": {"ours": partial(_dequantize, MXFP4)},
    "int8_quantize": {"ours": partial(_quantize, INT8)},
    "int8_dequantize": {"ours": partial(_dequantize, INT8)},
}


SECTIONS = {40: run}
