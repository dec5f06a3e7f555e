"""The Triton launchers with a core between the factors, called directly: every kind of core against float64.

They run in the interpreter, so in the process of ``TRITON_INTERPRET=1 pytest -m interpret``. The references here build the
dense C from the layout with plain loops and are plain matrix products; exact is float64, baseline the dtype itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs in Triton's interpreter only", allow_module_level=True)
pytest.importorskip("triton")

import lowrank_ops as lo
from lowrank_ops import reference
from lowrank_ops.kernels import adapted_linear, adapted_linear_few, matrix, svd_linear
from lowrank_ops.kernels import core as core_kernels
from lowrank_ops.kernels.config import Config
from lowrank_ops.kernels.operands import FORMATS, NF4, Branch, Core, Matrix

pytestmark = pytest.mark.interpret

F32, F16 = torch.float32, torch.float16
KINDS = ("none", "diagonal", "banded", "full band", "sparse", "dense")
SCALE = 1.7
# The interpreter takes milliseconds per program, so tiles are larger and fewer than on a GPU.
FAST = {"shrink": Config(BLOCK_M=16, BLOCK_K=64, BLOCK_R=32), "token_sum": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=32)}


def bandwidth(kind: str, R: int) -> int:
    return {"diagonal": 0, "banded": min(3, R - 1), "full band": R - 1}[kind]


def entries(kind: str, R: int) -> list[tuple[int, int]]:
    """(row, column) of the values of a core, in their order."""
    if kind == "dense":
        return [(i, j) for i in range(R) for j in range(R)]
    if kind == "sparse":
        # Rows have different counts; every third row and every fourth column is empty.
        pattern = []
        for i in range(R):
            if i % 3 != 1:
                columns = {(7 * i + 3 * n * n) % R for n in range(1 + i % 5)}
                pattern += [(i, j) for j in sorted(columns) if j % 4 or R == 1]
        return pattern
    d = bandwidth(kind, R)
    return [(i, i + o) for o in range(-d, d + 1) for i in range(R) if 0 <= i + o < R]


def make_core(kind: str, R: int, dtype: torch.dtype) -> Core | None:
    """Convert the core to a launcher's argument."""
    if kind == "none":
        return None
    pattern = entries(kind, R)
    values = torch.randn(len(pattern)).to(dtype)
    if kind == "dense":
        return Core(values.view(R, R))
    if kind != "sparse":
        return Core(values)
    by_column = sorted(range(len(pattern)), key=lambda e: pattern[e][::-1])
    index = [sum(i < row for i, _ in pattern) for row in range(R + 1)]
    index += [j for _, j in pattern]
    index += [sum(j < column for _, j in pattern) for column in range(R + 1)]
    index += [pattern[e][0] for e in by_column]
    return Core(values, torch.tensor(index + by_column, dtype=torch.int32))


def dense_core(core: Core | None, kind: str, R: int) -> Tensor:
    if core is None:
        return torch.eye(R)
    c = torch.zeros(R, R, dtype=core[0].dtype)
    for (i, j), value in zip(entries(kind, R), core[0].flatten(), strict=True):
        c[i, j] = value
    return c


def on_pattern(full: Tensor, kind: str) -> Tensor:
    """The entries of a matrix at the core's positions, in the order of its values."""
    rows, columns = zip(*entries(kind, full.shape[0]), strict=True)
    return full[list(rows), list(columns)]


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = F32
    values: torch.dtype = F32  # of the core, and of dense factors
    factors: str = "dense"  # or a format
    weight: str = "dense"
    dropout: float = 0.0
    block_size: int = 32
    double_quant: bool = True


def make_matrix(
    rows: int, columns: int, dtype: torch.dtype, format: str, block_size: int = 32, double_quant: bool = True
) -> tuple[Matrix, Tensor]:
    """The matrix as a launcher's argument, and its dense values."""
    m = (torch.randn(rows, columns) * columns**-0.5).to(dtype)
    if format == "dense":
        return Matrix(m), m
    if format == "nf4":
        q = lo.NF4Weight.quantize(m, block_size, double_quant)
        return q.operand(), q.dequantize(F32)
    packed, scales = reference.quantize(FORMATS[format], m, block_size)
    matrix = Matrix(packed, (scales,), block_size, FORMATS[format])
    return matrix, reference.dequantize(FORMATS[format], packed, scales, None, None, rows, columns, block_size)


