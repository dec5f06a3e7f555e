"""experts_linear and experts_linear_backward: every kind of weight and core against float64, opcheck, autograd, compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import Sample, arguments, assert_bits_equal, assert_within_baseline, make_core, places
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops import cores, reference
from lowrank_ops.bench import common, goals, peak
from lowrank_ops.bench.cases import bench_experts_linear as bench
from lowrank_ops.cores import Core
from lowrank_ops.formats import WEIGHTS, QuantizedWeight
from lowrank_ops.functional import experts_linear
from lowrank_ops.kernels.operands import NF4
from lowrank_ops.ops import _cpu, _plan

OP = torch.ops.lowrank_ops.experts_linear
BACKWARD = torch.ops.lowrank_ops.experts_linear_backward
FORMS = {"few": 10**9, "many": 0}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every sample in both forms, also in the form that the planner would not choose."""
    monkeypatch.setattr(_plan, "FEW_TOKENS", dict.fromkeys(_plan.FEW_TOKENS, FORMS[request.param]))
    return request.param


@dataclass(frozen=True)
class Mix:
    """One input: the rows of each expert, rows of no expert behind them, and the rest as in helpers.Sample."""

    rows: Sequence[int]
    of: Sample  # M is not read
    rest: int = 0
    format: str = "nf4"

    def __str__(self) -> str:
        return f"{list(self.rows)}+{self.rest}-{self.format}-{self.of}"


_BASE = Sample(M=0, N=48, K=128, R=5)
# Blocks run over rows, experts begin in the middle of a row's block, and there are experts without rows at the beginning,
# in the middle and at the end.
MIXES = [
    Mix([3, 0, 1, 9], _BASE, rest=2),
    Mix([0, 17, 1, 0], replace(_BASE, N=67, K=192, R=16, dropout=0.3)),
    Mix([1, 2, 0, 40], replace(_BASE, N=65, K=77, R=5, block_size=32)),
    Mix([5], replace(_BASE, N=7, K=251, R=7, block_size=128, double_quant=False), rest=1),
    Mix([1, 1, 1], replace(_BASE, N=9, K=33, R=1, block_size=4096, strided=True)),
    Mix([0, 0, 4], replace(_BASE, R=0)),
    Mix([12, 0, 3], replace(_BASE, N=65, K=129, R=5, block_size=0), rest=3),
    Mix([2, 33], replace(_BASE, N=50, K=70, R=4, block_size=0, bias=False, dropout=0.1)),
    Mix([4, 30], replace(_BASE, N=34, K=320, R=5, mean=3.0, bias=False)),
    Mix([6, 0, 2], _BASE, format="fp4"),
    Mix([6, 0, 25], replace(_BASE, N=33, K=96), format="mxfp4"),
    Mix([3, 20], replace(_BASE, core="diagonal"), rest=1),
    Mix([0, 17, 2], replace(_BASE, core="band3", R=16, dropout=0.2)),
    Mix([7, 0, 19], replace(_BASE, N=65, K=77, R=20, core="sparse")),
    Mix([5, 18], replace(_BASE, N=99, K=65, R=33, core="dense", nf4_factors=True)),
    Mix([3, 0, 33], replace(_BASE, R=48, core="dense", dropout=0.2, double_quant=False)),
    Mix([0, 0, 0], _BASE, rest=3),
]


