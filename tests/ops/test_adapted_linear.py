"""The op y = W x + bias + s · U (D drop(x)): all samples, dtypes and forms against float64, opcheck, autograd, compile."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BRANCH_SAMPLES,
    CORE_SAMPLES,
    SAMPLES,
    WEIGHTS,
    Sample,
    Tensors,
    assert_bits_equal,
    assert_within_baseline,
    make,
    places,
    weights_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_ops as lo
from lowrank_ops import functional, ops, reference
from lowrank_ops.kernels.operands import NF4
from lowrank_ops.ops import _cpu, _plan

OP = torch.ops.lowrank_ops.adapted_linear
BACKWARD = torch.ops.lowrank_ops.adapted_linear_backward
FORMS = {"few": 10**9, "many": 0}
# Rows in whole groups of a CPU kernel's decoding, with numbers of tokens around the limits of its blocks of tokens.
WHOLE_GROUPS = [
    Sample(M=1, N=70, K=128, R=5),
    Sample(M=4, N=33, K=640, R=1, block_size=32),
    Sample(M=16, N=49, K=1152, R=3, double_quant=False),
    Sample(M=17, N=97, K=384, R=16, block_size=128),
    Sample(M=13, N=37, K=1344, R=5, block_size=256),
    Sample(M=130, N=300, K=256, R=5, dropout=0.3, mean=1.0),
    Sample(M=5, N=70, K=256, R=16, branch=16),
    Sample(M=130, N=300, K=256, R=5, branch=16),
]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every sample in both forms, also in the form that the planner would not choose."""
    monkeypatch.setattr(_plan, "FEW_TOKENS", dict.fromkeys(_plan.FEW_TOKENS, FORMS[request.param]))
    return request.param


# The interpreter's tiles have 16 tokens: one whole tile and a part of one show what more of them would.
MOST_TOKENS = 18 if _plan.interpreted() else 10**9


def check(sample: Sample, device: torch.device) -> None:
    sample = replace(sample, M=min(sample.M, MOST_TOKENS))
    t = make(sample, device)
    y, h = OP(*t.arguments())
    assert_within_baseline(y, t.run_reference(torch.float64), t.run_reference(sample.dtype))
    assert h.dtype == torch.float32 and h.shape == (sample.M, sample.R)

    g = torch.randn(sample.M, sample.N, generator=torch.Generator().manual_seed(1)).to(sample.dtype).to(device)
    trained = sample.R > 0 and not sample.nf4_factors
    needs = (True, trained, trained, bool(sample.core))
    got = BACKWARD(*t.backward_arguments(g, t.x if trained else None, h, *needs))
    exact, plain = t.run_reference_backward(g, torch.float64), t.run_reference_backward(g, sample.dtype)
    for mine, judge, baseline, needed in zip(got, exact, plain, needs, strict=True):
        if needed:
            assert judge is not None
            assert baseline is not None
            assert_within_baseline(mine, judge, baseline)


@pytest.mark.parametrize("sample", [*SAMPLES, *CORE_SAMPLES, *BRANCH_SAMPLES], ids=str)
def test_float32(sample: Sample, device: torch.device, form: str) -> None:
    check(sample, device)


