"""routed_linear: every row has its own update; compares with float64 and with the row alone."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline, operand
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops import cores, reference
from lowrank_ops.formats import QuantizedWeight
from lowrank_ops.functional import LowRankUpdate, adapted_linear, routed_linear
from lowrank_ops.kernels.operands import Core, Matrix
from lowrank_ops.ops import _plan, arena

FORMS = {"few": 10**9, "many": 0}
NARROW = LowRankUpdate(torch.ones(2, 32), torch.ones(32, 2))


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_plan, "FEW_TOKENS", dict.fromkeys(_plan.FEW_TOKENS, FORMS[request.param]))
    return request.param


def updates_of(N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[LowRankUpdate | None]:
    """Five kinds with ranks from 1 to 70, two of them over shared factors, in 32 bits, 16 and 4."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, to: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, to)

    shared = random(20, K, to=dtype), random(N, 20)
    small = lo.NF4Weight.quantize(random(70, K)), lo.NF4Weight.quantize(random(N, 70), double_quant=False)
    rows, cols = torch.tensor([0, 3, 5], device=device), torch.tensor([2, 0, 5], device=device)
    return [
        LowRankUpdate(random(16, K), random(N, 16), scale=0.5),
        LowRankUpdate(*shared, cores.Diagonal(random(20))),
        LowRankUpdate(*shared, cores.Dense(random(20, 20, to=dtype)), scale=2.0),
        None,
        LowRankUpdate(random(1, K, to=dtype), random(N, 1, to=dtype)),
        LowRankUpdate(random(6, K), random(N, 6), cores.Sparse(rows, cols, random(3), 6)),
        LowRankUpdate(*small, cores.Banded(random(5, 70))),
        LowRankUpdate(*small, cores.Diagonal(random(70)), scale=-1.5),
    ]


