"""The op y = U C (Vᵀ x) + bias against float64, and opcheck, autograd, compile."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from helpers import (
    arguments,
    assert_bits_equal,
    assert_within_baseline,
    dense,
    make_core,
    on_device,
    places,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops import NF4Weight, reference
from lowrank_ops.ops import _plan

OP = torch.ops.lowrank_ops.svd_linear
BACKWARD = torch.ops.lowrank_ops.svd_linear_backward
FORMS = {"few": 10**9, "many": 0}


@dataclass(frozen=True)
class Sample:
    M: int
    N: int
    K: int
    R: int
    core: str
    dtype: torch.dtype = torch.float32
    nf4: bool = True
    bias: bool = True

    def __str__(self) -> str:
        options = [str(self.dtype).removeprefix("torch."), "nf4" if self.nf4 else "dense"]
        return f"M{self.M}-N{self.N}-K{self.K}-R{self.R}-{self.core}-{'-'.join(options)}"


SAMPLES = [
    Sample(1, 48, 128, 16, "diagonal"),
    Sample(3, 48, 128, 48, "band4"),
    Sample(17, 65, 77, 33, "band32", nf4=False),
    Sample(63, 67, 192, 64, "sparse"),
    Sample(7, 65, 129, 65, "diagonal", bias=False),
    Sample(5, 40, 64, 5, "dense"),
    Sample(1, 1, 1, 1, "diagonal", nf4=False),
    Sample(600, 30, 20, 18, "band1"),  # more tokens than a block holds
]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_plan, "FEW_TOKENS", dict.fromkeys(_plan.FEW_TOKENS, FORMS[request.param]))
    return request.param


@dataclass
class Tensors:
    x: Tensor
    u: Tensor | NF4Weight
    core: lo.cores.Core
    vt: Tensor | NF4Weight
    bias: Tensor | None

    @property
    def sizes(self) -> dict[str, int]:
        return {"out_features": self.u.shape[0], "in_features": self.vt.shape[1], "rank": self.u.shape[1]}

    def arguments(self) -> tuple:
        return arguments("svd_linear", self, **self.sizes)

    def backward_arguments(self, g: Tensor, h: Tensor | None, need_x: bool, need_core: bool) -> tuple:
        return arguments("svd_linear_backward", self, g=g, h=h, need_x=need_x, need_core=need_core, **self.sizes)

    def reference(self, dtype: torch.dtype, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, u, vt = self.x.to(dtype), dense(self.u, dtype), dense(self.vt, dtype)
        core = self.core.dense().detach()
        core = core.double() if dtype == torch.float64 else core
        y = reference.svd_linear(x, u, core, vt, self.bias)
        dx, dcore = reference.svd_linear_backward(g.to(dtype), x @ vt.T, u, core, vt)
        return y, dx, reference.core_values(dcore, self.core.values, self.core.index)


def make(s: Sample, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = s.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    u, vt = normal(s.N, s.R, std=s.R**-0.5), normal(s.R, s.K, std=s.K**-0.5)
    factors = [NF4Weight.quantize(f.cpu().float(), 32).to(device) if s.nf4 else f for f in (u, vt)]
    core = make_core(s.core, s.R, torch.float64 if s.dtype == torch.float64 else torch.float32, generator)
    bias = normal(s.N) if s.bias else None
    return Tensors(normal(s.M, s.K), factors[0], on_device(core, device), factors[1], bias)


def check(sample: Sample, device: torch.device) -> None:
    t = make(sample, device)
    g = torch.randn(sample.M, sample.N, generator=torch.Generator().manual_seed(1)).to(sample.dtype).to(device)
    y, h = OP(*t.arguments())
    assert h.shape == (sample.M, sample.R) and h.dtype == sample.dtype
    dx, dcore = BACKWARD(*t.backward_arguments(g, h, True, True))
    exact, plain = t.reference(torch.float64, g), t.reference(sample.dtype, g)
    for mine, judge, baseline in zip((y, dx, dcore), exact, plain, strict=True):
        assert_within_baseline(mine, judge, baseline)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_float32(sample: Sample, device: torch.device, form: str) -> None:
    check(sample, device)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.N > 1], ids=str)
def test_16_bit(sample: Sample, device: torch.device, form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        check(replace(sample, dtype=dtype), device)


def test_every_instruction_set(isa: str, form: str) -> None:
    for sample in SAMPLES[:-1]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if dtype == torch.float32 or sample.N > 1:
                check(replace(sample, dtype=dtype), torch.device("cpu"))


@settings(
    max_examples=8 if _plan.interpreted() else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    sample=st.builds(
        Sample,
        M=st.integers(1, 40),
        N=st.integers(16, 70),
        K=st.integers(16, 150),
        R=st.integers(3, 60),
        core=st.sampled_from(("diagonal", "band1", "band2", "sparse", "dense")),
        dtype=st.sampled_from((torch.float32, torch.float16)),
        nf4=st.booleans(),
        bias=st.booleans(),
    )
)
def test_any_shape(sample: Sample, device: torch.device, form: str) -> None:
    check(sample, device)


def test_rows_and_threads(form: str) -> None:
    t = make(Sample(37, 67, 192, 70, "band3", torch.bfloat16))
    g = torch.randn(37, 67).bfloat16()
    whole, h = OP(*t.arguments())
    grads = BACKWARD(*t.backward_arguments(g, h, True, True))
    for rows in (slice(0, 1), slice(3, 8), slice(20, 37)):
        assert_bits_equal(OP(t.x[rows], *t.arguments()[1:])[0], whole[rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_bits_equal(OP(*t.arguments())[0], whole)
            for again, first in zip(BACKWARD(*t.backward_arguments(g, h, True, True)), grads, strict=True):
                assert_bits_equal(again, first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("core", ["diagonal", "band1", "sparse", "dense"])
def test_gradcheck_in_float64(core: str) -> None:
    t = make(Sample(4, 7, 10, 5, core, torch.float64, nf4=False))
    operands = [v.detach().requires_grad_() for v in (t.x, t.core.values, t.bias)]

    def function(x, values, bias):  # type: ignore[no-untyped-def]
        return OP(*replace(t, x=x, bias=bias, core=lo.cores.with_values(t.core, values)).arguments())[0]

    with lo.implementation("reference"):
        assert torch.autograd.gradcheck(function, operands)


@pytest.mark.parametrize(
    "sample", [*SAMPLES[:2], Sample(3, 10, 12, 6, "sparse"), Sample(2, 9, 7, 5, "band2", nf4=False)], ids=str
)
def test_opcheck(sample: Sample, device: torch.device) -> None:
    t = make(sample, device)
    trained = places("svd_linear", "x", "core", "bias")
    values = [v.detach().requires_grad_() if i in trained else v for i, v in enumerate(t.arguments())]
    torch.library.opcheck(OP.default, tuple(values))
    g, h = torch.randn(sample.M, sample.N, device=device), torch.randn(sample.M, sample.R, device=device)
    torch.library.opcheck(BACKWARD.default, t.backward_arguments(g, h, True, True))


def test_through_autograd(device: torch.device) -> None:
    t = make(SAMPLES[1], device)
    x, values, bias = (v.detach().clone().requires_grad_() for v in (t.x, t.core.values, t.bias))
    core = lo.cores.Banded(values, t.core.size)
    y = lo.functional.svd_linear(x.view(1, 3, -1), t.u, core, t.vt, bias)
    assert y.shape == (1, 3, 48)
    y.square().sum().backward()
    g = 2 * y.detach().view(3, 48)
    exact = t.reference(torch.float64, g)
    for leaf, judge, plain in zip((x, values), exact[1:], t.reference(torch.float32, g)[1:], strict=True):
        assert_within_baseline(leaf.grad, judge, plain)
    torch.testing.assert_close(bias.grad, g.sum(0))
    # h alone is kept for the core's gradient, and x never is.
    own = {b.untyped_storage().data_ptr() for w in (t.u, t.vt) for b in w.buffers()} | {
        values.untyped_storage().data_ptr()
    }
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lo.functional.svd_linear(x, t.u, core, t.vt)
    assert sum(kept.values()) == 3 * 48 * 4


def test_empty_batch(device: torch.device) -> None:
    t = make(SAMPLES[0], device)
    x, values = t.x[:0].clone().requires_grad_(), t.core.values.clone().requires_grad_()
    y = lo.functional.svd_linear(x, t.u, lo.cores.Diagonal(values), t.vt)
    y.sum().backward()
    assert y.shape == (0, 48) and x.grad.shape == x.shape and not values.grad.any()


def test_compile_fullgraph() -> None:
    t = make(SAMPLES[3])
    x, values = t.x.clone().requires_grad_(), t.core.values.clone().requires_grad_()

    def run(x: Tensor, values: Tensor) -> Tensor:
        return lo.functional.svd_linear(x, t.u, lo.cores.with_values(t.core, values), t.vt)

    expected = torch.autograd.grad(run(x, values).square().sum(), (x, values))
    got = torch.autograd.grad(torch.compile(run, fullgraph=True)(x, values).square().sum(), (x, values))
    for mine, eager in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, eager)


U, VT, C = torch.randn(6, 3), torch.randn(3, 8), lo.cores.Diagonal(torch.ones(3))


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "x must be a Tensor", lambda f: f([1.0], U, C, VT)),
        (ValueError, r"x must be \[..., K=8\].*\[2, 7\]", lambda f: f(torch.ones(2, 7), U, C, VT)),
        (TypeError, "u must be a Tensor", lambda f: f(torch.ones(2, 8), None, C, VT)),
        (ValueError, "agree in R", lambda f: f(torch.ones(2, 8), U, C, VT[:2])),
        (ValueError, "core must be 3 x 3.*2 x 2", lambda f: f(torch.ones(2, 8), U, lo.cores.Dense(torch.eye(2)), VT)),
        (TypeError, "core must be one of", lambda f: f(torch.ones(2, 8), U, torch.eye(3), VT)),
        (ValueError, "vt must be contiguous", lambda f: f(torch.ones(2, 6), U, C, U.T)),
        (ValueError, "u is frozen", lambda f: f(torch.ones(2, 8), U.clone().requires_grad_(), C, VT)),
        (TypeError, "vt must be float32.*float64", lambda f: f(torch.ones(2, 8), U, C, VT.double())),
        (ValueError, r"bias must be \[6\].*\[5\]", lambda f: f(torch.ones(2, 8), U, C, VT, torch.ones(5))),
    ],
)
def test_bad_input(error: type[Exception], message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(lo.functional.svd_linear)
