"""The Triton kernels of routed_linear, called directly, against plain torch in float64.

They run in the interpreter, so in the process of ``TRITON_INTERPRET=1 pytest -m interpret``.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from mixes import F16, F32, KINDS, Mix
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs in Triton's interpreter only", allow_module_level=True)
pytest.importorskip("triton")

import lowrank_ops as lo
from lowrank_ops import NF4Weight, functional
from lowrank_ops.kernels import adapted_linear, routed_linear
from lowrank_ops.kernels.config import Config
from lowrank_ops.kernels.operands import NF4, Matrix
from lowrank_ops.ops import _cpu, _plan, arena

pytestmark = pytest.mark.interpret

FACTORS = (F32, F16, "single", "double")


def updated(
    mix: Mix, x: Tensor, slots: Tensor, y: Tensor, capacity: int = 80, config: Config | None = None,
    strengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    memory, table = arena.build(mix.packed, torch.device("cpu"))
    return routed_linear.add_updates(x, memory, table, slots, y.clone(), capacity, config, strengths=strengths)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("of", FACTORS, ids=str)
def test_kinds_of_core_and_of_factors(of: torch.dtype | str, dtype: torch.dtype) -> None:
    mix = Mix(67, 99)
    for kind, rank in itertools.product(KINDS, (5, 37)):
        mix.add(rank, kind, of)
    mix.add(1, "diagonal", of)
    x, slots, y = mix.tokens(dtype)
    got = updated(mix, x, slots, y)
    assert_within_baseline(got, mix.add_updates(x, slots, y, torch.float64), mix.add_updates(x, slots, y, dtype))
    assert_bits_equal(got[:2], y[:2])  # no adapter, and a slot that holds nothing


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_factors_of_every_format_side_by_side(dtype: torch.dtype) -> None:
    mix = Mix(67, 96)
    for rank, kind, of in (
        (5, "dense", "fp4"),
        (64, "", "fp4"),
        (32, "band1", "mxfp4"),
        (64, "", "mxfp4"),
        (7, "", "double"),
    ):
        mix.add(rank, kind, of)
    mix.add(9, "sparse", "single")
    x, slots, y = mix.tokens(dtype)
    got = updated(mix, x, slots, y)
    assert_within_baseline(got, mix.add_updates(x, slots, y, torch.float64), mix.add_updates(x, slots, y, dtype))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_many_tokens_of_mixed_ranks_and_dtypes(dtype: torch.dtype) -> None:
    mix = Mix(130, 64)
    for rank, kind, of in zip((1, 5, 16, 64, 160), ("", "band1", "dense", "", "sparse"), (*FACTORS, F32), strict=True):
        mix.add(rank, kind, of)
    M = 150
    slots = torch.randint(-1, 6, (M,), generator=mix.generator, dtype=torch.int32)
    wide, y = (torch.randn(M, columns, generator=mix.generator).to(dtype) for columns in (2 * mix.K, mix.N))
    x = wide[:, 3 : 3 + mix.K]
    got = updated(mix, x, slots, y, capacity=160)
    assert_within_baseline(got, mix.add_updates(x, slots, y, torch.float64), mix.add_updates(x, slots, y, dtype))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_several_updates_of_a_token(dtype: torch.dtype) -> None:
    mix = Mix(67, 64)
    for rank, kind, of in zip((5, 37, 16, 32, 8), KINDS, (F32, F16, "double", "mxfp4", "single"), strict=True):
        mix.add(rank, kind, of)
    x, slots, strengths, y = mix.mixed_tokens(dtype)
    config = Config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=16)
    got = updated(mix, x, slots, y, config=config, strengths=strengths)
    exact, baseline = (mix.add_updates(x, slots, y, to, strengths) for to in (torch.float64, dtype))
    assert_within_baseline(got, exact, baseline)
    alone = slots[:, 1] < 0  # the first column, at full strength
    single = updated(mix, x[alone], slots[alone, 0].contiguous(), y[alone], config=config)
    assert_bits_equal(got[alone], single)
    order = torch.randperm(len(x), generator=mix.generator)
    shuffled = updated(mix, x[order], slots[order], y[order], config=config, strengths=strengths[order])
    assert_bits_equal(shuffled, got[order])


def test_a_token_does_not_depend_on_the_others() -> None:
    mix = Mix(40, 48)
    for kind, of in zip(KINDS, itertools.cycle(FACTORS)):
        mix.add(20, kind, of)
    config = Config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=16)
    M = 40
    slots = torch.randint(-1, 6, (M,), generator=mix.generator, dtype=torch.int32)
    x, y = (torch.randn(M, columns, generator=mix.generator).half() for columns in (mix.K, mix.N))
    together = updated(mix, x, slots, y, config=config)
    assert_bits_equal(updated(mix, x, slots, y, config=config), together)
    for t in range(0, M, 7):
        assert_bits_equal(updated(mix, x[t : t + 1], slots[t : t + 1], y[t : t + 1], 20, config), together[t : t + 1])
    order = torch.randperm(M, generator=mix.generator)
    assert_bits_equal(updated(mix, x[order], slots[order], y[order], config=config), together[order])


def test_slots_that_are_none_and_ranks_that_are_too_large() -> None:
    mix = Mix(33, 40)
    mix.add(3, "", F32)
    mix.add(17, "diagonal", F32)
    slots = torch.tensor([1, -1, 2, 3, -5, 0], dtype=torch.int32)
    x, y = (torch.randn(len(slots), columns, generator=mix.generator) for columns in (mix.K, mix.N))
    got = updated(mix, x, slots, y, capacity=16)
    assert got[2].isnan().all()
    assert_bits_equal(got[[1, 3, 4, 5]], y[[1, 3, 4, 5]])
    assert_bits_equal(got[0], updated(mix, x, slots, y, capacity=17)[0])
    assert not got[0].isnan().any()


def test_launches_do_not_depend_on_the_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph can serve another mix, because two mixes differ in tensors alone."""
    seen: list[list[object]] = []

    def record(
        kernel: object, grid: tuple[int, ...], device: torch.device, *options: object, **arguments: object
    ) -> None:
        routes = arguments.pop("routes")
        assert isinstance(routes, routed_linear.Routes)
        arguments |= routes._asdict()
        sizes = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        shapes = {name: (tuple(t.shape), t.dtype) for name, t in arguments.items() if isinstance(t, Tensor)}
        shapes.pop("arena")  # its size depends on the mix here, but not in a pool
        seen[-1].append((kernel, grid, options, sizes, shapes))

    monkeypatch.setattr(routed_linear, "launch", record)
    for ranks in ((1, 2, 3), (64, 7, 16)):
        mix = Mix(40, 48)
        for rank, kind in zip(ranks, KINDS, strict=False):
            mix.add(rank, kind if ranks[0] == 1 else "", F16 if ranks[0] == 1 else "double")
        x, slots, y = mix.tokens(F32)
        seen.append([])
        updated(mix, x, slots if ranks[0] == 1 else slots.flip(0), y)
    assert len(seen[0]) == 3 and seen[0] == seen[1]