def exactly(
    x: Tensor, w: lo.NF4Weight | Tensor, updates: list[LowRankUpdate | None], slots: Tensor, bias: Tensor | None,
    dtype: torch.dtype, strengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    def plain(matrix: QuantizedWeight | Tensor) -> Tensor:
        return (matrix if isinstance(matrix, Tensor) else matrix.dequantize(torch.float32)).to(dtype)

    made = [
        None
        if u is None
        else (plain(u.down), plain(u.up), None if u.core is None else u.core.dense().to(dtype), u.scale)
        for u in updates
    ]
    bias = None if bias is None else bias.to(dtype)
    return reference.routed_linear(x.to(dtype), plain(w), bias, made, slots, strengths=strengths)


def updates_of_experts(E: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[LowRankUpdate | None]:
    """Stacks of E: dense and 4-bit factors, and every kind of core; two updates share their factors."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int, to: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(E, *shape, generator=generator) / shape[-1] ** 0.5).to(device, to)

    nf4 = lo.NF4Weight.quantize(random(20, K)), lo.NF4Weight.quantize(random(N, 20), 32, double_quant=False)
    mxfp4 = lo.MXFP4Weight.quantize(random(32, K)), lo.MXFP4Weight.quantize(random(N, 32))
    rows, cols = torch.tensor([0, 3, 5], device=device), torch.tensor([2, 0, 5], device=device)
    return [
        LowRankUpdate(random(7, K, to=dtype), random(N, 7), scale=0.5),
        LowRankUpdate(random(6, K), random(N, 6, to=dtype), cores.Sparse(rows, cols, random(3), 6)),
        LowRankUpdate(*nf4, cores.Banded(random(58), 20), scale=-1.5),
        None,
        LowRankUpdate(*nf4, cores.Diagonal(random(20, to=dtype))),
        LowRankUpdate(*mxfp4, cores.Dense(random(32, 32))),
    ]


def exactly_by_experts(
    x: Tensor, w: lo.NF4Weight | Tensor, offsets: Tensor, updates: list[LowRankUpdate | None], slots: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same by a loop over the experts, each with its own matrices."""
    y = torch.zeros(len(x), w.shape[1], dtype=dtype, device=x.device)
    for e in range(len(offsets) - 1):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        own = [None if u is None else LowRankUpdate(u.down[e], u.up[e], one_core(u.core, e), u.scale) for u in updates]
        y[rows] = exactly(x[rows], w[e], own, slots[rows], None if bias is None else bias[e], dtype)
    return y


def one_core(core: cores.Core | None, e: int) -> cores.Core | None:
    if core is None or not isinstance(core, cores.Sparse):
        return None if core is None else cores.Dense(core.dense()[e])
    return cores.Sparse(core.rows, core.cols, core.values[e], core.size)


EXPERTS = [([1, 0, 2, 1], 1, 64), ([0, 17, 3], 0, 32), ([0, 0, 40, 9], 2, 0), ([5], 0, 64), ([0, 0], 3, 64)]


@pytest.mark.parametrize("rows, rest, block_size", EXPERTS[:2] if _plan.interpreted() else EXPERTS)
def test_experts(rows: list[int], rest: int, block_size: int, device: torch.device, form: str,
                 dtypes: tuple[torch.dtype, ...]) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    E, N, K, M = len(rows), 35, 96, sum(rows) + rest
    dense = (torch.randn(E, N, K, generator=generator) / K**0.5).to(device)
    weight = lo.NF4Weight.quantize(dense, block_size) if block_size else dense
    offsets = torch.tensor([0, *rows], device=device).cumsum(0).to(torch.int32)
    slots = torch.randint(-1, 6, (M,), generator=generator).to(device)
    for dtype in (torch.float32, *dtypes):
        x, bias = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((M, K), (E, N)))
        updates, w = updates_of_experts(E, N, K, dtype, device), weight if block_size else dense.to(dtype)
        y = routed_linear(x, w, updates, slots, bias, offsets)
        judge = exactly_by_experts(x, w, offsets, updates, slots, bias, torch.float64)
        assert_within_baseline(y, judge, exactly_by_experts(x, w, offsets, updates, slots, bias, dtype))
        assert not y[M - rest :].any()


def test_the_reference_of_experts() -> None:
    torch.manual_seed(4)
    E, N, K, cpu = 3, 10, 12, torch.device("cpu")
    w, x, bias = torch.randn(E, N, K), torch.randn(8, K), torch.randn(E, N)
    offsets, slots = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, -1, 1, 1, 2, 3, 4, 0])
    updates = [u for u in updates_of_experts(E, N, 32, torch.float32, cpu) if u is None or isinstance(u.down, Tensor)]
    updates = [None if u is None else LowRankUpdate(u.down[..., :K], u.up, u.core, u.scale) for u in updates]
    slots = slots.clamp(max=len(updates) - 1)
    with lo.implementation("reference"):
        y = routed_linear(x, w, updates, slots, bias, offsets)
    assert_within_baseline(
        y,
        *(exactly_by_experts(x, w, offsets, updates, slots, bias, d) for d in (torch.float64, torch.float32)),
    )


