"""The Triton kernels of experts_linear, called directly, against plain torch in float64.

They run in the interpreter, so in the process of ``TRITON_INTERPRET=1 pytest -m interpret``. The reference is a loop over
the experts of plain matrix products.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline, make_core
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs in Triton's interpreter only", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

import lowrank_ops as lo
from lowrank_ops import reference
from lowrank_ops.kernels import experts_linear, launch
from lowrank_ops.kernels.config import Arch, Config, Override
from lowrank_ops.kernels.expert_rows import count_tiles, groups_of, tile_of_rows
from lowrank_ops.kernels.operands import Core, Matrix

pytestmark = pytest.mark.interpret

F32, F16 = torch.float32, torch.float16
SCALE = 1.7
# The interpreter takes milliseconds per program, so tiles of h and of its gradient are fewer than on a GPU.
FAST = {"shrink": Config(BLOCK_M=16, BLOCK_K=64, BLOCK_R=32), "token_sum": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=32)}
FORMATS = {"nf4": lo.NF4Weight, "fp4": lo.FP4Weight, "mxfp4": lo.MXFP4Weight, "int8": lo.Int8Weight}


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]  # of each expert
    N: int
    K: int
    R: int
    dtype: torch.dtype = F32
    factors: torch.dtype | str = F32  # or a format
    weight: str = "nf4"  # a format or "dense"
    core: str = ""  # as in a Sample
    block_size: int = 32
    double_quant: bool = True
    dropout: float = 0.0
    sentinels: int = 0
    bias: bool = True


def make_stack(E: int, N: int, K: int, of: torch.dtype | str, case: Case) -> tuple[Matrix, Tensor]:
    """The stack as a launcher's argument, and its dense values."""
    w = torch.randn(E, N, K) * K**-0.5
    if isinstance(of, torch.dtype):
        return Matrix(w.to(of)), w.to(of)
    options = () if of == "mxfp4" else (case.block_size, case.double_quant)
    q = FORMATS[of].quantize(w, *options)
    return q.operand(), q.dequantize(F32)