# Plain torch may compute a single 16-bit number exactly by luck, so the rule needs several.
@pytest.mark.parametrize("sample", [s for s in (*SAMPLES, *CORE_SAMPLES, *BRANCH_SAMPLES) if s.M * s.N > 1], ids=str)
def test_16_bit(sample: Sample, device: torch.device, form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        of_factors = [dtype, torch.float32]
        if _plan.interpreted():  # the two take turns from sample to sample
            of_factors = [of_factors[(sample.M + sample.K) % 2]]
        for factors in of_factors:
            check(replace(sample, dtype=dtype, factors=factors), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype, form: str) -> None:
    assert _cpu.isa() == isa
    for sample in (*SAMPLES, *CORE_SAMPLES, *BRANCH_SAMPLES, *WHOLE_GROUPS):
        if dtype == torch.float32 or sample.M * sample.N > 1:
            check(replace(sample, dtype=dtype), torch.device("cpu"))


@settings(
    max_examples=6 if _plan.interpreted() else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_any_shape(data: st.DataObject, device: torch.device, form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    dtype = data.draw(st.sampled_from((torch.float32, *dtypes)))
    least = 1 if dtype == torch.float32 else 16
    check(
        data.draw(
            st.builds(
                Sample,
                M=st.integers(1, 40),
                N=st.integers(least, 70),
                K=st.integers(least, 200),
                R=st.integers(0, 20),
                dtype=st.just(dtype),
                block_size=st.sampled_from((0, 32, 64, 128)),
                double_quant=st.booleans(),
                bias=st.booleans(),
                dropout=st.sampled_from((0.0, 0.4)),
                strided=st.booleans(),
                branch=st.sampled_from((0, 0, 1, 17)),
            )
            if not data.draw(st.booleans(), label="with a core")
            else st.builds(
                Sample,
                M=st.integers(1, 40),
                N=st.integers(least, 70),
                K=st.integers(least, 100),
                R=st.integers(2, 50),
                dtype=st.just(dtype),
                core=st.sampled_from(("diagonal", "band1", "sparse", "dense")),
                nf4_factors=st.booleans(),
                dropout=st.sampled_from((0.0, 0.4)),
                strided=st.booleans(),
                branch=st.sampled_from((0, 0, 1, 17)),
            )
        ),
        device,
    )


@pytest.mark.parametrize("M, K", [(1, 4096), (5, 4097), (64, 14336), (130, 4096)])
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_long_sums(M: int, K: int, mean: float, form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(Sample(M=M, N=70, K=K, R=16, dtype=dtype, mean=mean), torch.device("cpu"))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_one_value_of_x(kind: str, form: str) -> None:
    # Errors of a level have the same sign in every weight of that level, so they add up.
    w = lo.NF4Weight.quantize(weights_of(kind, 96, 16384))
    x = torch.full((2, w.shape[1]), 1.7, dtype=torch.bfloat16)
    y = lo.functional.adapted_linear(x, w)
    exact = reference.adapted_linear(x.double(), w.dequantize(torch.float32).double())
    assert_within_baseline(y, exact, reference.adapted_linear(x, w.dequantize(torch.bfloat16)))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_levels_of_pairs(kind: str) -> None:
    """Check the claims of csrc/cpu/tile/pair_levels.h about the rounded NF4 levels."""
    source = (Path(__file__).parents[2] / "csrc/cpu/tile/pair_levels.h").read_text()
    stretch = float(re.findall(r"kNf4Stretch = ([\d.]+)f / 16,", source)[0])
    table = re.findall(r"kNf4Levels\[2\]\[16\] = \{(.*?)\};", source, re.DOTALL)[0]
    levels = torch.tensor([float(number) for number in re.findall(r"-?[\d.]+(?=f)", table)]).view(2, 16)
    assert torch.equal(levels, levels.bfloat16().float())
    packed = lo.NF4Weight.quantize(weights_of(kind, 1024, 4096)).packed.long()
    share = torch.bincount(torch.cat([packed >> 4, packed & 15])).double() / (2 * packed.numel())
    code = torch.tensor(reference.NF4_CODE, dtype=torch.float64)
    error = levels.double() / stretch - code
    assert abs((share * error.mean(0)).sum()) <= 1.2e-5 * (share * code.abs()).sum()
    assert (share * error.square().mean(0)).sum().sqrt() <= 1.3e-3 * (share * code.square()).sum().sqrt()


@pytest.mark.parametrize("rectified", [False, True])
def test_few_tokens_are_nearer_than_rounded_weights(rectified: bool) -> None:
    w = lo.NF4Weight.quantize(torch.randn(32768, 256, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = x.relu() if rectified else x
    exact = x.double() @ w.dequantize(torch.float32).double().T
    ours = (lo.functional.adapted_linear(x, w) - exact).square().mean().sqrt()
    plain = (x.float() @ w.dequantize(torch.bfloat16).float().T).bfloat16() - exact
    # Rounding y costs both 1.65e-3; rounding the weights costs ours at most 1.2e-3 more, the other 1.65e-3.
    assert ours <= 0.9 * plain.square().mean().sqrt()


def test_empty_batch(device: torch.device) -> None:
    t = make(SAMPLES[0], device)
    x = t.x[:0].clone().requires_grad_()
    values = torch.randn(5, device=device, requires_grad=True)
    factors = (t.down.clone().requires_grad_(), t.up.clone().requires_grad_())
    update = lo.LowRankUpdate(*factors, lo.cores.Diagonal(values))
    y = lo.functional.adapted_linear(x, t.weight, update)
    assert y.shape == (0, t.out_features)
    y.sum().backward()
    assert x.grad.shape == x.shape and not any(t.grad.any() for t in (*factors, values))


@pytest.mark.parametrize("core", ["", "band2", "sparse", "dense"])
def test_rows_do_not_depend_on_the_batch(device: torch.device, form: str, core: str) -> None:
    t = make(Sample(M=37, N=67, K=192, R=5, core=core), device)
    whole = OP(*t.arguments())[0]
    for rows in (slice(0, 1), slice(3, 8), slice(20, 37)):
        # The same rows among other tokens; on the CPU also alone, since no tile size depends on the batch there.
        among = torch.randn_like(t.x)
        among[rows] = t.x[rows]
        assert_bits_equal(OP(among, *t.arguments()[1:])[0][rows], whole[rows])
        if _plan.plan_linear(device.type, 1, 64, t.x.dtype, NF4, 64, _plan.forced()).implementation == "cpp":
            assert_bits_equal(OP(t.x[rows], *t.arguments()[1:])[0], whole[rows])


@pytest.mark.parametrize("core", ["", "dense"])
@pytest.mark.parametrize("K", [384, 1344])
def test_rows_of_bfloat16_do_not_depend_on_the_batch(form: str, core: str, K: int) -> None:
    t = make(Sample(M=200, N=67, K=K, R=5, core=core, dtype=torch.bfloat16))
    whole = OP(*t.arguments())[0]
    for rows in (slice(0, 1), slice(3, 8), slice(20, 27), slice(20, 37), slice(1, 140)):
        assert_bits_equal(OP(t.x[rows], *t.arguments()[1:])[0], whole[rows])


@pytest.mark.parametrize("core", ["", "band2", "sparse", "dense"])
@pytest.mark.parametrize("K", [320, 384])
def test_threads_do_not_change_bits(form: str, core: str, K: int) -> None:
    t = make(Sample(M=70, N=320, K=K, R=16, dtype=torch.bfloat16, dropout=0.2, core=core))
    g = torch.randn(70, 320).bfloat16()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, h = OP(*t.arguments())
            grads = BACKWARD(*t.backward_arguments(g, t.x, h, True, True, True, bool(core)))
            results.append((y, h, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bits_equal(a, b)


@pytest.mark.parametrize("N, K", [(320, 130), (70, 384), (333, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_gradient_do_not_depend_on_the_batch(N: int, K: int, dtype: torch.dtype) -> None:
    t = make(Sample(M=200, N=N, K=K, R=4, dtype=dtype, core="band1"))
    g = torch.randn(200, N).to(dtype)
    whole = BACKWARD(*t.backward_arguments(g, None, None, True, False, False, False))[0]
    for rows in (slice(0, 1), slice(3, 22), slice(16, 53), slice(1, 130)):
        assert_bits_equal(
            BACKWARD(*t.backward_arguments(g[rows], None, None, True, False, False, False))[0], whole[rows]
        )


def test_the_form_follows_what_the_processor_has() -> None:
    def form(M: int, dtype: torch.dtype, isa: str, block_size: int = 64, K: int = 192) -> str:
        return _plan.plan_linear("cpu", M, K, dtype, NF4, block_size, None, isa).form

    assert form(3, torch.bfloat16, "amx") == form(24, torch.bfloat16, "avx512_bf16") == "few"
    assert form(4, torch.bfloat16, "amx") == form(25, torch.bfloat16, "avx512_bf16") == "many"
    assert form(9, torch.bfloat16, "avx512_bf16", block_size=0) == form(9, torch.float32, "avx512_bf16") == "many"
    # Weights that the CPU does not decode as pairs next to the multiply.
    assert (
        form(9, torch.bfloat16, "avx512_bf16", block_size=32) == form(9, torch.bfloat16, "avx512_bf16", K=160) == "many"
    )
    assert form(8, torch.float32, "amx") == form(14, torch.float16, "amx") == form(14, torch.bfloat16, "avx2") == "few"
    assert form(15, torch.float16, "amx") == form(9, torch.bfloat16, "avx2", K=160) == "many"
    assert form(4, torch.bfloat16, "neon_bf16") == form(4, torch.float32, "neon") == "few"
    assert form(5, torch.bfloat16, "neon_bf16") == form(5, torch.float32, "neon") == "many"
    assert form(8, torch.bfloat16, "neon") == form(8, torch.float16, "neon_bf16") == "few"
    assert form(9, torch.bfloat16, "neon") == form(9, torch.float16, "neon_bf16") == "many"


def test_the_plan_tells_whole_numbers() -> None:
    def told(M: int, dtype: torch.dtype, isa: str, K: int = 192) -> bool:
        return "whole numbers" in _plan.plan_linear("cpu", M, K, dtype, NF4, 64, None, isa).reason

    assert all(told(M, torch.bfloat16, isa) for M in (1, 99) for isa in ("avx2", "avx_vnni", "avx512_vnni"))
    assert told(1, torch.bfloat16, "avx512") and not told(99, torch.bfloat16, "avx512")
    assert told(1, torch.float16, "amx") and told(3, torch.bfloat16, "amx") and not told(4, torch.bfloat16, "amx")
    assert told(1, torch.bfloat16, "neon") and not told(99, torch.bfloat16, "neon")
    assert told(1, torch.float16, "neon_bf16") and not told(1, torch.bfloat16, "neon_bf16")
    assert not told(1, torch.float32, "avx2") and not told(1, torch.bfloat16, "avx2", K=160)


def test_dropout_mask_is_the_references(device: torch.device, form: str) -> None:
    # With D the identity, h shows the mask element by element.
    K, p = 37, 0.4
    seed = torch.tensor([2**40 + 17], device=device)
    eye = torch.eye(K, device=device)
    _, h = OP(
        torch.ones(9, K, device=device), *Tensors(eye, eye, K, eye, eye, None, None, 1.0, p, seed).arguments()[1:]
    )
    expected = reference.dropout_mask(seed, 9, K, p) / (1 - p)
    torch.testing.assert_close(h, expected, rtol=1e-6, atol=0)


def test_dropout_rate_and_seed() -> None:
    x, eye = torch.ones(200, 100), torch.eye(100)
    update = lo.LowRankUpdate(eye, eye, dropout=0.25)
    torch.manual_seed(3)
    first = lo.functional.adapted_linear(x, torch.zeros(100, 100), update)
    second = lo.functional.adapted_linear(x, torch.zeros(100, 100), update)
    torch.manual_seed(3)
    again = lo.functional.adapted_linear(x, torch.zeros(100, 100), update)
    assert abs((first == 0).float().mean().item() - 0.25) < 0.02
    assert not torch.equal(first, second)
    assert_bits_equal(again, first)


@pytest.mark.parametrize("core", ["", "diagonal", "band1", "sparse", "dense"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradcheck_in_float64(dropout: float, core: str) -> None:
    small = replace(SAMPLES[0], dtype=torch.float64, factors=torch.float64, M=4, N=7, K=10, block_size=32, R=3)
    t = make(replace(small, core=core))
    t.seed, t.dropout = torch.tensor([5]), dropout
    values = [] if t.core is None else [t.core.values]
    operands = [v.detach().requires_grad_() for v in (t.x, t.down, t.up, t.bias, *values)]

    def function(x, down, up, bias, values=None):  # type: ignore[no-untyped-def]
        core = None if t.core is None else lo.cores.with_values(t.core, values)
        return OP(*t.arguments(x=x, down=down, up=up, bias=bias, core=core))[0]

    with lo.implementation("reference"):
        assert torch.autograd.gradcheck(function, operands)


@pytest.mark.parametrize(
    "sample",
    [
        *(SAMPLES[i] for i in (0, 2, 10, 12)),
        *(CORE_SAMPLES[i] for i in (1, 7)),
        # opcheck runs an op many times: small ones for the rest.
        Sample(M=3, N=10, K=12, R=6, core="sparse", nf4_factors=True),
        Sample(M=2, N=9, K=8, R=4, nf4_factors=True),
    ],
    ids=str,
)
def test_opcheck(sample: Sample, device: torch.device) -> None:
    t = make(sample, device)
    trained = places("adapted_linear", "x", "down", "up", "core", "bias")
    arguments = [
        v.detach().requires_grad_() if i in trained and v is not None and v.is_floating_point() else v
        for i, v in enumerate(t.arguments())
    ]
    torch.library.opcheck(OP.default, tuple(arguments))
    if sample.R:
        g, h = torch.randn(sample.M, sample.N, device=device), torch.randn(sample.M, sample.R, device=device)
        trained = not sample.nf4_factors
        needs = (True, trained, trained, bool(sample.core))
        torch.library.opcheck(BACKWARD.default, t.backward_arguments(g, t.x, h, *needs))


def test_gradients_flow_only_where_asked(device: torch.device) -> None:
    t = make(SAMPLES[0], device)
    for asked in ("x", "down", "up", "bias"):
        leaves = {n: getattr(t, n).detach().clone().requires_grad_(n == asked) for n in ("x", "down", "up", "bias")}
        update = lo.LowRankUpdate(leaves["down"], leaves["up"], scale=t.scale)
        y = lo.functional.adapted_linear(leaves["x"], t.weight, update, leaves["bias"])
        y.square().sum().backward()
        assert [n for n, leaf in leaves.items() if leaf.grad is not None] == [asked]


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    t = make(SAMPLES[0], device)
    x = t.x.detach().requires_grad_()
    y = lo.functional.adapted_linear(x, t.weight, lo.LowRankUpdate(t.down.requires_grad_(), t.up))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.sum().backward()


def saved_bytes(x: torch.Tensor, update: lo.LowRankUpdate | None, weight: lo.NF4Weight) -> int:
    """Bytes kept for backward, apart from operands that exist anyway."""
    own = {t.untyped_storage().data_ptr() for t in weight.buffers()}
    for part in (
        (update.down, update.up, update.core and update.core.values, update.core and update.core.index)
        if update
        else ()
    ):
        tensors = part.buffers() if isinstance(part, lo.NF4Weight) else [part] if part is not None else []
        own |= {t.untyped_storage().data_ptr() for t in tensors}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lo.functional.adapted_linear(x, weight, update)
    return sum(kept.values())


def test_saved_for_backward(device: torch.device) -> None:
    M, N, K, R = 24, 64, 128, 4
    weight = lo.NF4Weight.quantize(torch.randn(N, K)).to(device)
    x = torch.randn(M, K, device=device, requires_grad=True)
    down, up = torch.randn(R, K, device=device), torch.randn(N, R, device=device)
    assert saved_bytes(x, None, weight) == 0
    trained = lo.LowRankUpdate(down.clone().requires_grad_(), up.clone().requires_grad_())
    assert saved_bytes(x, trained, weight) == M * K * 4 + M * R * 4
    frozen_down = lo.LowRankUpdate(down, up.clone().requires_grad_())
    assert saved_bytes(x, frozen_down, weight) == M * R * 4
    assert saved_bytes(x, lo.LowRankUpdate(down, up), weight) == 0
    # A kind with frozen factors keeps h alone, and nothing if the core is not trained.
    frozen = [lo.NF4Weight.quantize(f.cpu()).to(device) for f in (down, up)]
    every = torch.arange(R, device=device)
    for core in (
        lo.cores.Diagonal(torch.ones(R, device=device, requires_grad=True)),
        lo.cores.Banded(torch.ones(3, R, device=device, requires_grad=True)),
        lo.cores.Sparse(every, every, torch.ones(R, device=device, requires_grad=True), R),
        lo.cores.Dense(torch.ones(R, R, device=device, requires_grad=True)),
    ):
        for factors in ((down, up), frozen):
            assert saved_bytes(x, lo.LowRankUpdate(*factors, core), weight) == M * R * 4
    assert saved_bytes(x, lo.LowRankUpdate(*frozen, lo.cores.Dense(torch.ones(R, R, device=device))), weight) == 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compile_fullgraph(dropout: float, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = lo.Linear(64, 48, adapter=lo.LoRA(4, dropout=dropout)).to(device)
    torch.nn.init.normal_(layer.up)
    x = torch.randn(6, 64, device=device, requires_grad=True)

    def run(function) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        y = function(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, layer.down.grad, layer.up.grad]

    compiled = torch.compile(layer, fullgraph=True)
    for dropped in (False,) if dropout == 0 else (True, False):
        layer.train(dropped)
        got, expected = run(compiled), run(layer)
        if dropped:  # Inductor draws the seed from its own generator, so only the shapes can agree
            expected = [torch.zeros_like(t) for t in expected]
            assert all(torch.isfinite(t).all() and t.shape == e.shape for t, e in zip(got, expected, strict=True))
        else:
            for mine, eager in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, eager)


def test_compile_takes_any_batch_size() -> None:
    layer = lo.Linear(64, 48, adapter=lo.LoRA(4)).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for M in (2, 3, 70):
        x = torch.randn(M, 64)
        torch.testing.assert_close(compiled(x), layer(x))


def test_without_gradients_the_kernel_is_called_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, calls = lo.Linear(64, 48, adapter=lo.LoRA(4)), torch.randn(2, 64), 0
    kernel = ops.KERNELS["adapted_linear"]

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return kernel(*arguments)

    def run() -> torch.Tensor:
        return functional.adapted_linear(x, layer.weight, layer.update, layer.bias)

    expected = run().detach()
    monkeypatch.setitem(ops.KERNELS, "adapted_linear", counted)
    run()
    assert not calls
    for i, mode in enumerate((torch.no_grad, torch.inference_mode)):
        with mode():
            assert torch.equal(run(), expected)
            assert calls == i + 1


@torch.no_grad()
def test_without_gradients_the_meta_device_has_shapes() -> None:
    assert lo.Linear(64, 48, adapter=lo.LoRA(4)).to("meta")(torch.empty(2, 5, 64, device="meta")).shape == (2, 5, 48)


@torch.no_grad()
def test_a_minus_that_a_view_has_put_off_is_applied() -> None:
    def shown(*sizes: int) -> torch.Tensor:
        view = torch.view_as_complex(torch.randn(*sizes, 2)).conj().imag
        assert view.is_neg()
        return view

    x, down, up, values, bias = shown(3, 64), shown(4, 64), shown(48, 4), shown(4), shown(48)
    w = torch._neg_view(torch.randn(48, 64))
    operands = [x, w, down, up, values, bias]

    def run(x: Any, w: Any, down: Any, up: Any, values: Any, bias: Any) -> list[torch.Tensor]:
        core = lo.cores.Diagonal(values)
        update = lo.LowRankUpdate(down, up, core)
        return [
            lo.functional.adapted_linear(x, w, update, bias),
            lo.functional.svd_linear(x, up.contiguous(), core, down.contiguous(), bias),
            lo.functional.routed_linear(x, w, [update], torch.tensor([0, -1, 0]), bias),
        ]

    for got, expected in zip(run(*operands), run(*(t.resolve_neg() for t in operands)), strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("which", ["x", "weight", "down", "up", "values", "bias"])
def test_without_gradients_a_subclass_of_tensor_goes_its_own_way(which: str) -> None:
    class Elsewhere(torch.Tensor):
        """A subclass that wraps another tensor and has no memory of its own."""

        held: torch.Tensor

        @staticmethod
        def __new__(cls, held: torch.Tensor) -> Any:
            made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
            made.held = held
            return made

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            bare = [a.held if isinstance(a, Elsewhere) else a for a in args]
            got = func(*bare, **(kwargs or {}))
            alias = isinstance(got, torch.Tensor) and "adapted" not in func.name()
            return Elsewhere(got) if alias else got

    sizes = {"x": (3, 64), "weight": (48, 64), "down": (4, 64), "up": (48, 4), "values": (4,), "bias": (48,)}
    operands = {name: torch.randn(size) for name, size in sizes.items()}

    def run(x: Any, weight: Any, down: Any, up: Any, values: Any, bias: Any) -> torch.Tensor:
        update = lo.LowRankUpdate(down, up, lo.cores.Diagonal(values))
        return lo.functional.adapted_linear(x, weight, update, bias)

    assert torch.equal(run(**operands | {which: Elsewhere(operands[which])}), run(**operands))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_without_gradients_what_stands_between_still_sees_the_op() -> None:
    layer, x = lo.Linear(64, 48, adapter=lo.LoRA(4)), torch.randn(5, 2, 64)
    torch.nn.init.normal_(layer.up)
    expected, name = layer(x), "lowrank_ops::adapted_linear"

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name() if isinstance(func, torch._ops.OpOverload) else "")
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    for mode in (Names, Calls):
        with mode():
            assert torch.equal(layer(x), expected)
        assert name in seen
        seen.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert name in {event.name for event in profile.events()}
    assert name.replace("::", ".") in str(make_fx(layer)(x).graph)
    assert name in str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(layer(mode.from_tensor(x)), FakeTensor)
    torch.testing.assert_close(torch.vmap(layer)(x), expected)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected)


def test_autocast_decides_the_dtype() -> None:
    layer = lo.Linear(64, 48, adapter=lo.LoRA(4))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.up.grad.dtype == torch.float32


def test_an_implementation_asked_for_by_name_never_falls_back() -> None:
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    with lo.implementation("cuda"), pytest.raises(RuntimeError, match="'cuda'"):
        lo.functional.adapted_linear(x, w)
    with pytest.raises(RuntimeError, match="'cuda'.*one of triton, reference"):
        _plan.plan_nf4("cuda", "cuda", cuda_kernel=False)  # quantising, or a build without CUDA
    assert _plan.plan_nf4("cuda", "cuda", cuda_kernel=True).implementation == "cuda"
    assert _plan.plan_nf4("cuda", None, cuda_kernel=False).implementation == "triton"
    with pytest.raises(ValueError, match="fastest"), lo.implementation("fastest"):
        pass
    with lo.implementation("reference"):
        assert_bits_equal(lo.functional.adapted_linear(x, w), x @ w.T)


W, D, U = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "x must be a Tensor", lambda f: f([1.0], W)),
        (TypeError, "x must be float32.*int64", lambda f: f(torch.ones(2, 8, dtype=torch.int64), W)),
        (TypeError, "x must be float32.*float64", lambda f: f(torch.ones(2, 8, dtype=torch.float64), W)),
        (ValueError, r"x must be \[..., K=8\].*\[2, 7\]", lambda f: f(torch.ones(2, 7), W)),
        (ValueError, r"x must be \[..., K=8\]", lambda f: f(torch.tensor(1.0), W)),
        (TypeError, "weight must be a Tensor", lambda f: f(torch.ones(2, 8), None)),
        (ValueError, r"weight must be a non-empty \[N, K\], got \[8\]", lambda f: f(torch.ones(2, 8), W[0])),
        (ValueError, "weight must be contiguous", lambda f: f(torch.ones(2, 6), W.T)),
        (ValueError, "weight is frozen", lambda f: f(torch.ones(2, 8), W.clone().requires_grad_())),
        (TypeError, "weight must be float32.*int8", lambda f: f(torch.ones(2, 8), W.to(torch.int8))),
        (ValueError, "weight is on meta", lambda f: f(torch.ones(2, 8), W.to("meta"))),
        (ValueError, r"bias must be \[6\].*\[5\]", lambda f: f(torch.ones(2, 8), W, None, torch.ones(5))),
        (ValueError, r"update.down must be \[2, 8\]", lambda f: f(torch.ones(2, 8), W, lo.LowRankUpdate(D[:, :7], U))),
        (ValueError, r"update.up must be \[6, 2\]", lambda f: f(torch.ones(2, 8), W, lo.LowRankUpdate(D, U[:5]))),
        (TypeError, "update.up.*float64", lambda f: f(torch.ones(2, 8), W, lo.LowRankUpdate(D, U.double()))),
        (ValueError, "agree in R", lambda f: lo.LowRankUpdate(D, U[:, :1])),
        (TypeError, "core must be one of", lambda f: lo.LowRankUpdate(D, U, torch.ones(2))),
        (
            ValueError,
            "core must be 2 x 2.*got 3 x 3",
            lambda f: lo.LowRankUpdate(D, U, lo.cores.Diagonal(torch.ones(3))),
        ),
        (
            TypeError,
            "update.core must be float32.*float64",
            lambda f: f(torch.ones(2, 8), W, lo.LowRankUpdate(D, U, lo.cores.Diagonal(torch.ones(2).double()))),
        ),
        (ValueError, "down must be a non-empty", lambda f: lo.LowRankUpdate(D[:0], U[:, :0])),
        (TypeError, "up must be a Tensor", lambda f: lo.LowRankUpdate(D, None)),
        (ValueError, "dropout must be in", lambda f: lo.LowRankUpdate(D, U, dropout=1.0)),
        (TypeError, "scale must be a number", lambda f: lo.LowRankUpdate(D, U, scale=torch.ones(()))),
        (TypeError, "update must be a LowRankUpdate", lambda f: f(torch.ones(2, 8), W, (D, U))),
        (TypeError, "bias must be a Tensor", lambda f: f(torch.ones(2, 8), W, None, [0.0] * 6)),
        (ValueError, "x must be a dense tensor", lambda f: f(torch.ones(2, 8).to_sparse(), W)),
        (ValueError, "weight is on cpu and x on meta", lambda f: f(torch.ones(2, 8, device="meta"), W)),
    ],
)
def test_bad_input(error: type[Exception], message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(lo.functional.adapted_linear)
