"""svd_linear (forward) and svd_linear_backward (a training step): U C Vᵀ in place of W, U and Vᵀ in NF4, C diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops import NF4Weight, cores
from lowrank_ops.functional import svd_linear

from ..common import Provider, Settings, copies
from ..report import Report

OPS = ("svd_linear", "svd_linear_backward")
SHAPE = (4096, 4096)
TOKENS = {"svd_linear": (1, 16, 64, 512), "svd_linear_backward": (64, 512)}
QUICK = {"svd_linear": (1, 64), "svd_linear_backward": (64,)}


@dataclass(frozen=True)
class Layer:
    """y = forward(x), the bytes of its weight, and the values that get a gradient in a training step."""

    forward: Callable[[Tensor], Tensor]
    weight_bytes: int
    values: Tensor


@dataclass(frozen=True)
class Factors:
    """U and Vᵀ in bfloat16; every layer makes its own copy."""

    u: Tensor
    vt: Tensor

    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u.clone(), self.vt.clone(), torch.randn(len(self.vt), device=self.u.device).requires_grad_()


def ours(factors: Factors) -> Layer:
    u, vt, values = factors.own()
    packed = [NF4Weight.quantize(factor) for factor in (u, vt)]
    core = cores.Diagonal(values)
    return Layer(lambda x: svd_linear(x, packed[0], core, packed[1]), sum(p.nbytes for p in packed), values)


def dense(factors: Factors) -> Layer:
    """Use the same factors in the dtype of x, and torch's products, without NF4."""
    u, vt, values = factors.own()
    return Layer(lambda x: F.linear(F.linear(x, vt) * values.to(x.dtype), u), u.nbytes + vt.nbytes, values)


def dequantise(factors: Factors) -> Layer:
    """Decode with our kernel into fresh dense factors, then use torch's products."""
    u, vt, values = factors.own()
    packed = [NF4Weight.quantize(factor) for factor in (u, vt)]

    def forward(x: Tensor) -> Tensor:
        h = F.linear(x, packed[1].dequantize(u.dtype)) * values.to(x.dtype)
        return F.linear(h, packed[0].dequantize(u.dtype))

    return Layer(forward, sum(p.nbytes for p in packed), values)


def materialise(factors: Factors) -> Layer:
    """Build W' at each call, as SVFT's released code does, and multiply by it."""
    u, vt, values = factors.own()
    return Layer(lambda x: F.linear(x, (u * values.to(u.dtype)) @ vt), u.nbytes + vt.nbytes, values)


MAKERS = {
    "ours": ours,
    "dense factors": dense,
    "dequantise + dense factors": dequantise,
    "W' materialised": materialise,
}


def run(report: Report) -> None:
    settings = report.settings
    dtype, device = torch.bfloat16, settings.device
    if not set(OPS) & set(settings.ops) or report.skip("svd_linear"):
        return
    layers: dict[str, Sequence[Layer]] = {}
    N, K = shape = settings.shapes(SHAPE)[0]
    R = min(shape)
    factors = Factors(*(torch.randn(size, device=device).to(dtype) / 64 for size in ((N, R), (R, K))))
    for name, make in MAKERS.items():
        if found := report.build(name, partial(rotated, make, factors, settings)):
            layers[name] = found
    for op in (op for op in OPS if op in settings.ops):
        training = op == "svd_linear_backward"
        with torch.set_grad_enabled(training):
            for M in QUICK[op] if settings.quick else TOKENS[op]:
                report.case(op, shape, M, dtype, calls(layers, shape, M, dtype, device, training))


def rotated(make: Callable[[Factors], Layer], factors: Factors, settings: Settings) -> list[Layer]:
    first = make(factors)
    return [first, *(make(factors) for _ in range(copies(first.weight_bytes, settings) - 1))]


def calls(
    layers: dict[str, Sequence[Layer]],
    shape: tuple[int, int],
    M: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
) -> dict[str, Provider]:
    (N, K), R = shape, min(shape)
    x, g = (torch.randn(M, size, device=device).to(dtype) for size in (K, N))
    x.requires_grad_(training)

    def step(layer: Layer) -> object:
        return torch.autograd.grad(layer.forward(x), [x, layer.values], g)

    providers = {}
    for name, rotation in layers.items():
        times = 2 if training else 1
        moved = times * (rotation[0].weight_bytes + M * (N + K) * x.itemsize)
        providers[name] = Provider(
            [partial(step, i) if training else partial(i.forward, x) for i in rotation],
            moved,
            times * 2 * M * R * (N + K),
        )
    return providers


SECTIONS = {100: run}