class Layer:
    """The operands of one case, the launchers' results, and the results of plain torch."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(3)
        self.case = c = case
        self.E, self.P = len(c.rows), sum(c.rows) + c.sentinels
        self.offsets = torch.tensor([0, *c.rows]).cumsum(0).to(torch.int32)
        self.x = torch.randn(self.P, 2 * c.K).to(c.dtype)[:, c.K // 2 : c.K // 2 + c.K]
        self.g = torch.randn(self.P, c.N + 3).to(c.dtype)[:, : c.N]
        # What stands in rows without an expert must not matter.
        self.x[self.P - c.sentinels :], self.g[self.P - c.sentinels :] = float("nan"), float("inf")
        self.weight, self.dense_weight = make_stack(self.E, c.N, c.K, c.dtype if c.weight == "dense" else c.weight, c)
        self.down = self.up = self.core = None
        self.values = c.factors if isinstance(c.factors, torch.dtype) else F32
        if c.R:
            self.down, self.dense_down = make_stack(self.E, c.R, c.K, c.factors, c)
            self.up, self.dense_up = make_stack(self.E, c.N, c.R, c.factors, c)
        # One pattern for all experts, and values for each.
        self.one = make_core(c.core, c.R, self.values, torch.Generator().manual_seed(5))
        if self.one is not None:
            values = torch.randn(self.E, *self.one.values.shape).to(self.values)
            self.core = Core(values, self.one.index)
        self.bias = torch.randn(self.E, c.N).to(self.values) if c.bias else None
        self.seed = torch.tensor([2**40 + 17]) if c.dropout else None

    def forward(self, form: str, config: Override = FAST) -> tuple[Tensor, Tensor]:
        c = self.case
        return experts_linear.forward(
            self.x, self.weight, self.offsets, c.N, c.R, self.down, self.up, self.core, self.bias, SCALE, c.dropout,
            self.seed, form, config,
        )  # fmt: skip

    def run(self, form: str, config: Override = FAST) -> dict[str, Tensor | None]:
        c = self.case
        y, h = self.forward(form, config)
        assert h.dtype == F32 and h.shape == (self.P, c.R) and not h[self.P - c.sentinels :].any()
        trained = bool(c.R) and isinstance(c.factors, torch.dtype)
        grads = experts_linear.backward(
            self.g, self.x, h, self.weight, self.offsets, c.K, c.R, self.down, self.up, self.core, SCALE, c.dropout,
            self.seed, form, True, trained, trained, self.core is not None, config,
        )  # fmt: skip
        return dict(zip(("y", "dx", "ddown", "dup", "dcore"), (y, *grads), strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """y, dx and the gradients of every expert, in ``dtype``."""
        c, made = self.case, {}
        y, dx = torch.zeros(self.P, c.N, dtype=dtype), torch.zeros(self.P, c.K, dtype=dtype)
        keep = torch.ones(self.P, c.K, dtype=dtype)
        if self.seed is not None:
            keep = reference.dropout_mask(self.seed, self.P, c.K, c.dropout).to(dtype) / (1 - c.dropout)
        grads: list[list[Tensor]] = []
        for e, (first, end) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True)):
            rows = slice(int(first), int(end))
            x, g, w = self.x[rows].to(dtype), self.g[rows].to(dtype), self.dense_weight[e].to(dtype)
            y[rows], dx[rows] = x @ w.T, g @ w
            if self.bias is not None:
                y[rows] += self.bias[e].to(dtype)
            if not c.R:
                continue
            down, up = self.dense_down[e].to(dtype), self.dense_up[e].to(dtype)
            core = torch.eye(c.R, dtype=dtype)
            if self.core is not None:
                core = reference.core_matrix(self.core.values[e], self.core.index, c.R).to(dtype)
            dropped = x * keep[rows]
            h, gh = dropped @ down.T, SCALE * (g @ up)
            y[rows] += SCALE * (h @ core.T @ up.T)
            dx[rows] += (gh @ core @ down) * keep[rows]
            grads.append([(gh @ core).T @ dropped, SCALE * (g.T @ (h @ core.T))])
            if self.core is not None:
                values = reference.core_values(gh.T @ h, self.core.values[e], self.core.index)
                grads[-1].append(values.reshape(1, -1))
        for name, grad in zip(("ddown", "dup", "dcore"), zip(*grads, strict=True), strict=False):
            made[name] = torch.cat(grad)
        return {"y": y, "dx": dx, **made}


def check(layer: Layer, got: dict[str, Tensor | None]) -> None:
    c = layer.case
    exact, baseline = layer.plain(torch.float64), layer.plain(c.dtype)
    assert {name for name, mine in got.items() if mine is not None} == set(exact) - (
        {"ddown", "dup"} if isinstance(c.factors, str) else set()
    )
    for name, mine in got.items():
        if mine is None:
            continue
        of = c.dtype if name in ("y", "dx") else layer.values
        assert mine.dtype == of, name
        if name not in ("y", "dx"):
            assert mine.shape == {"ddown": layer.down, "dup": layer.up, "dcore": layer.core}[name][0].shape  # type: ignore[index]
            empty = [e for e, rows in enumerate(c.rows) if not rows]
            assert not mine[empty].any(), name
            mine = mine.flatten(1) if name == "dcore" else mine.flatten(0, 1)
        try:
            assert_within_baseline(mine, exact[name], baseline[name].to(of))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    for name in ("y", "dx"):
        assert not got[name][layer.P - c.sentinels :].any()  # type: ignore[index]


UNLIKE = (3, 0, 17, 1, 0)  # experts without rows, and one with more than a tile
CASES = [
    Case(UNLIKE, 67, 99, 5, sentinels=4, dropout=0.3),
    Case(UNLIKE, 40, 128, 16, F16, F16, core="diagonal"),
    Case(UNLIKE, 33, 64, 5, F16, weight="dense", core="dense", sentinels=1),
    Case((0, 1, 0, 1), 45, 192, 7, core="band2", block_size=64, double_quant=False),
    Case((20,), 34, 77, 9, core="sparse", block_size=64, dropout=0.5),  # E = 1
    Case((0, 0, 33, 0), 19, 96, 20, F16, weight="mxfp4", core="band1"),  # one expert has all rows
    Case((0, 0, 0), 19, 33, 4, sentinels=5, bias=False),  # no expert has rows
    Case((1, 2), 20, 130, 0, weight="fp4", sentinels=2),
    Case(UNLIKE, 64, 96, 32, factors="nf4", core="sparse"),
    Case((2, 0, 18), 37, 65, 21, F16, factors="nf4", core="diagonal", block_size=64, dropout=0.2),
    Case((1, 0, 1, 1, 0, 0), 40, 64, 64, weight="nf4", factors="fp4", double_quant=False),
    Case((5, 12), 40, 64, 32, F16, weight="mxfp4", factors="mxfp4", sentinels=3),
    Case((2, 0, 18), 37, 65, 5, weight="int8", double_quant=False),
    Case((3, 1), 20, 64, 5, weight="int8", factors="int8"),
]


def name_of(value: object) -> str:
    members = vars(value).values() if isinstance(value, Case) else [value]
    return "-".join(str(member).removeprefix("torch.") for member in members)


# Float32 has the same tiles in both forms beyond one row an expert.
WITH_FORMS = [(case, form) for case in CASES for form in experts_linear.FORMS if case.dtype == F16 or form == "few"]


@pytest.mark.parametrize("case, form", WITH_FORMS, ids=name_of)
def test_against_plain_torch(case: Case, form: str) -> None:
    layer = Layer(case)
    check(layer, layer.run(form))


def test_default_tiles() -> None:
    layer = Layer(Case((0, 2, 1, 0), 33, 64, 5, F16, F16, core="band1", sentinels=1, dropout=0.3))
    check(layer, layer.run("few", None))


def test_a_row_does_not_depend_on_the_others() -> None:
    layer = Layer(Case((2, 0, 19), 40, 64, 16, F16, F16, core="dense"))
    for config in (Config(), FAST | {"experts_forward": Config(BLOCK_M=1, BLOCK_N=32, BLOCK_K=64)}):
        y, h = layer.forward("few", config)
        again = layer.forward("few", config)
        assert_bits_equal(again[0], y)
        assert_bits_equal(again[1], h)
        x, offsets = layer.x, layer.offsets
        for row, expert in ((1, 0), (2, 2), (17, 2)):
            layer.x = x[row : row + 1]
            layer.offsets = (torch.arange(4) > expert).to(torch.int32)
            assert_bits_equal(layer.forward("few", config)[0], y[row : row + 1])
        layer.x, layer.offsets = x, offsets


def test_launches_do_not_depend_on_the_routing() -> None:
    """A captured graph can serve another routing, because two routings differ in what the offsets hold alone."""
    seen = []
    for rows in ((0, 21, 0), (7, 7, 7)):
        layer = Layer(Case(rows, 40, 64, 5, core="sparse"))
        for form in experts_linear.FORMS:
            with launch.recording(Arch("", 90, 132)) as launches:
                layer.run(form)
            for one in launches:
                sizes = {name: value for name, value in one.arguments.items() if not isinstance(value, (Tensor, tuple))}
                seen.append((len(rows), one.kernel, one.grid, one.num_warps, one.num_stages, sizes))
    assert len(seen) == 2 * 2 * 7 and seen[:14] == seen[14:]


@triton.jit
def _tiles_kernel(offsets_ptr, out_ptr, P, E, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    e, m, end = tile_of_rows(offsets_ptr, tl.program_id(0), P, E, GROUPS, BLOCK_M)
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(out_ptr + 2 * at, e.to(tl.int32))
    tl.store(out_ptr + 2 * at + 1, tl.where(m < end, m, -1))


@pytest.mark.parametrize("E, rows", [(1, 16), (7, 1), (7, 4), (20, 16)])
def test_tiles_cover_every_row_once_and_none_beyond(E: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(E)
    for P in (1, 5 * rows + 1):
        ends = [
            torch.full((E,), P),
            torch.zeros(E),
            *(torch.randint(P + 1, (E,), generator=generator) for _ in range(3)),
        ]
        wild = torch.randint(-(2**31), 2**31 - 1, (E + 1,), generator=generator)
        tried = [*(torch.cat([torch.zeros(1), end.sort().values]) for end in ends), torch.arange(E, -1, -1) * 30, wild]
        for offsets in (offsets.to(torch.int32) for offsets in tried):
            out = torch.full((count_tiles(P, E, rows), rows, 2), -7, dtype=torch.int32)
            _tiles_kernel[(len(out),)](offsets, out, P, E, groups_of(E), rows)
            experts, found = out.view(-1, 2).T
            assert found.max() < P
            if offsets[0] or (offsets.diff() < 0).any():
                continue  # a fault that only the CPU looks for
            experts, found = experts[found >= 0], found[found >= 0]
            assert found.tolist() == list(range(P))
            assert experts.tolist() == torch.bucketize(found, offsets[1:], right=True).tolist()


def test_unknown_forms_and_bfloat16_are_refused() -> None:
    layer = Layer(CASES[-1])
    with pytest.raises(ValueError, match="form must be one of"):
        layer.forward("some")
    layer.x = layer.x.bfloat16()
    with pytest.raises(TypeError, match="bfloat16"):
        layer.forward("few")