class Adapted:
    """One adapted layer: its operands, the launchers' results, and the results of plain torch."""

    def __init__(self, case: Case, kind: str) -> None:
        torch.manual_seed(1)
        self.case, self.kind = case, kind
        c = case
        self.x, self.g = torch.randn(c.M, 2 * c.K).to(c.dtype)[:, : c.K], torch.randn(c.M, c.N).to(c.dtype)
        self.weight, self.dense_weight = make_matrix(c.N, c.K, c.dtype, c.weight)
        factors = (c.values, c.factors, c.block_size, c.double_quant)
        self.down, self.dense_down = make_matrix(c.R, c.K, *factors)
        self.up, self.dense_up = make_matrix(c.N, c.R, *factors)
        self.bias = torch.randn(c.N).to(c.values)
        self.core = make_core(kind, c.R, c.values)
        self.seed = torch.tensor([2**40 + 17]) if c.dropout else None
        self.config = None if c.M == 1 else FAST

    def forward(self, form: str, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        c = self.case
        return adapted_linear.forward(
            self.x if x is None else x, self.weight, c.N, c.R, self.down, self.up, self.core, self.bias, SCALE,
            c.dropout, self.seed, form, self.config,
        )  # fmt: skip

    def run(self, form: str) -> dict[str, Tensor | None]:
        c = self.case
        y, h = self.forward(form)
        assert h.dtype == F32 and h.shape == (c.M, c.R)
        grads = adapted_linear.backward(
            self.g, self.x, h, self.weight, c.K, c.R, self.down, self.up, self.core, SCALE, c.dropout, self.seed, form,
            True, c.factors == "dense", c.factors == "dense", self.core is not None, self.config,
        )  # fmt: skip
        return dict(zip(("y", "dx", "ddown", "dup", "dcore"), (y, *grads), strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        c = self.case
        x, g, w, down, up, bias, core = (
            t.to(dtype)
            for t in (
                self.x, self.g, self.dense_weight, self.dense_down, self.dense_up, self.bias,
                dense_core(self.core, self.kind, c.R),
            )
        )  # fmt: skip
        keep = torch.ones_like(x)
        if self.seed is not None:
            keep = reference.dropout_mask(self.seed, c.M, c.K, c.dropout).to(dtype) / (1 - c.dropout)
        h = (x * keep) @ down.T
        through = h @ core.T
        gh = SCALE * (g @ up)
        gd = gh @ core
        made = {
            "y": x @ w.T + bias + SCALE * (through @ up.T),
            "dx": g @ w + (gd @ down) * keep,
            "ddown": gd.T @ (x * keep),
            "dup": SCALE * (g.T @ through),
        }
        return made if self.core is None else made | {"dcore": on_pattern(gh.T @ h, self.kind)}


class Svd:
    """One layer U C Vt: its operands, the launchers' results, and the results of plain torch."""

    def __init__(self, case: Case, kind: str) -> None:
        torch.manual_seed(2)
        self.case, self.kind = case, kind
        c = case
        self.x, self.g = torch.randn(c.M, 2 * c.K).to(c.dtype)[:, : c.K], torch.randn(c.M, c.N).to(c.dtype)
        self.vt, self.dense_vt = make_matrix(c.R, c.K, c.values, c.factors)
        self.u, self.dense_u = make_matrix(c.N, c.R, c.values, c.factors)
        self.bias = torch.randn(c.N).to(c.values)
        self.core = make_core(kind, c.R, c.values)

    def forward(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        c = self.case
        return svd_linear.forward(self.x if x is None else x, self.u, self.core, self.vt, self.bias, c.N, c.R)

    def run(self) -> dict[str, Tensor | None]:
        c = self.case
        y, h = self.forward()
        assert h.dtype == c.dtype and h.shape == (c.M, c.R)
        grads = svd_linear.backward(
            self.g, h, self.u, self.core, self.vt, c.K, c.R, True, self.core is not None, FAST if c.M > 1 else None
        )
        return dict(zip(("y", "dx", "dcore"), (y, *grads), strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        c = self.case
        x, g, u, vt, bias, core = (
            t.to(dtype)
            for t in (self.x, self.g, self.dense_u, self.dense_vt, self.bias, dense_core(self.core, self.kind, c.R))
        )
        h, b = x @ vt.T, g @ u
        made = {"y": h @ core.T @ u.T + bias, "dx": b @ core @ vt}
        return made if self.core is None else made | {"dcore": on_pattern(b.T @ h, self.kind)}


def check(layer: Adapted | Svd, got: dict[str, Tensor | None]) -> None:
    c = layer.case
    exact, baseline = layer.plain(torch.float64), layer.plain(c.dtype)
    for name, mine in got.items():
        if mine is None:
            assert name not in exact or c.factors != "dense", name
            continue
        of = c.dtype if name in ("y", "dx") else c.values
        if name == "dcore":
            assert layer.core is not None and mine.shape == layer.core[0].shape
            mine = mine.flatten()
        assert mine.dtype == of, name
        try:
            assert_within_baseline(mine, exact[name], baseline[name].to(of))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# Cases that are missing from the samples of test_adapted_linear.py and test_svd_linear.py, which the interpreter runs
# too.
CASES = [Case(M=3, N=67, K=33, R=16, dropout=0.3), Case(M=17, N=33, K=40, R=70)]
CASES_16 = [Case(M=1, N=45, K=64, R=70, dtype=F16, factors="nf4", weight="nf4")]


def with_kinds(*cases: Case) -> pytest.MarkDecorator:
    # All 139 diagonals of R = 70 would take the interpreter half a minute.
    pairs = [(case, kind) for case in cases for kind in KINDS if kind != "full band" or case.R < 70]
    return pytest.mark.parametrize("case, kind", pairs, ids=lambda value: str(value).replace("torch.", ""))


@pytest.mark.parametrize("form", adapted_linear.FORMS)
@with_kinds(*CASES, *CASES_16)
def test_adapted_linear(case: Case, kind: str, form: str) -> None:
    layer = Adapted(case, kind)
    check(layer, layer.run(form))


@pytest.mark.parametrize("factors", ["dense", "nf4"])
@with_kinds(*CASES, *CASES_16)
def test_svd_linear(case: Case, kind: str, factors: str) -> None:
    layer = Svd(replace(case, factors=factors), kind)
    check(layer, layer.run())


SPLIT = FAST | {
    "few_forward_split": Config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, SPLITS=3),
    "few_backward_split": Config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, SPLITS=2),
}
SPLIT_CASES = [
    Case(M=17, N=70, K=128, R=20, weight="nf4", dropout=0.3),
    Case(M=3, N=67, K=101, R=5, weight="nf4"),
    Case(M=5, N=40, K=96, R=16, dtype=F16, factors="nf4", weight="nf4"),
    Case(M=3, N=33, K=40, R=16, dtype=F16),
]


@with_kinds(*SPLIT_CASES)
def test_split_sums(case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    original = adapted_linear.launch
    for module in (adapted_linear, adapted_linear_few):
        monkeypatch.setattr(
            module, "launch", lambda kernel, *a, **k: (started.append((kernel, k)), original(kernel, *a, **k))
        )
    layer = Adapted(case, kind)
    layer.config = SPLIT
    first = layer.run("few")
    check(layer, first)
    names = [kernel.fn.__name__ for kernel, _ in started]
    assert names.count("_few_split_kernel") == names.count("_expand_kernel") == 2
    assert not {"_few_forward_kernel", "_few_backward_kernel", "_shrink_kernel"} & set(names)
    # All splits are used, and the last one is shorter.
    assert [k["SPLITS"] for kernel, k in started if kernel.fn.__name__ == "_expand_kernel"] == [
        -(-case.K // (32 * -(-case.K // 96))), -(-case.N // (32 * -(-case.N // 64)))
    ]  # fmt: skip
    for name, value in layer.run("few").items():
        if value is not None:
            again = first[name]
            assert again is not None
            assert_bits_equal(again, value)


# Rows of the factors that are whole blocks, that share a block, and that start inside one or inside a byte.
NF4_FACTORS = [
    Case(M=1, N=40, K=128, R=64, factors="nf4", weight="nf4", block_size=64),
    Case(M=1, N=37, K=101, R=5, factors="nf4", block_size=64, double_quant=False),
    Case(M=3, N=70, K=192, R=16, factors="nf4", weight="nf4", block_size=64, dropout=0.3),
    Case(M=17, N=45, K=101, R=70, factors="nf4", weight="nf4", double_quant=False),
    Case(M=17, N=40, K=128, R=33, dtype=F16, factors="nf4", weight="nf4", block_size=64),
]


@pytest.mark.parametrize("config", ["one sum", "split sums", "default"])
@pytest.mark.parametrize("case", NF4_FACTORS, ids=lambda value: str(value).replace("torch.", ""))
def test_nf4_factors_are_decoded_beside_the_multiply(case: Case, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Adapted(case, "banded")
    layer.config = {"one sum": layer.config, "split sums": SPLIT, "default": None}[config]
    check(layer, layer.run("few"))
    monkeypatch.delattr(adapted_linear, "dequantize")
    layer.forward("few")
    with pytest.raises(NameError):
        layer.forward("many")


@pytest.mark.parametrize("rank", [5, 16, 64, 70])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_unit_vector_reads_the_factors_to_the_bit(tokens: int, double_quant: bool, rank: int) -> None:
    torch.manual_seed(9)
    R, N, K = rank, 37, 101 if rank % 2 else 192
    (down, dense_down), (up, dense_up) = (
        make_matrix(*shape, F32, "nf4", 64, double_quant) for shape in ((R, K), (N, R))
    )
    for config in (None, SPLIT):
        # One-hot inputs show the columns of D in h, with a dense U, and the columns of U in y, with the identity as D.
        columns = torch.arange(tokens) * 5 + 1
        zero, no_up = Matrix(torch.zeros(N, K)), Matrix(torch.zeros(N, R))
        _, h = adapted_linear.forward(
            torch.eye(K)[columns], zero, N, R, down, no_up, None, None, 1.0, 0.0, None, "few", config
        )
        assert_bits_equal(h, dense_down[:, columns].T.contiguous() + 0.0)
        columns %= R
        zero, same = Matrix(torch.zeros(N, R)), Matrix(torch.eye(R))
        y, _ = adapted_linear.forward(
            torch.eye(R)[columns], zero, N, R, same, up, None, None, 1.0, 0.0, None, "few", config
        )
        assert_bits_equal(y, dense_up[:, columns].T.contiguous() + 0.0)


def test_split_sums_without_an_update() -> None:
    torch.manual_seed(6)
    x, g, (w, dense) = torch.randn(3, 96), torch.randn(3, 70), make_matrix(70, 96, F32, "nf4")
    y, _ = adapted_linear.forward(x, w, 70, 0, None, None, None, None, 1.0, 0.0, None, "few", SPLIT)
    assert_within_baseline(y, x.double() @ dense.double().T, x @ dense.T)
    dx, *_ = adapted_linear.backward(
        g, None, None, w, 96, 0, None, None, None, 1.0, 0.0, None, "few", True, False, False, False, SPLIT
    )
    assert dx is not None
    assert_within_baseline(dx, g.double() @ dense.double(), g @ dense)


@pytest.mark.parametrize("rank, dropout", [(0, 0.0), (5, 0.3)])
def test_split_sums_with_a_branch(rank: int, dropout: float) -> None:
    torch.manual_seed(6)
    x, g, (w, dense) = torch.randn(3, 96), torch.randn(3, 70), make_matrix(70, 96, F32, "nf4")
    branch = Branch(torch.randn(17, 96) / 10, torch.randn(70, 17) / 4)
    down, up = (torch.randn(rank, 96) / 10, torch.randn(70, rank)) if rank else (None, None)
    factors = [None if f is None else Matrix(f) for f in (down, up)]
    seed = torch.tensor([2**40 + 17]) if dropout else None
    y, h = adapted_linear.forward(
        x, w, 70, rank, *factors, None, None, SCALE, dropout, seed, "few", SPLIT, branch
    )  # fmt: skip
    dx, *_ = adapted_linear.backward(
        g, x, h, w, 96, rank, *factors, None, SCALE, dropout, seed, "few", True, False, False, False, SPLIT, branch
    )
    made = []
    for dtype in (torch.float64, F32):
        own = [None if f is None else f.to(dtype) for f in (down, up)]
        both = tuple(f.to(dtype) for f in branch)
        operands = (dense.to(dtype), *own)
        forward = reference.adapted_linear(x.to(dtype), *operands, None, SCALE, dropout, seed, branch=both)
        backward = reference.adapted_linear_backward(
            g.to(dtype), x.to(dtype), *operands, SCALE, dropout, seed, branch=both
        )
        made.append((forward, backward[0]))
    assert dx is not None
    for mine, exact, plain in zip((y, dx), *made, strict=True):
        assert_within_baseline(mine, exact, plain)


@pytest.mark.parametrize("form", ["few", "split", "many"])
@pytest.mark.parametrize(
    "case",
    [
        Case(M=1, N=40, K=192, R=64, factors="fp4", weight="fp4", block_size=64),
        Case(M=17, N=45, K=101, R=5, factors="fp4", weight="fp4"),
        Case(M=3, N=70, K=128, R=16, dtype=F16, weight="fp4", dropout=0.3),
        Case(M=1, N=40, K=192, R=64, factors="mxfp4", weight="mxfp4"),
        Case(M=17, N=45, K=160, R=32, factors="mxfp4", weight="nf4"),
        Case(M=3, N=70, K=128, R=16, dtype=F16, weight="mxfp4", dropout=0.3),
        Case(M=1, N=40, K=192, R=16, weight="int8", block_size=64),
        Case(M=17, N=45, K=101, R=5, factors="nf4", weight="int8"),
    ],
    ids=lambda value: str(value).replace("torch.", ""),
)
def test_other_formats(case: Case, form: str) -> None:
    layer = Adapted(case, "banded")
    layer.config = SPLIT if form == "split" else layer.config
    check(layer, layer.run("few" if form == "split" else form))
    if form == "few":
        svd = Svd(case, "dense")
        check(svd, svd.run())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("config", [None, Config(BLOCK_M=1, BLOCK_N=64), Config(BLOCK_M=16, BLOCK_N=64)], ids=str)
def test_a_unit_vector_reads_the_weight_to_the_bit(block_size: int, double_quant: bool, config: Config | None) -> None:
    torch.manual_seed(7)
    N, K = 37, 2 * max(block_size, 128)
    q = lo.NF4Weight.quantize(torch.randn(N, K), block_size, double_quant)
    # Every byte occurs, so every nibble occurs in every place of a word.
    q.packed[:256] = torch.arange(256, dtype=torch.uint8)
    columns = [0, 1, 2, 3, 4, 5, 6, 7, K // 2 + 1, K - 1]
    if config is None or config.BLOCK_M == 1:
        rows = [torch.eye(K)[k : k + 1] for k in columns]
    else:
        rows = [torch.eye(K)[columns]]
    y = torch.cat([adapted_linear_few.few_forward(x, q.operand(), N, config=config) for x in rows])
    assert_bits_equal(y, q.dequantize(F32)[:, columns].T.contiguous() + 0.0)


def test_bytes_may_start_anywhere() -> None:
    torch.manual_seed(8)
    q = lo.NF4Weight.quantize(torch.randn(37, 128), 64, True)
    held = torch.empty(q.packed.numel() + 32, dtype=torch.uint8)
    start = (1 - held.data_ptr()) % 16  # an odd address: kernels may not read words there
    packed = held[start : start + q.packed.numel()].copy_(q.packed.flatten())
    assert packed.data_ptr() % 16 == 1
    w = Matrix(packed, (q.absmax, q.absmax2, q.offset), 64, NF4)
    assert not matrix.weight_argument(w, 128).ALIGNED.value
    y = adapted_linear_few.few_forward(torch.eye(128)[5:6], w, 37)
    assert_bits_equal(y[0], q.dequantize(F32)[:, 5] + 0.0)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_gradient_of_the_core_over_split_tokens(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    M, R = 100, 18
    gh, h = torch.randn(M, R), torch.randn(M, R).to(dtype)
    core = make_core(kind, R, dtype)
    assert core is not None
    split = Config(BLOCK_M=16, BLOCK_N=32, BLOCK_R=16, SPLITS=3)
    got = core_kernels.core_gradient(gh, h, core, SCALE, split)
    exact = SCALE * on_pattern(gh.double().T @ h.double(), kind)
    assert_within_baseline(got.flatten(), exact, SCALE * on_pattern(gh.to(dtype).T @ h, kind))
    assert_bits_equal(core_kernels.core_gradient(gh, h, core, SCALE, split), got)


def test_splits_are_really_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    original = core_kernels.launch
    monkeypatch.setattr(
        core_kernels, "launch", lambda kernel, grid, *a, **k: (grids.append(grid), original(kernel, grid, *a, **k))
    )
    core = make_core("banded", 33, F32)
    assert core is not None
    core_kernels.core_gradient(torch.randn(100, 33), torch.randn(100, 33), core, config=Config(BLOCK_M=16, SPLITS=3))
    assert [grid[-1] for grid in grids] == [3, 1] and len(grids[1]) == 1


@pytest.mark.parametrize("kind", ["diagonal", "banded", "full band", "sparse"])
def test_nothing_outside_the_pattern_is_read_into_it(kind: str) -> None:
    R, bad = 16, 6
    h = torch.randn(5, R)
    h[2, bad] = float("inf")
    core = make_core(kind, R, F32)
    assert core is not None
    wrong = [not torch.isfinite(v) for v in core_kernels.core_gradient(torch.randn(5, R), h, core)]
    assert wrong == [j == bad for _, j in entries(kind, R)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_a_sparse_core_does_not_read_cannot_spoil_it() -> None:
    layer = Svd(Case(M=3, N=20, K=37, R=16), "sparse")
    assert all(column > 0 for _, column in entries("sparse", 16))
    layer.dense_vt[0] = float("inf")
    y, h = layer.forward()
    assert not torch.isfinite(h[:, 0]).any() and torch.isfinite(y).all()


@pytest.mark.parametrize("kind", ["banded", "sparse", "dense"])
def test_the_same_call_gives_the_same_bits(kind: str) -> None:
    case = Case(M=17, N=33, K=37, R=20, dtype=F16, dropout=0.3)
    for first, second in (
        (Adapted(case, kind).run("few"), Adapted(case, kind).run("few")),
        (Svd(case, kind).run(), Svd(case, kind).run()),
    ):
        for name, value in first.items():
            assert value is not None and second[name] is not None
            assert_bits_equal(second[name], value)


def test_only_what_is_needed_is_made() -> None:
    layer = Adapted(Case(M=3, N=20, K=37, R=5), "banded")
    c = layer.case
    h = torch.randn(c.M, c.R)
    operands = (layer.weight, c.K, c.R, layer.down, layer.up, layer.core, SCALE, 0.0, None, "few")
    for asked in range(4):
        needed = [i == asked for i in range(4)]
        x, saved = layer.x if needed[1] else None, h if needed[2] or needed[3] else None
        got = adapted_linear.backward(layer.g, x, saved, *operands, *needed)
        assert [grad is not None for grad in got] == needed
    svd = Svd(c, "banded")
    for needed in ([True, False], [False, True]):
        got = svd_linear.backward(svd.g, h, svd.u, svd.core, svd.vt, c.K, c.R, *needed)
        assert [grad is not None for grad in got] == needed


def test_no_update() -> None:
    torch.manual_seed(4)
    x, w, g = torch.randn(3, 37), torch.randn(20, 37), torch.randn(3, 20)
    for form in adapted_linear.FORMS:
        y, h = adapted_linear.forward(x, Matrix(w), 20, 0, None, None, None, None, 1.0, 0.0, None, form)
        assert h.shape == (3, 0)
        assert_within_baseline(y, x.double() @ w.double().T, x @ w.T)
        dx, *others = adapted_linear.backward(
            g, None, h, Matrix(w), 37, 0, None, None, None, 1.0, 0.0, None, form, True, False, False, False
        )
        assert dx is not None and others == [None, None, None]
        assert_within_baseline(dx, g.double() @ w.double(), g @ w)


def test_bfloat16_is_refused() -> None:
    layer = Svd(Case(M=3, N=20, K=37, R=5), "diagonal")
    assert layer.core is not None
    layer.core = (layer.core[0].bfloat16(), None)
    with pytest.raises(TypeError, match="bfloat16"):
        layer.forward()


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form must be one of"):
        Adapted(Case(M=3, N=20, K=37, R=5), "none").forward("both")
