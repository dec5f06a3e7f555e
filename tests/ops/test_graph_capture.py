"""Ops in a CUDA graph: a replay reads new numbers and gives the bits of a call outside the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops import functional
from lowrank_ops.kernels.operands import Matrix
from lowrank_ops.ops import arena

N, K, R, E = 192, 256, 8, 4
Product = Callable[[Tensor], Tensor]


def update(*stack: int, dtype: torch.dtype = torch.float32) -> functional.LowRankUpdate:
    down, up = (torch.randn(*stack, *size, device="cuda", dtype=dtype) / 8 for size in ((R, K), (N, R)))
    return functional.LowRankUpdate(down, up)


def linear(M: int) -> Product:
    weight, added = lo.NF4Weight.quantize(torch.randn(N, K, device="cuda")), update()
    return lambda x: functional.adapted_linear(x, weight, added)


def routed(M: int) -> Product:
    weight = lo.NF4Weight.quantize(torch.randn(N, K, device="cuda"))
    updates = [update(dtype=torch.bfloat16) for _ in range(3)]
    rows = [(R, Matrix(u.down), Matrix(u.up), None, u.scale) for u in updates]
    memory, table = arena.build(rows, torch.device("cuda"))
    slots = (torch.arange(M, device="cuda") % 4 - 1).int()
    return lambda x: functional.routed(x, weight, memory, table, slots, None)


def mixed(M: int) -> Product:
    """Two updates a row, whose slots and strengths change in place at every call."""
    weight, updates = lo.NF4Weight.quantize(torch.randn(N, K, device="cuda")), [update() for _ in range(3)]
    rows = [(R, Matrix(u.down), Matrix(u.up), None, u.scale) for u in updates]
    memory, table = arena.build(rows, torch.device("cuda"))
    slots, strengths = torch.zeros(M, 2, dtype=torch.int32, device="cuda"), torch.ones(M, 2, device="cuda")

    def product(x: Tensor) -> Tensor:
        slots.copy_((x[:, :2] * 4).int() % 4 - 1)
        strengths.copy_(x[:, 2:4])
        return functional.routed(x, weight, memory, table, slots, None, strengths=strengths)

    return product


def experts(M: int) -> Product:
    weight, added = lo.NF4Weight.quantize(torch.randn(E, N, K, device="cuda")), update(E)
    offsets = torch.tensor([0, M // 3, M // 3, M - 1, M], dtype=torch.int32, device="cuda")
    return lambda x: functional.experts_linear(x, weight, offsets, added)


def training(M: int) -> Product:
    forward, g = linear(M), torch.randn(M, N, device="cuda").bfloat16()

    def step(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(forward(x), x, g)[0]

    return step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("make", [linear, routed, mixed, experts, training], ids=lambda make: f"cuda-{make.__name__}")
@torch.no_grad()
def test_a_replay_gives_the_bits_of_a_call(make: Callable[[int], Product], M: int) -> None:
    product = make(M)
    x = torch.randn(M, K, device="cuda").bfloat16()
    product(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x)
    for _ in range(2):
        x.copy_(torch.randn(M, K, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, product(x))