@pytest.mark.parametrize("case", ["plain", "several", "experts"])
def test_the_backward_of_the_reference(case: str) -> None:
    """Every gradient equals autograd's through the forward, and gradcheck compares the forward with differences."""
    torch.manual_seed(6)
    M, N, K = 6, 4, 5
    stack = (3,) if case == "experts" else ()
    offsets = torch.tensor([0, 2, 2, 5]) if stack else None  # expert 1 has no rows, the last row no expert
    slots = torch.tensor([0, 2, -1, 0, 3, 2])
    strengths = None
    if case == "several":  # one row has an update twice
        slots, strengths = torch.stack([slots, torch.tensor([2, 0, -1, 0, -1, 3])], 1), torch.randn(M, 2).double()

    def random(*shape: int) -> Tensor:
        return torch.randn(*stack, *shape, dtype=torch.float64).requires_grad_()

    # Slot 1 is empty, and slot 4 has no rows.
    parts = [
        (random(r, K), random(N, r), random(r, r) if with_core else None)
        for r, with_core in ((2, 0), (3, 1), (1, 1), (2, 1))
    ]
    tensors = [part for update in parts for part in update if part is not None]
    weight, branch = random(N, K).detach(), (random(2, K).detach(), random(N, 2).detach())
    x, g = torch.randn(M, K, dtype=torch.float64, requires_grad=True), torch.randn(M, N, dtype=torch.float64)
    updates = [(*update, 0.5 - at) for at, update in enumerate(parts)]
    updates.insert(1, None)

    def forward(*_: Tensor) -> Tensor:
        return reference.routed_linear(x, weight, None, updates, slots, offsets, branch, strengths)

    assert torch.autograd.gradcheck(forward, (x, *tensors))
    expected = torch.autograd.grad(forward(), (x, *tensors), g, materialize_grads=True)
    with torch.no_grad():
        dx, gradients = reference.routed_linear_backward(g, x, weight, updates, slots, offsets, branch, strengths)
    assert gradients[1] is None
    got = [part for of_slot in gradients if of_slot is not None for part in of_slot if part is not None]
    for one, other in zip((dx, *got), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_experts_in_every_instruction_set(isa: str, form: str) -> None:
    test_experts([0, 17, 3], 1, 32, torch.device("cpu"), form, (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_an_expert_does_not_depend_on_its_neighbours(dtype: torch.dtype, form: str) -> None:
    E, N, K, M = 3, 70, 96, 60
    weight = lo.NF4Weight.quantize(torch.randn(E, N, K) / 10)
    updates = updates_of_experts(E, N, K, dtype, torch.device("cpu"))
    x, slots = torch.randn(M, K).to(dtype), torch.randint(-1, 6, (M,))
    offsets = torch.tensor([0, 21, 21, M], dtype=torch.int32)
    whole = routed_linear(x, weight, updates, slots, None, offsets)
    threads = torch.get_num_threads()
    try:
        for t, expert in ((0, 0), (20, 0), (21, 2), (59, 2)):
            torch.set_num_threads(1 + t % 3)
            alone = (torch.arange(E + 1) > expert).to(torch.int32)
            row = slice(t, t + 1)
            assert_bits_equal(routed_linear(x[row], weight, updates, slots[row], None, alone), whole[row])
            other = torch.randint(-1, 6, (M,))
            other[t] = slots[t]
            assert_bits_equal(routed_linear(x, weight, updates, other, None, offsets)[t], whole[t])
    finally:
        torch.set_num_threads(threads)


# The interpreter takes seconds for what a processor does in milliseconds.
@pytest.mark.parametrize("block_size", [64, 0] if _plan.interpreted() else [64, 32, 0])
@pytest.mark.parametrize("M", [3, 17] if _plan.interpreted() else [1, 3, 17, 63, 150])
@pytest.mark.parametrize("N, K", [(70, 96), (130, 256)])
def test_any_mix(M: int, N: int, K: int, block_size: int, device: torch.device, form: str,
                 dtypes: tuple[torch.dtype, ...]) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(M)
    dense = (torch.randn(N, K, generator=generator) / K**0.5).to(device)
    weight = lo.NF4Weight.quantize(dense, block_size) if block_size else dense
    slots = torch.randint(-1, 8, (M,), generator=generator).to(device)
    for dtype in (torch.float32, *dtypes):
        x, bias = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((M, K), (N,)))
        updates = updates_of(N, K, dtype, device)
        w = weight if block_size else dense.to(dtype)
        y = routed_linear(x, w, updates, slots, bias)
        judge = exactly(x, w, updates, slots, bias, torch.float64)
        assert_within_baseline(y, judge, exactly(x, w, updates, slots, bias, dtype))
        assert_bits_equal(routed_linear(x, w, updates, slots, bias), y)


def mixed_slots(M: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0 to 4 of count updates for each row, and their strengths; one alone has strength 1 and stands anywhere."""
    generator = torch.Generator().manual_seed(M)
    slots = torch.stack([torch.randperm(count, generator=generator)[:4] for _ in range(M)])
    kept = torch.rand(M, 4, generator=generator).argsort(1) < (torch.arange(M) % 5).unsqueeze(1)
    strengths = torch.where((torch.arange(M) % 5 == 1).unsqueeze(1), 1.0, torch.randn(M, 4, generator=generator))
    return torch.where(kept, slots, -1).to(device), strengths.to(device)


@pytest.mark.parametrize("M", [7] if _plan.interpreted() else [7, 33])
def test_several_updates_of_a_row(M: int, device: torch.device, form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    N, K = 70, 96
    dense = (torch.randn(N, K) / K**0.5).to(device)
    weight = lo.NF4Weight.quantize(dense)
    slots, strengths = mixed_slots(M, 8, device)
    for dtype in (torch.float32, *dtypes):
        x, bias = (torch.randn(*s).to(device, dtype) for s in ((M, K), (N,)))
        updates = updates_of(N, K, dtype, device)
        y = routed_linear(x, weight, updates, slots, bias, strengths=strengths)
        judge = exactly(x, weight, updates, slots, bias, torch.float64, strengths)
        assert_within_baseline(y, judge, exactly(x, weight, updates, slots, bias, dtype, strengths))
        alone = (slots >= 0).sum(1) < 2
        assert_bits_equal(y[alone], routed_linear(x, weight, updates, slots.amax(1), bias)[alone])
        order = torch.randperm(M, device=device)
        got = routed_linear(x[order], weight, updates, slots[order], bias, strengths=strengths[order])
        assert_bits_equal(got, y[order])
        if device.type == "cpu" and not _plan.interpreted():
            some = slice(M // 2, M // 2 + 1)
            got = routed_linear(x[some], weight, updates, slots[some], bias, strengths=strengths[some])
            assert_bits_equal(got, y[some])


def test_several_updates_of_a_row_in_every_instruction_set(isa: str, form: str) -> None:
    test_several_updates_of_a_row(7, torch.device("cpu"), form, (torch.bfloat16, torch.float16))


def test_several_updates_of_a_row_of_an_expert(device: torch.device, form: str) -> None:
    E, N, K, M = 3, 35, 96, 9
    dense = (torch.randn(E, N, K) / K**0.5).to(device)
    weight = lo.NF4Weight.quantize(dense)
    offsets = torch.tensor([0, 5, 5, 8], dtype=torch.int32, device=device)
    slots, strengths = mixed_slots(M, 6, device)
    updates = updates_of_experts(E, N, K, torch.float32, device)
    x = torch.randn(M, K).to(device)
    y = routed_linear(x, weight, updates, slots, None, offsets, strengths=strengths)
    with lo.implementation("reference"):
        plain = routed_linear(x, weight, updates, slots, None, offsets, strengths=strengths)
    made: list[Tensor] = []
    for dtype in (torch.float64, torch.float32):
        whole = torch.zeros(M, N, dtype=dtype, device=device)
        for e in range(E):
            rows = slice(int(offsets[e]), int(offsets[e + 1]))
            own = [
                None if u is None else LowRankUpdate(u.down[e], u.up[e], one_core(u.core, e), u.scale) for u in updates
            ]
            whole[rows] = exactly(x[rows], weight[e], own, slots[rows], None, dtype, strengths[rows])
        made.append(whole)
    assert_within_baseline(y, *made)
    assert_within_baseline(plain, *made)


@pytest.mark.parametrize(
    "error, message, slots, strengths",
    [
        (TypeError, "strengths must be a Tensor of floats, got list", torch.zeros(3, 2).int(), [1.0]),
        (TypeError, "must be a Tensor of floats, got torch.int32", torch.zeros(3, 2).int(), torch.zeros(3, 2).int()),
        (ValueError, r"slots must be \[3, S\]", torch.zeros(3).int(), torch.ones(3)),
        (ValueError, r"strengths must be \[3, 2\] on cpu, got \[3, 1\]", torch.zeros(3, 2).int(), torch.ones(3, 1)),
        (ValueError, "strengths must be finite", torch.zeros(3, 1).int(), torch.tensor([[1.0], [float("nan")], [1.0]])),
        (ValueError, r"slots must be \[3\], one for every row", torch.zeros(3, 2).int(), None),
        (ValueError, r"slots must be in \[-1, 1\), got 0 to 1", torch.tensor([[0], [0], [1]]), torch.ones(3, 1)),
    ],
)  # fmt: skip
def test_bad_strengths(error: type[Exception], message: str, slots: Tensor, strengths: Tensor | None) -> None:
    updates = [LowRankUpdate(torch.ones(2, 64), torch.ones(32, 2))]
    with pytest.raises(error, match=message):
        routed_linear(torch.ones(3, 64), torch.ones(32, 64), updates, slots, strengths=strengths)


def test_every_instruction_set(isa: str, form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for M in (4, 33):
            test_any_mix(M, 70, 256, 64, torch.device("cpu"), form, (dtype,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, form: str) -> None:
    N, K, M = 130, 256, 64
    weight = lo.NF4Weight.quantize(torch.randn(N, K) / 16)
    updates = updates_of(N, K, dtype, torch.device("cpu"))
    x, slots = torch.randn(M, K).to(dtype), torch.randint(-1, 8, (M,))
    whole = routed_linear(x, weight, updates, slots)
    threads = torch.get_num_threads()
    try:
        for t in (0, 5, 31, 63):
            torch.set_num_threads(1 + t % 3)
            # Alone, and among rows of other adapters.
            assert_bits_equal(routed_linear(x[t : t + 1], weight, updates, slots[t : t + 1]), whole[t : t + 1])
            other = torch.randint(-1, 8, (M,))
            other[t] = slots[t]
            assert_bits_equal(routed_linear(x, weight, updates, other)[t], whole[t])
    finally:
        torch.set_num_threads(threads)


def test_base_rows_are_the_base_to_the_bit(form: str) -> None:
    weight, x = lo.NF4Weight.quantize(torch.randn(96, 128)), torch.randn(40, 128).bfloat16()
    slots = torch.full((40,), -1)
    slots[::3] = 0
    y = routed_linear(x, weight, updates_of(96, 128, torch.bfloat16, torch.device("cpu")), slots)
    assert_bits_equal(y[slots < 0], adapted_linear(x, weight)[slots < 0])


def test_an_arena_gives_back_what_was_put_into_it() -> None:
    updates = updates_of(70, 96, torch.bfloat16, torch.device("cpu"))
    for update in updates:
        if update is None:
            continue
        parts = [operand("Matrix", factor) for factor in (update.down, update.up)]
        core = operand("Core", update.core)
        memory, table = arena.build([None, (update.rank, *parts, core, update.scale)], torch.device("cpu"))
        assert arena.update(memory, table[0].tolist(), 70, 96) is None
        rank, down, up, read, scale = arena.update(memory, table[1].tolist(), 70, 96)
        assert (rank, scale) == (update.rank, update.scale)
        for put, got in zip(parts, (down, up), strict=True):
            assert (got.block_size, got.format) == (put.block_size, put.format)
            for a, b in zip((put.data, *put.scales), (got.data, *got.scales), strict=True):
                assert_bits_equal(b, a)
        if core is None:
            assert read is None
        else:
            assert_bits_equal(read[0], core[0])
            assert (read[1] is None) == (core[1] is None)
            if core[1] is not None:
                assert torch.equal(read[1], core[1])


def test_shared_factors_lie_in_the_arena_once() -> None:
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    parts = [(4, Matrix(down), Matrix(up), Core(torch.randn(4)), 1.0) for _ in range(10)]
    memory, table = arena.build(parts, torch.device("cpu"))
    assert memory.numel() == down.nbytes + up.nbytes + 10 * arena.ALIGNMENT
    assert len(set(table[:, 1].tolist())) == 1 and len(set(table[:, 13].tolist())) == 10


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"slots must be in \[-1, 1\), got -1 to 1", {"slots": torch.tensor([0, 1, -1])}),
        (ValueError, r"slots must be in \[-1, 1\), got -2 to 0", {"slots": torch.tensor([0, 0, -2])}),
        (ValueError, r"slots must be \[3\]", {"slots": torch.tensor([0, 0])}),
        (TypeError, "slots must be a Tensor of integers", {"slots": torch.tensor([0.0, 0.0, 0.0])}),
        (TypeError, "slots must be a Tensor of integers", {"slots": [0, 0, 0]}),
        (TypeError, r"updates\[0\] must be a LowRankUpdate", {"updates": [3]}),
        (ValueError, r"updates\[0\].down must be \[2, 64\]", {"updates": [NARROW]}),
        (ValueError, r"x must be \[M, K=64\]", {"x": torch.ones(1, 3, 64)}),
        (ValueError, r"x must be \[..., K=64\]", {"x": torch.ones(3, 60)}),
        (ValueError, "no gradient", {"x": torch.ones(3, 64, requires_grad=True)}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, change: dict[str, object]) -> None:
    weight = lo.NF4Weight.quantize(torch.randn(32, 64))
    good = {
        "x": torch.ones(3, 64),
        "updates": [LowRankUpdate(torch.ones(2, 64), torch.ones(32, 2))],
        "slots": torch.tensor([0, -1, 0]),
    }
    arguments = good | change
    with pytest.raises(error, match=message):
        routed_linear(arguments["x"], weight, arguments["updates"], arguments["slots"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"weight must be a non-empty \[E, N, K\]", {"weight": torch.ones(32, 64)}),
        (ValueError, r"updates\[0\].down must be \[2, 2, 64\] for a weight 2 x 32 x 64", {"updates": [NARROW]}),
        (ValueError, r"offsets must be \[3\] for 2 experts", {"offsets": torch.tensor([0, 3], dtype=torch.int32)}),
        (TypeError, "offsets must be an int32 Tensor", {"offsets": torch.tensor([0, 3, 3])}),
        (ValueError, "offsets must not fall", {"offsets": torch.tensor([0, 3, 1], dtype=torch.int32)}),
        (ValueError, "offsets must end at most at the 3 rows", {"offsets": torch.tensor([0, 3, 4], dtype=torch.int32)}),
        (ValueError, r"bias must be \[2, 32\]", {"bias": torch.ones(32)}),
    ],
)  # fmt: skip
def test_bad_input_of_experts(error: type[Exception], message: str, change: dict[str, object]) -> None:
    good = {
        "x": torch.ones(3, 64),
        "weight": lo.NF4Weight.quantize(torch.randn(2, 32, 64)),
        "updates": [LowRankUpdate(torch.ones(2, 2, 64), torch.ones(2, 32, 2))],
        "slots": torch.tensor([0, -1, 0]),
        "bias": None,
        "offsets": torch.tensor([0, 1, 3], dtype=torch.int32),
    }
    with pytest.raises(error, match=message):
        routed_linear(*(good | change).values())  # type: ignore[arg-type]


def test_opcheck() -> None:
    weight = lo.NF4Weight.quantize(torch.randn(32, 64))
    updates = [LowRankUpdate(torch.randn(2, 64), torch.randn(32, 2))]
    data = (weight.packed, weight.absmax, weight.absmax2, weight.offset, weight.block_size)
    factors = [Matrix(f) for f in (updates[0].down, updates[0].up)]
    memory, table = arena.build([(2, *factors, None, 1.0)], torch.device("cpu"))
    x, slots = torch.randn(3, 64), torch.tensor([0, -1, 0], dtype=torch.int32)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    op = torch.ops.lowrank_ops.routed_linear.default
    torch.library.opcheck(op, (x, *data, 32, None, memory, table, slots), test_utils=utils)
    both, strengths = torch.stack([slots, slots.flip(0)], 1), torch.randn(3, 2)
    mixed = (x, *data, 32, None, memory, table, both, 512, None, None, None, strengths)
    torch.library.opcheck(op, mixed, test_utils=utils)
    with pytest.raises(ValueError, match=r"strengths must be \[3, 2\], got None"):
        op(*mixed[:-1])
    with pytest.raises(ValueError, match=r"strengths must be None for slots \[M\], got \[3\]"):
        op(*mixed[:10], slots, *mixed[11:-1], strengths[:, 0])
    stack, offsets = lo.NF4Weight.stack([weight]), torch.tensor([0, 2], dtype=torch.int32)
    data = (stack.packed, stack.absmax, stack.absmax2, stack.offset, stack.block_size)
    torch.library.opcheck(op, (x, *data, 32, None, memory, table, slots, 512, offsets), test_utils=utils)
    assert routed_linear(x[:0], weight, updates, slots[:0]).shape == (0, 32)


def test_pefts_mixed_batch_agrees() -> None:
    """The peer of the benchmark does the same work."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from lowrank_ops.bench.cases import bench_routed_linear as bench

    weight = lo.NF4Weight.quantize(torch.randn(64, 64).bfloat16())
    updates, x = bench.loras(3, (4, 8), 64, 64, torch.device("cpu")), torch.randn(6, 64).bfloat16()
    with torch.no_grad():
        theirs = bench.peft_batch(weight, updates)(x, [str(i % 3) for i in range(6)])
        ours = routed_linear(x, weight, updates, torch.arange(6) % 3)
    assert isinstance(theirs, Tensor)
    assert (theirs - ours).abs().max() < 0.02 * ours.abs().max()
