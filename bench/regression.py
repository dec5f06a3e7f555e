"""One small case for each registered op, for pytest-benchmark: compare two runs of ``make bench-regression``.

The cases end in seconds, so that a slowdown shows before a commit; the suite measures speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_ops import NF4Weight, cores
from lowrank_ops.bench.cases import bench_routed_linear
from lowrank_ops.functional import LowRankUpdate, adapted_linear, experts_linear, svd_linear
from lowrank_ops.preference import bradley_terry_loss

N, K, R = 1024, 512, 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def weight(rows: int, columns: int) -> NF4Weight:
    return NF4Weight.quantize(normal(rows, columns).bfloat16())


def backward(y: Tensor, *inputs: Tensor) -> Callable[[], object]:
    """Time the backward op alone; its graph is kept."""
    g = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, inputs, g, retain_graph=True)


def quantize(op: str, block_size: int, M: int) -> Callable[[], object]:
    w = normal(N, K).bfloat16()
    return lambda: getattr(torch.ops.lowrank_ops, op)(w, block_size)


def dequantize(format: str, block_size: int, M: int) -> Callable[[], object]:
    packed, scales = getattr(torch.ops.lowrank_ops, f"{format}_quantize")(normal(N, K).bfloat16(), block_size)
    op = getattr(torch.ops.lowrank_ops, f"{format}_dequantize")
    return lambda: op(packed, scales, None, None, N, K, block_size, torch.bfloat16)


def absmax_quantize(M: int) -> Callable[[], object]:
    absmax = normal(N * K // 64).abs()
    offset = absmax.mean()
    return lambda: torch.ops.lowrank_ops.absmax_quantize(absmax, offset)


def nf4_dequantize(M: int) -> Callable[[], object]:
    w = weight(N, K)
    return lambda: w.dequantize(torch.bfloat16)


def lora() -> tuple[NF4Weight, Tensor, Tensor]:
    return weight(N, K), normal(R, K).requires_grad_(), normal(N, R).requires_grad_()


def forward_of_adapted_linear(M: int) -> Callable[[], object]:
    w, down, up = lora()
    x, update = normal(M, K).bfloat16(), LowRankUpdate(down.detach(), up.detach())
    return lambda: adapted_linear(x, w, update)


def backward_of_adapted_linear(M: int) -> Callable[[], object]:
    w, down, up = lora()
    x = normal(M, K).bfloat16().requires_grad_()
    return backward(adapted_linear(x, w, LowRankUpdate(down, up)), x, down, up)


def experts(M: int) -> tuple[Tensor, NF4Weight, Tensor, list[Tensor]]:
    """Rows of 16 experts, in equal parts."""
    x, w = normal(M, K).bfloat16().requires_grad_(), NF4Weight.quantize(normal(16, N, K).bfloat16())
    offsets = (torch.arange(17, device=DEVICE) * M // 16).int()
    return x, w, offsets, [normal(16, R, K).requires_grad_(), normal(16, N, R).requires_grad_()]


def forward_of_experts_linear(M: int) -> Callable[[], object]:
    x, w, offsets, (down, up) = experts(M)
    x, update = x.detach(), LowRankUpdate(down.detach(), up.detach())
    return lambda: experts_linear(x, w, offsets, update)


def backward_of_experts_linear(M: int) -> Callable[[], object]:
    x, w, offsets, (down, up) = experts(M)
    return backward(experts_linear(x, w, offsets, LowRankUpdate(down, up)), x, down, up)


def vectors() -> tuple[NF4Weight, Tensor, NF4Weight]:
    return weight(N, 256), normal(256).requires_grad_(), weight(256, K)


def forward_of_svd_linear(M: int) -> Callable[[], object]:
    u, values, vt = vectors()
    x, core = normal(M, K).bfloat16(), cores.Diagonal(values.detach())
    return lambda: svd_linear(x, u, core, vt)


def backward_of_svd_linear(M: int) -> Callable[[], object]:
    u, values, vt = vectors()
    x = normal(M, K).bfloat16().requires_grad_()
    return backward(svd_linear(x, u, cores.Diagonal(values), vt), x, values)


def routed(M: int) -> Callable[[], object]:
    updates = [LowRankUpdate(normal(R, K), normal(N, R)) for _ in range(8)]
    w, x, slots = weight(N, K), normal(M, K).bfloat16(), torch.arange(M, device=DEVICE) % 8
    memory, table = bench_routed_linear.pooled(updates, DEVICE)
    return lambda: torch.ops.lowrank_ops.routed_linear(
        x, w.packed, w.absmax, w.absmax2, w.offset, w.block_size, N, None, memory, table, slots.int()
    )


def loss(M: int) -> Callable[[], object]:
    chosen, rejected = normal(M), normal(M)
    return lambda: bradley_terry_loss(chosen, rejected)


def backward_of_loss(M: int) -> Callable[[], object]:
    chosen, rejected = normal(M).requires_grad_(), normal(M).requires_grad_()
    return backward(bradley_terry_loss(chosen, rejected), chosen, rejected)


# The op, the function that makes a call of it, and the numbers of tokens (0 if it has none).
CASES: dict[str, tuple[Callable[[int], Callable[[], object]], tuple[int, ...]]] = {
    "nf4_quantize": (partial(quantize, "nf4_quantize", 64), (0,)),
    "fp4_quantize": (partial(quantize, "fp4_quantize", 64), (0,)),
    "fp4_dequantize": (partial(dequantize, "fp4", 64), (0,)),
    "mxfp4_quantize": (partial(quantize, "mxfp4_quantize", 32), (0,)),
    "mxfp4_dequantize": (partial(dequantize, "mxfp4", 32), (0,)),
    "int8_quantize": (partial(quantize, "int8_quantize", 64), (0,)),
    "int8_dequantize": (partial(dequantize, "int8", 64), (0,)),
    "absmax_quantize": (absmax_quantize, (0,)),
    "nf4_dequantize": (nf4_dequantize, (0,)),
    "adapted_linear": (forward_of_adapted_linear, (1, 64)),
    "adapted_linear_backward": (backward_of_adapted_linear, (1, 64)),
    "experts_linear": (forward_of_experts_linear, (16, 512)),
    "experts_linear_backward": (backward_of_experts_linear, (16, 512)),
    "svd_linear": (forward_of_svd_linear, (1, 64)),
    "svd_linear_backward": (backward_of_svd_linear, (1, 64)),
    "routed_linear": (routed, (1, 64)),
    "bradley_terry_loss": (loss, (64,)),
    "bradley_terry_loss_backward": (backward_of_loss, (64,)),
}


@pytest.mark.parametrize(("op", "M"), [(op, M) for op, (_, tokens) in CASES.items() for M in tokens])
def test_op(benchmark: Any, op: str, M: int) -> None:
    torch.manual_seed(0)
    call = CASES[op][0](M)

    def run() -> object:
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    assert benchmark(run) is not None
