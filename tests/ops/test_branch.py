"""A frozen branch beside W, y = W x + U_b (D_b x) + bias + s · U C (D drop(x)), in every op that takes one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Sample, Tensors, assert_bits_equal, assert_within_baseline, make

import lowrank_ops as lo
from lowrank_ops import functional, reference


def make_branch(t: Tensors, rank: int, dtype: torch.dtype = torch.bfloat16) -> lo.LowRankUpdate:
    generator = torch.Generator().manual_seed(1)
    N, K = t.weight.shape
    down = torch.randn(rank, K, generator=generator) * K**-0.5
    up = torch.randn(N, rank, generator=generator) * rank**-0.5
    return lo.LowRankUpdate(down.to(dtype).to(t.x.device), up.to(dtype).to(t.x.device))


def update_of(t: Tensors) -> lo.LowRankUpdate | None:
    if t.down is None:
        return None
    return lo.LowRankUpdate(t.down, t.up, t.core, t.scale, dropout=t.dropout)


def test_adapted_linear(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    sample = Sample(M=7, N=65, K=77, R=5)
    for rank in (1, 16, 17):
        for dtype in (torch.float32, *dtypes):
            t = make(replace(sample, dtype=dtype), device)
            branch = make_branch(t, rank, dtypes[0])
            y = functional.adapted_linear(t.x, t.weight, update_of(t), t.bias, branch=branch)
            exact, plain = (
                t.run_reference(kind) + t.x.to(kind) @ branch.down.to(kind).T @ branch.up.to(kind).T
                for kind in (torch.float64, dtype)
            )
            assert_within_baseline(y, exact, plain)
            with torch.no_grad():
                assert_bits_equal(functional.prepare(t.weight, t.bias, update_of(t), branch=branch)(t.x), y)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.down, "branch must be a LowRankUpdate or None, got Tensor"),
        (lambda b: replace(b, scale=2.0), "branch must have no core, no dropout and scale 1"),
        (lambda b: replace(b, dropout=0.5), "branch must have no core, no dropout and scale 1"),
        (lambda b: replace(b, core=lo.cores.Diagonal(torch.ones(4))), "branch must have no core"),
        (lambda b: replace(b, down=b.down[:, 1:]), r"branch.down must be \[4, 77\] for a weight 65 x 77"),
        (lambda b: replace(b, up=b.up[1:]), r"branch.up must be \[65, 4\] for a weight 65 x 77"),
        (lambda b: replace(b, up=b.up.double()), "branch.up must be float32, bfloat16 or float16"),
        (lambda b: replace(b, up=b.up.T.contiguous().T), "branch.up must be contiguous"),
        (lambda b: replace(b, up=b.up.to("meta")), "branch.up is on meta and x on cpu"),
        (lambda b: replace(b, up=b.up.clone().requires_grad_()), "branch.up is frozen here"),
        (lambda b: replace(b, down=lo.NF4Weight.quantize(b.down)), "branch.down must be a dense Tensor, got NF4Weight"),
    ],
)
def test_a_wrong_branch_is_named(change: Any, message: str) -> None:
    t = make(Sample(M=7, N=65, K=77, R=5))
    branch = change(make_branch(t, 4))
    calls = [
        lambda: functional.adapted_linear(t.x, t.weight, branch=branch),
        lambda: functional.prepare(t.weight, branch=branch),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_experts_and_routed_rows(device: torch.device) -> None:
    E, N, K, R = 3, 33, 64, 4
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device)

    x, w, u, b = normal(11, K), normal(E, N, K), normal(E, N, R), normal(E, N, 5)
    update, branch = lo.LowRankUpdate(normal(E, R, K), u, scale=2.0), lo.LowRankUpdate(normal(E, 5, K), b)
    whole = w.double() + branch.delta().double()
    y = functional.experts_linear(x, w, offsets, update, branch=branch)
    factors = update.down.double(), update.up.double(), None, 2.0
    exact = reference.experts_linear(x.double(), whole, offsets, *factors[:2], scale=2.0)
    assert_within_baseline(y, exact, exact.float())
    slots = torch.tensor([0, -1, 0, 0, -1, 0, 0, 0, -1, 0, -1], device=device)
    for own in (None, offsets):
        part = slice(None) if own is not None else 0
        one, two = (
            lo.LowRankUpdate(f.down[part].contiguous(), f.up[part].contiguous(), scale=f.scale)
            for f in (update, branch)
        )
        y = functional.routed_linear(x, w[part], [one], slots, offsets=own, branch=two)
        exact = reference.routed_linear(
            x.double(), whole[part], None, [(one.down.double(), one.up.double(), None, 2.0)], slots, own
        )
        assert_within_baseline(y, exact, exact.float())