@pytest.mark.parametrize("form", adapted_linear.FORMS)
def test_the_product_with_the_weight_lies_below(form: str) -> None:
    mix = Mix(48, 64)
    mix.add(4, "dense", F32)
    w = NF4Weight.quantize(torch.randn(48, 64, generator=mix.generator))
    weight = Matrix(w.packed, (w.absmax, w.absmax2, w.offset), w.block_size, NF4)
    bias = torch.randn(48, generator=mix.generator)
    x, slots, _ = mix.tokens(F32)
    memory, table = arena.build(mix.packed, torch.device("cpu"))
    got = routed_linear.forward(x, weight, 48, bias, memory, table, slots, form, 4)
    plain, _ = adapted_linear.forward(x, weight, 48, 0, None, None, None, bias, 1.0, 0.0, None, form)
    assert_bits_equal(got[slots < 1], plain[slots < 1])
    exact, baseline = (
        mix.add_updates(x, slots, x.to(d) @ w.dequantize(F32).to(d).T + bias.to(d), d) for d in (torch.float64, F32)
    )
    assert_within_baseline(got, exact, baseline)


def test_the_op_adds_with_cuda_onto_the_product_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the op as with CUDA kernels in the build, with Triton's kernels in their place."""
    called = []

    def update(
        x: Tensor, memory: Tensor, table: Tensor, slots: Tensor, y: Tensor, capacity: int, strengths: Tensor | None
    ) -> Tensor:
        called.append(capacity)
        return routed_linear.add_updates(x, memory, table, slots, y, capacity, strengths=strengths)

    mix = Mix(48, 64)
    mix.add(4, "dense", F32)
    weight = torch.randn(48, 64, generator=mix.generator)
    x, slots, _ = mix.tokens(F32)
    memory, table = arena.build(mix.packed, torch.device("cpu"))
    operands = (x, weight, memory, table, slots, None)
    with lo.implementation("triton"):
        expected = functional.routed(*operands)
        monkeypatch.setattr(_cpu, "routed_update_cuda", update)
        monkeypatch.setattr(_plan, "plan_routed", lambda *_: _plan.Plan("cuda", "few", ""))
        assert_bits_equal(functional.routed(*operands), expected)
        assert_bits_equal(functional.routed(*operands, 4), expected)
    assert called == [512, 4]


@pytest.mark.parametrize("where", ["x", "factor", "core"])
def test_bfloat16_is_refused(where: str) -> None:
    bad = torch.bfloat16
    mix = Mix(32, 32)
    mix.add(4, "", bad if where == "factor" else F32)
    if where == "core":
        mix.add(4, "dense", bad)
        mix.packed[2] = (4, *mix.packed[1][1:3], mix.packed[2][3], 1.0)  # type: ignore[index]
    x, slots, y = mix.tokens(bad if where == "x" else F32)
    with pytest.raises(TypeError, match="bfloat16"):
        updated(mix, x, slots, y)
