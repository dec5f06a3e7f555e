"""A frozen branch beside W, y = W x + U_b (D_b x) + bias + s · U C (D drop(x)), in every op that takes one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Sample, Tensors, arguments, assert_bits_equal, assert_within_baseline, make

import lowrank_ops as lo
from lowrank_ops import functional, reference
from lowrank_ops.kernels.operands import Branch
from lowrank_ops.ops import _plan, arena

SAMPLE = Sample(M=7, N=65, K=77, R=5)


def update_of(t: Tensors) -> lo.LowRankUpdate | None:
    if t.down is None:
        return None
    return lo.LowRankUpdate(t.down, t.up, t.core, t.scale, dropout=t.dropout)


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
    t = make(replace(SAMPLE, branch=4))
    branch = change(lo.LowRankUpdate(*t.branch))
    calls = [
        lambda: functional.adapted_linear(t.x, t.weight, branch=branch),
        lambda: functional.prepare(t.weight, branch=branch),
        lambda: functional.routed_linear(t.x, t.weight, [], torch.full((7,), -1), branch=branch),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            call()


@pytest.fixture(params=["few", "many"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    limit = 10**9 if request.param == "few" else 0
    monkeypatch.setattr(_plan, "FEW_TOKENS", dict.fromkeys(_plan.FEW_TOKENS, limit))
    return request.param


OFFSETS = [0, 5, 5, 12, 13]  # of 15 rows: expert 1 has none, and two rows have no expert
E, N, K, R = 4, 33, 64, 4


class Stacks:
    """Operands of experts with a branch; ``wide`` are the same in float64."""

    def __init__(self, device: torch.device, dtype: torch.dtype, quantize: bool, rank: int, core: bool = False) -> None:
        generator = torch.Generator().manual_seed(rank)

        def normal(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype).to(device)

        self.x, self.g, w = normal(15, 2 * K)[:, K // 2 : K // 2 + K], normal(15, N), normal(E, N, K)
        self.weight = lo.NF4Weight.quantize(w.cpu()).to(device) if quantize else w
        self.dense = self.weight.dequantize(torch.float32) if quantize else w
        values = lo.cores.Diagonal(normal(E, R).requires_grad_()) if core else None
        down, up = normal(E, R, K).requires_grad_(), normal(E, N, R).requires_grad_()
        self.update = lo.LowRankUpdate(down, up, values, 1.7)
        self.branch = lo.LowRankUpdate(normal(E, rank, K), normal(E, N, rank))
        self.offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=device)
        self.trained = [down, up] + ([] if values is None else [values.values])

    def factors(self, dtype: torch.dtype) -> tuple[Any, ...]:
        core = None if self.update.core is None else self.update.core.dense().detach().to(dtype)
        down, up = (f.detach().to(dtype) for f in (self.update.down, self.update.up))
        return down, up, core

    def pair(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.branch.down.to(dtype), self.branch.up.to(dtype)


@pytest.mark.parametrize("quantize, rank, core", [(True, 16, False), (False, 1, True), (True, 17, True)])
def test_experts(
    device: torch.device, dtypes: tuple[torch.dtype, ...], form: str, quantize: bool, rank: int, core: bool
) -> None:
    for dtype in (torch.float32, dtypes[0]):
        t = Stacks(device, dtype, quantize, rank, core)
        x = t.x.detach().requires_grad_()
        y = functional.experts_linear(x, t.weight, t.offsets, t.update, branch=t.branch)
        y.backward(t.g)
        judged = []
        for kind in (torch.float64, dtype):
            down, up, c = t.factors(kind)
            w, pair = t.dense.to(kind), t.pair(kind)
            made = reference.experts_linear(t.x.to(kind), w, t.offsets, down, up, scale=1.7, core=c, branch=pair)
            dx, *grads = reference.experts_linear_backward(
                t.g.to(kind), t.x.to(kind), w, t.offsets, down, up, 1.7, core=c, branch=pair
            )
            if core:
                grads[2] = grads[2].diagonal(dim1=-2, dim2=-1)
            judged.append([made, dx, *grads])
        got = [y, x.grad, *(p.grad for p in t.trained)]
        for mine, exact, plain in zip(got, *(j[: len(got)] for j in judged), strict=True):
            for i in range(E) if mine.dim() == 3 else [...]:
                assert_within_baseline(mine[i], exact[i], plain[i])


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("quantize, rank", [(True, 16), (False, 1), (True, 17)])
def test_routed_rows(
    device: torch.device, dtypes: tuple[torch.dtype, ...], form: str, quantize: bool, rank: int, experts: bool
) -> None:
    slots = torch.tensor([0, -1, 1, 0, -1, 0, 1, 0, -1, 0, -1, 1, 0, 0, -1], device=device)
    for dtype in (torch.float32, dtypes[0]):
        t = Stacks(device, dtype, quantize, rank)
        part = slice(None) if experts else 1
        offsets = t.offsets if experts else None
        weight = t.weight if experts else lo.NF4Weight.quantize(t.dense[1].cpu()).to(device) if quantize else t.dense[1]
        dense = weight.dequantize(torch.float32) if quantize else weight
        down, up, _ = t.factors(dtype)
        updates = [lo.LowRankUpdate((f * down)[part], (f * up)[part], scale=f) for f in (1.0, 0.5)]
        branch = lo.LowRankUpdate(*(f[part] for f in t.pair(dtype)))
        y = functional.routed_linear(t.x, weight, updates, slots, offsets=offsets, branch=branch)
        exact, plain = (
            reference.routed_linear(
                t.x.to(kind), dense.to(kind), None,
                [(u.down.to(kind), u.up.to(kind), None, u.scale) for u in updates], slots, offsets,
                (branch.down.to(kind), branch.up.to(kind)),
            )
            for kind in (torch.float64, dtype)
        )  # fmt: skip
        # Two roundings to 16 bits on a GPU: of the base with the branch, and of the sum.
        assert_within_baseline(y, exact, plain)
        if not experts:
            alone = functional.routed_linear(t.x[4:9], weight, updates[::-1], 1 - slots[4:9].clamp(0), branch=branch)
            rows = [i for i in range(4, 9) if slots[i] >= 0]
            assert_bits_equal(alone[[i - 4 for i in rows]], y[rows])
            nobody = functional.routed_linear(t.x, weight, updates, torch.full_like(slots, -1), branch=branch)
            assert_bits_equal(nobody[slots < 0], y[slots < 0])


def test_gradients_reach_x_and_the_update_alone(device: torch.device) -> None:
    t = make(replace(SAMPLE, branch=5), device)
    x, down, up = (f.clone().requires_grad_() for f in (t.x, t.down, t.up))
    branch = lo.LowRankUpdate(*t.branch)
    y = functional.adapted_linear(x, t.weight, lo.LowRankUpdate(down, up, scale=t.scale), t.bias, branch=branch)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    y.backward(g)
    exact, plain = (t.run_reference_backward(g, kind)[:3] for kind in (torch.float64, y.dtype))
    for mine, judge, baseline in zip((x.grad, down.grad, up.grad), exact, plain, strict=True):
        assert_within_baseline(mine, judge, baseline)
    assert branch.down.grad is None and branch.up.grad is None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("op", ["adapted_linear", "experts_linear", "routed_linear"])
def test_opcheck(op: str) -> None:
    if op == "adapted_linear":
        t = make(replace(SAMPLE, branch=5))
        calls = [(torch.ops.lowrank_ops.adapted_linear, t.arguments(x=t.x.clone().requires_grad_()))]
        g = torch.randn(t.x.shape[0], t.out_features)
        h = torch.randn(t.x.shape[0], t.rank)
        needs = (True, True, True, False)
        calls.append((torch.ops.lowrank_ops.adapted_linear_backward, t.backward_arguments(g, t.x, h, *needs)))
    else:
        s = Stacks(torch.device("cpu"), torch.float32, True, 5)
        operands: dict[str, Any] = {
            "x": s.x.contiguous(), "weight": s.weight, "offsets": s.offsets, "out_features": N, "bias": None,
            "branch": Branch(*s.pair(torch.float32)),
        }  # fmt: skip
        if op == "experts_linear":
            down, up, _ = s.factors(torch.float32)
            more = {"rank": R, "down": down, "up": up, "core": None, "scale": 1.0, "dropout": 0.0, "seed": None}
        else:
            memory, table = arena.build([None], torch.device("cpu"), E)
            slots = torch.full((15,), -1, dtype=torch.int32)
            more = {"arena": memory, "table": table, "slots": slots, "strengths": None, "capacity": 1}
        calls = [(getattr(torch.ops.lowrank_ops, op), arguments(op, None, **operands, **more))]
    for function, values in calls:
        torch.library.opcheck(function, values)


def test_gradcheck() -> None:
    t = make(Sample(M=3, N=4, K=6, R=2, branch=3, block_size=0, dtype=torch.float64, factors=torch.float64))
    branch = lo.LowRankUpdate(*t.branch)
    inputs = [f.detach().requires_grad_() for f in (t.x, t.down, t.up)]
    with lo.implementation("reference"):
        assert torch.autograd.gradcheck(
            lambda x, d, u: functional.adapted_linear(x, t.weight, lo.LowRankUpdate(d, u), branch=branch), inputs
        )


def test_compiled_autocast_and_empty() -> None:
    t = make(replace(SAMPLE, branch=5))
    branch = lo.LowRankUpdate(*t.branch)

    def call(x: torch.Tensor) -> torch.Tensor:
        return functional.adapted_linear(x, t.weight, update_of(t), t.bias, branch=branch)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_bits_equal(compiled(t.x), call(t.x))
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits_equal(call(t.x), call(t.x.bfloat16()))
    x = t.x[:0].clone().requires_grad_()
    y = call(x)
    y.sum().backward()
    assert y.shape == (0, t.out_features) and x.grad.shape == x.shape


def test_prepared_calls_follow_the_branch() -> None:
    t = make(replace(SAMPLE, branch=5))
    branch = lo.LowRankUpdate(*t.branch)
    run = functional.prepare(t.weight, t.bias, update_of(t), branch=branch)
    with torch.no_grad():
        assert_bits_equal(run(t.x), functional.adapted_linear(t.x, t.weight, update_of(t), t.bias, branch=branch))
        assert run._bound is not None and run._bound.run is not None
        branch.up.mul_(2)
        assert_bits_equal(run(t.x), functional.adapted_linear(t.x, t.weight, update_of(t), t.bias, branch=branch))
        assert_bits_equal(pickle.loads(pickle.dumps(run))(t.x), run(t.x))


@pytest.mark.parametrize("core", ["", "dense"])
def test_rows_do_not_depend_on_the_batch(form: str, core: str) -> None:
    t = make(Sample(M=37, N=67, K=192, R=5, core=core, branch=16))
    branch = lo.LowRankUpdate(*t.branch)
    whole = functional.adapted_linear(t.x, t.weight, update_of(t), t.bias, branch=branch)
    for rows in (slice(0, 1), slice(3, 8), slice(20, 37)):
        alone = functional.adapted_linear(t.x[rows], t.weight, update_of(t), t.bias, branch=branch)
        assert_bits_equal(alone, whole[rows])