@dataclass
class Tensors:
    """The operands of one mix; ``dense(dtype)`` decodes the stacks as the op does."""

    x: Tensor
    weight: Tensor | QuantizedWeight
    offsets: Tensor
    rank: int
    down: Tensor | QuantizedWeight | None
    up: Tensor | QuantizedWeight | None
    core: Core | None
    bias: Tensor | None
    scale: float
    dropout: float
    seed: Tensor | None
    out_features: int
    in_features: int
    branch: None = None

    def arguments(self, **others: Any) -> tuple:
        return arguments("experts_linear", self, **others)

    def backward_arguments(self, g: Tensor, x: Tensor | None, h: Tensor | None, *needs: bool) -> tuple:
        needed = dict(zip(("need_x", "need_down", "need_up", "need_core"), needs, strict=True))
        return arguments("experts_linear_backward", self, g=g, x=x, h=h, **needed)

    def _operands(self, dtype: torch.dtype) -> tuple:
        def decode(stack: Tensor | QuantizedWeight | None, to: torch.dtype) -> Tensor | None:
            if not isinstance(stack, QuantizedWeight):
                return None if stack is None else stack.to(to)
            wide = stack.dequantize(torch.float32 if to == torch.float64 else to)
            return wide.to(to)

        # Gradients have the dtype of the factors, so that these stay as they are for the baseline.
        wide = dtype == torch.float64
        down, up = (decode(f, dtype) if wide or isinstance(f, QuantizedWeight) else f for f in (self.down, self.up))
        core = None if self.core is None else self.core.dense().detach()
        return decode(self.weight, dtype), down, up, core.double() if wide and core is not None else core

    def run_reference(self, dtype: torch.dtype) -> Tensor:
        weight, down, up, core = self._operands(dtype)
        options = (self.scale, self.dropout, self.seed)
        return reference.experts_linear(self.x.to(dtype), weight, self.offsets, down, up, self.bias, *options, core)

    def run_reference_backward(self, g: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        weight, down, up, core = self._operands(dtype)
        dx, ddown, dup, dcore = reference.experts_linear_backward(
            g.to(dtype),
            self.x.to(dtype),
            weight,
            self.offsets,
            down,
            up,
            self.scale,
            self.dropout,
            self.seed,
            core=core,
        )
        if dcore is not None and self.core is not None:
            pairs = zip(dcore, self.core.values, strict=True)
            dcore = torch.stack([reference.core_values(matrix, v, self.core.index) for matrix, v in pairs])
        return dx, ddown, dup, dcore


def make(mix: Mix, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    s, E, P = mix.of, len(mix.rows), sum(mix.rows) + mix.rest

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    x = normal(P, 2 * s.K if s.strided else s.K, dtype=s.dtype) + s.mean
    x = x.to(device)[:, s.K // 2 : s.K // 2 + s.K] if s.strided else x.to(device)
    x[sum(mix.rows) :] = float("nan")  # what rows of no expert hold must not matter
    weight: Any = normal(E, s.N, s.K, dtype=s.dtype if s.dtype != torch.float64 else torch.float32, std=s.K**-0.5)
    if mix.format != "nf4":
        weight = WEIGHTS[mix.format].quantize(weight)
    elif s.block_size:
        weight = lo.NF4Weight.quantize(weight, s.block_size, s.double_quant)
    down: Any = None
    up: Any = None
    core = None
    if s.R:
        down = normal(E, s.R, s.K, dtype=s.factors, std=s.K**-0.5)
        up = normal(E, s.N, s.R, dtype=s.factors, std=s.R**-0.5)
        if s.nf4_factors:
            down, up = lo.NF4Weight.quantize(down, 64), lo.NF4Weight.quantize(up, 32)
        if s.core:
            core = stack_core(s.core, E, s.R, s.factors, generator, device)
    bias = normal(E, s.N, dtype=s.factors).to(device) if s.bias else None
    offsets = torch.tensor([0, *torch.tensor(mix.rows).cumsum(0).tolist()], dtype=torch.int32, device=device)
    mask_seed = torch.tensor([seed * 2**33 + 12345], device=device) if s.dropout else None
    down, up = (None if factor is None else factor.to(device) for factor in (down, up))
    return Tensors(
        x, weight.to(device), offsets, s.R, down, up, core, bias, 1.7, s.dropout if s.R else 0.0, mask_seed, s.N, s.K
    )


def stack_core(
    kind: str, E: int, R: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device | str
) -> Core:
    one = make_core(kind, R, dtype, generator)
    assert one is not None
    values = (torch.randn(E, *one.values.shape, generator=generator) * 0.5).to(dtype).to(device)
    if isinstance(one, cores.Sparse):
        return cores.Sparse.from_index(one.index.to(device), values, R)
    return cores.with_values(one, values)


def check(mix: Mix, device: torch.device) -> None:
    t, s = make(mix, device), mix.of
    y, h = OP(*t.arguments())
    assert_within_baseline(y, t.run_reference(torch.float64), t.run_reference(s.dtype))
    taken = sum(mix.rows)
    assert h.dtype == torch.float32 and h.shape == (len(t.x), s.R) and not y[taken:].any() and not h[taken:].any()

    g = torch.randn(len(t.x), s.N, generator=torch.Generator().manual_seed(1)).to(s.dtype).to(device)
    g[taken:] = float("inf")
    trained = s.R > 0 and not s.nf4_factors
    needs = (True, trained, trained, bool(s.core))
    got = BACKWARD(*t.backward_arguments(g, t.x if trained else None, h, *needs))
    exact, plain = t.run_reference_backward(g, torch.float64), t.run_reference_backward(g, s.dtype)
    for name, mine, judge, baseline, needed in zip("xduc", got, exact, plain, needs, strict=True):
        if not needed:
            assert mine.numel() == 0
        elif name == "x":
            assert_within_baseline(mine, judge, baseline)
        else:
            for e, rows in enumerate(mix.rows):
                assert_within_baseline(mine[e], judge[e], baseline[e])
                assert rows or not mine[e].any()


# The interpreter takes seconds for what a processor does in milliseconds; test_kernels_experts.py has cases of its own.
@pytest.mark.parametrize("mix", MIXES[::4] if _plan.interpreted() else MIXES, ids=str)
def test_float32(mix: Mix, device: torch.device, form: str) -> None:
    check(mix, device)


@pytest.mark.parametrize("mix", MIXES[1::4] if _plan.interpreted() else MIXES, ids=str)
def test_16_bit(mix: Mix, device: torch.device, form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    for i, dtype in enumerate(dtypes):
        check(replace(mix, of=replace(mix.of, dtype=dtype, factors=(torch.float32, dtype)[i % 2])), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    assert _cpu.isa() == isa
    # Whole groups of the decoder too, and an expert on each side of every instruction set's limit of the forms.
    whole = [
        Mix([1, 30, 0, 4], replace(_BASE, N=300, K=640, R=16)),
        Mix([130], replace(_BASE, N=97, K=384, R=3, dropout=0.3, block_size=128)),
    ]
    for mix in (*MIXES, *whole):
        check(replace(mix, of=replace(mix.of, dtype=dtype, factors=dtype)), torch.device("cpu"))


@pytest.mark.parametrize("core", ["", "band2", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_expert_computes_what_it_computes_alone(dtype: torch.dtype, core: str) -> None:
    # Bits too: adapted_linear promises the same for any number of tokens in the same form.
    t = make(Mix([0, 40, 3, 1], replace(_BASE, N=67, K=192, dtype=dtype, factors=dtype, core=core)))
    y = experts_linear(t.x, t.weight, t.offsets, lo.LowRankUpdate(t.down, t.up, t.core, t.scale), t.bias)
    for e, begin, end in ((1, 0, 40), (2, 40, 43), (3, 43, 44)):
        one = None if t.core is None else cores.with_values(t.core, t.core.values[e])
        update = lo.LowRankUpdate(t.down[e], t.up[e], one, t.scale)
        alone = lo.functional.adapted_linear(t.x[begin:end], t.weight[e], update, t.bias[e])
        assert_within_baseline(y[begin:end], alone.double(), alone)
        assert_bits_equal(y[begin:end], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_do_not_depend_on_other_experts(dtype: torch.dtype) -> None:
    t = make(Mix([2, 40, 0, 30], replace(_BASE, N=320, K=384, dtype=dtype, core="sparse")))
    g = torch.randn(72, 320, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, h = OP(*t.arguments())
    dx = BACKWARD(*t.backward_arguments(g, t.x, h, True, True, True, True))[0]
    # The rows of expert 3 alone, and the rows of expert 1 before another number of rows of expert 3.
    few = replace(t, x=t.x[42:], offsets=torch.tensor([0, 0, 0, 0, 30], dtype=torch.int32))
    assert_bits_equal(OP(*few.arguments())[0], y[42:])
    assert_bits_equal(BACKWARD(*few.backward_arguments(g[42:], None, None, True, False, False, False))[0], dx[42:])
    less = replace(t, x=t.x[2:43], offsets=torch.tensor([0, 0, 40, 40, 41], dtype=torch.int32))
    assert_bits_equal(OP(*less.arguments())[0][:40], y[2:42])


def test_threads_do_not_change_bits(form: str) -> None:
    t = make(Mix([1, 70, 0, 9], replace(_BASE, N=320, K=512, R=16, dtype=torch.bfloat16, dropout=0.2, core="dense")))
    g = torch.randn(80, 320).bfloat16()
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y, h = OP(*t.arguments())
            results.append((y, h, *BACKWARD(*t.backward_arguments(g, t.x, h, True, True, True, True))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bits_equal(a, b)


def test_dropout_is_the_mask_of_the_rows(device: torch.device, form: str) -> None:
    # With D the identity, h shows the mask element by element.
    K, p = 37, 0.4
    eye = torch.eye(K, device=device).expand(3, K, K).contiguous()
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    seed = torch.tensor([2**40 + 17], device=device)
    t = Tensors(torch.ones(9, K, device=device), eye, offsets, K, eye, eye, None, None, 1.0, p, seed, K, K)
    _, h = OP(*t.arguments())
    torch.testing.assert_close(h, reference.dropout_mask(seed, 9, K, p) / (1 - p), rtol=1e-6, atol=0)


def test_no_rows(device: torch.device) -> None:
    t = make(Mix([0, 0], replace(_BASE, core="diagonal")), device)
    leaves = [v.clone().requires_grad_() for v in (t.x, t.down, t.up, t.core.values)]
    update = lo.LowRankUpdate(leaves[1], leaves[2], cores.Diagonal(leaves[3]))
    y = experts_linear(leaves[0], t.weight, t.offsets, update)
    assert y.shape == (0, t.out_features)
    y.sum().backward()
    assert leaves[0].grad.shape == (0, t.in_features) and not any(leaf.grad.any() for leaf in leaves[1:])


@pytest.mark.parametrize("core", ["", "diagonal", "band1", "sparse", "dense"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradcheck_in_float64(dropout: float, core: str) -> None:
    small = replace(_BASE, dtype=torch.float64, factors=torch.float64, N=5, K=7, block_size=32, R=3, core=core)
    t = make(Mix([2, 0, 1], small, rest=1))
    t.seed, t.dropout = torch.tensor([5]), dropout
    values = [] if t.core is None else [t.core.values]
    operands = [v.detach().requires_grad_() for v in (t.x, t.down, t.up, *values)]

    def function(x, down, up, values=None):  # type: ignore[no-untyped-def]
        core = None if t.core is None else cores.with_values(t.core, values)
        return OP(*t.arguments(x=x, down=down, up=up, core=core))[0]

    with lo.implementation("reference"):
        assert torch.autograd.gradcheck(function, operands)


@pytest.mark.parametrize(
    "mix",
    [
        Mix([2, 0, 3], replace(_BASE, N=10, K=12), rest=1),
        Mix([1, 4], replace(_BASE, N=9, K=8, R=4, core="sparse", nf4_factors=True)),
        Mix([3, 1], replace(_BASE, N=8, K=32, R=0), format="mxfp4"),
        Mix([3, 1], replace(_BASE, N=8, K=9, R=2, core="dense", block_size=0, dropout=0.5)),
    ],
    ids=str,
)
def test_opcheck(mix: Mix, device: torch.device) -> None:
    t = make(mix, device)
    trained = places("experts_linear", "x", "down", "up", "core")
    operands = [
        v.detach().requires_grad_() if i in trained and v is not None and v.is_floating_point() else v
        for i, v in enumerate(t.arguments())
    ]
    torch.library.opcheck(OP.default, tuple(operands))
    if mix.of.R:
        g, h = torch.randn(len(t.x), mix.of.N, device=device), torch.randn(len(t.x), mix.of.R, device=device)
        trained = not mix.of.nf4_factors
        torch.library.opcheck(
            BACKWARD.default, t.backward_arguments(g, t.x, h, True, trained, trained, bool(mix.of.core))
        )


def test_autograd_and_compile() -> None:
    t = make(Mix([3, 0, 9], replace(_BASE, core="band1"), rest=2))

    def run(x: Tensor, down: Tensor, up: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        update = lo.LowRankUpdate(down, up, cores.Banded(values, t.rank), t.scale)
        return experts_linear(x, t.weight, offsets, update, t.bias)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [v.detach().clone().requires_grad_() for v in (t.x, t.down, t.up, t.core.values)]
        y = function(*leaves, t.offsets)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert_bits_equal(eager, compiled)
    g = (2 * t.run_reference(torch.float64)).float()
    exact, plain = t.run_reference_backward(g, torch.float64), t.run_reference_backward(g, torch.float32)
    for got, judge, baseline in zip(results[0][1:], exact, plain, strict=True):
        assert_within_baseline(got.flatten(1), judge.flatten(1), baseline.flatten(1), factor=4)  # g has an error too


def test_no_dense_expert_is_formed() -> None:
    if not peak.measurable(common.Settings(torch.device("cpu"), ())):
        pytest.skip("the peak of a process's memory is read from /proc")
    shape, small = bench.Shape(16, 512, 1024, 2), bench.Shape(2, 128, 64, 2)
    arguments = ((goals.OURS, shape, 64), (goals.OURS, small, 8))
    used = peak.peak_bytes(common.Settings(torch.device("cpu"), ()), bench.make, *arguments)
    # The experts take 50 MB in bfloat16. The gradients of all factors take 4 MB, sums and copies of 128 rows the rest.
    assert used < 15e6


@pytest.mark.parametrize("trained", ["", "up", "down"])
def test_what_backward_keeps(trained: str) -> None:
    t = make(Mix([3, 9], _BASE))
    factors = {"down": t.down, "up": t.up}
    if trained:
        factors[trained].requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts_linear(t.x.clone().requires_grad_(), t.weight, t.offsets, lo.LowRankUpdate(**factors))
    # h [12, 5] only where up is trained, x [12, 128] only where down is.
    assert (t.x.shape in [v.shape for v in saved]) == (trained == "down")
    assert ((12, 5) in [v.shape for v in saved]) == (trained == "up")


def test_the_plan_says_why() -> None:
    for dtype, rows in ((torch.float32, 8), (torch.bfloat16, 14)):  # tokens of 16 bits are multiplied as whole numbers
        plan = _plan.plan_experts("cpu", 64, 16, 128, dtype, NF4, 64, None, "avx2")
        assert plan.implementation == "cpp" and f"an expert with up to {rows} rows" in plan.reason
    assert _plan.plan_experts("cuda", 64, 16, 128, torch.bfloat16, NF4, 64).form == "few"
    assert _plan.plan_experts("cuda", 4096, 16, 128, torch.bfloat16, NF4, 64).form == "many"
    with pytest.raises(RuntimeError, match="'triton' .* cannot run this on device type 'cpu'"):
        if _plan.interpreted():
            raise RuntimeError("'triton' (x) cannot run this on device type 'cpu'")
        _plan.plan_experts("cpu", 64, 16, 128, torch.bfloat16, NF4, 64, "triton")


def test_bad_input() -> None:
    t = make(Mix([3, 0, 2], _BASE))
    x, w, offsets, bias = t.x, t.weight, t.offsets, t.bias
    update = lo.LowRankUpdate(t.down, t.up)

    def of(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    for error, message, call in [
        (ValueError, r"weight must be \[E, N, K\], got \[48, 128\]", lambda: experts_linear(x, w[0], offsets)),
        (ValueError, r"weight must be a non-empty \[E, N, K\], got \[128\]", lambda: experts_linear(x, x[0], offsets)),
        (
            ValueError,
            r"x must be \[..., K=128\] for a weight 3 x 48 x 128",
            lambda: experts_linear(x[:, 1:], w, offsets),
        ),
        (ValueError, r"x must be \[P, K=128\], got \[1, 5, 128\]", lambda: experts_linear(x[None], w, offsets)),
        (TypeError, "offsets must be an int32 Tensor, got torch.int64", lambda: experts_linear(x, w, offsets.long())),
        (TypeError, "offsets must be an int32 Tensor, got list", lambda: experts_linear(x, w, [0, 3, 3, 5])),
        (ValueError, r"offsets must be \[4\] for 3 experts, got \[3\]", lambda: experts_linear(x, w, of(0, 3, 5))),
        (ValueError, "offsets is on meta and x on cpu", lambda: experts_linear(x, w, offsets.to("meta"))),
        (ValueError, "offsets must begin with 0, got 1", lambda: experts_linear(x, w, of(1, 3, 3, 5))),
        (ValueError, "at most at the 5 rows of x, got 6", lambda: experts_linear(x, w, of(0, 3, 3, 6))),
        (ValueError, "must not fall, got 4 and then 3 for expert 1", lambda: experts_linear(x, w, of(0, 4, 3, 5))),
        (ValueError, "must not fall, got 9 and then 5 for expert 2", lambda: experts_linear(x, w, of(0, 3, 9, 5))),
        (ValueError, r"bias must be \[3, 48\], got \[48\]", lambda: experts_linear(x, w, offsets, None, bias[0])),
        (
            ValueError,
            "bias of experts is frozen",
            lambda: experts_linear(x, w, offsets, None, bias.clone().requires_grad_()),
        ),
        (
            ValueError,
            r"update.down must be \[3, 5, 128\] for a weight 3 x 48 x 128, got \[2, 5, 128\]",
            lambda: experts_linear(x, w, offsets, lo.LowRankUpdate(t.down[:2], t.up[:2])),
        ),
        (
            ValueError,
            r"update.down must be \[3, 5, 128\] for a weight 3 x 48 x 128, got \[5, 128\]",
            lambda: experts_linear(x, w, offsets, lo.LowRankUpdate(t.down[0], t.up[0])),
        ),
        (TypeError, "update must be a LowRankUpdate", lambda: experts_linear(x, w, offsets, (t.down, t.up))),
        (
            ValueError,
            r"down \[E, R, K\] and up \[E, N, R\] must agree in E, R, got \[3, 5, 128\] and \[2, 48, 5\]",
            lambda: lo.LowRankUpdate(t.down, t.up[:2]),
        ),
        (ValueError, r"up must be a non-empty \[E, N, R\], got \[48, 5\]", lambda: lo.LowRankUpdate(t.down, t.up[0])),
        (
            ValueError,
            r"values of core must have a leading 3, one for each expert, got \[5\]",
            lambda: lo.LowRankUpdate(t.down, t.up, cores.Diagonal(torch.ones(5))),
        ),
        (
            ValueError,
            r"values of core must have no leading dimension, got \[3, 5\]",
            lambda: lo.LowRankUpdate(t.down[0], t.up[0], cores.Diagonal(torch.ones(3, 5))),
        ),
        (ValueError, r"weight must be \[N, K\], got \[3, 48, 128\]", lambda: lo.functional.adapted_linear(x, w)),
        (
            ValueError,
            r"update.down must be \[5, 128\] for a weight 48 x 128, got \[3, 5, 128\]",
            lambda: lo.functional.adapted_linear(x, w[0], update),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_stacks_of_updates_and_cores() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 4, 9, generator=generator), torch.randn(3, 7, 4, generator=generator)
    for kind in ("diagonal", "band1", "sparse", "dense"):
        core = stack_core(kind, 3, 4, torch.float32, generator, "cpu")
        assert core.experts == 3 and core.size == 4 and core.dense().shape == (3, 4, 4)
        update = lo.LowRankUpdate(down, up, core, 0.5)
        assert update.shape == (3, 7, 9) and update.rank == 4 and update.experts == 3
        for e in range(3):
            one = cores.with_values(core, core.values[e])
            assert one.experts == 0
            assert_bits_equal(one.dense(), core.dense()[e])
            alone = lo.LowRankUpdate(down[e], up[e], one, 0.5)
            assert alone.shape == (7, 9) and alone.experts == 0
            torch.testing.assert_close(update.delta()[e], alone.delta())
