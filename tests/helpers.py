"""Helpers of all tests: the tolerance rule, sample inputs, a reference for every op."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ops import NF4Weight, cores, ops, reference
from lowrank_ops.cores import Core
from lowrank_ops.kernels import operands
from lowrank_ops.kernels.operands import Branch, Matrix


def _worst_row_rms(error: Tensor) -> float:
    return error.square().mean(dim=1).sqrt().max().item()


METRICS = {
    "maximum": lambda error: error.abs().max().item(),
    "worst row's RMS": _worst_row_rms,
    "worst column's RMS": lambda error: _worst_row_rms(error.T),
}


def assert_within_baseline(got: Tensor, exact: Tensor, baseline: Tensor, factor: float = 2.0) -> None:
    """The tolerance rule: the error of ``got`` is at most twice the error of plain torch in the same dtype.

    Args:
        got: the kernel's result, 1-D or 2-D.
        exact: the float64 reference.
        baseline: plain torch in the dtype of ``got``.

    The slack, 1e-6 of the largest value, allows for another order of summation in float32, and for nothing else.
    """
    assert got.dtype == baseline.dtype, f"dtype {got.dtype}, expected {baseline.dtype}"
    assert got.shape == exact.shape == baseline.shape, f"shapes {got.shape}, {exact.shape}, {baseline.shape}"
    if got.numel() == 0:
        return
    got64, exact, baseline64 = (torch.atleast_2d(t.detach().double().cpu()) for t in (got, exact, baseline))
    assert torch.isfinite(got64).all(), (
        f"{int((~torch.isfinite(got64)).sum())} of {got64.numel()} values are not finite"
    )
    slack = 1e-6 * exact.abs().max().item()
    for name, metric in METRICS.items():
        error, base = metric(got64 - exact), metric(baseline64 - exact)
        if error > factor * base + slack:
            worst = (got64 - exact).abs().argmax().item()
            row, column = divmod(int(worst), exact.shape[1])
            raise AssertionError(
                f"{name} of the error is {error:.3e}, plain {baseline.dtype} has {base:.3e} (allowed: {factor} x that + "
                f"{slack:.1e}); worst at [{row}, {column}]: got {got64[row, column]:.6g}, exact {exact[row, column]:.6g}"
            )


def assert_bits_equal(got: Tensor, expected: Tensor) -> None:
    """Equal bytes; NaN equals NaN and -0 differs from 0."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, f"{got.dtype} {got.shape}, {expected.dtype}"
    a, b = (t.contiguous().reshape(-1).view(torch.uint8).view(t.numel(), t.element_size()) for t in (got, expected))
    wrong = (a != b).any(dim=1).nonzero().flatten()
    if wrong.numel():
        i = int(wrong[0])
        left, right = got.reshape(-1)[i].item(), expected.reshape(-1)[i].item()
        raise AssertionError(
            f"{wrong.numel()} of {got.numel()} values differ, first [{i}]: {left!r}, expected {right!r}"
        )


WEIGHTS = ("normal", "uniform", "laplace")


def weights_of(kind: str, N: int, K: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    uniform, signs = torch.rand(N, K, generator=generator), torch.randint(2, (N, K), generator=generator) * 2 - 1
    normal, laplace = torch.special.ndtri(0.5 + uniform / 2), -torch.log1p(-uniform)
    return signs * {"normal": normal, "uniform": uniform, "laplace": laplace}[kind]


def run_driver(driver: Path, *arguments: object, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the driver that the fixture ``emulator`` built."""
    return subprocess.run([str(driver), *map(str, arguments)], input=data, capture_output=True, timeout=120)


@dataclass(frozen=True)
class Sample:
    """One input of adapted_linear: sizes and options; :func:`make` turns it into tensors."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.float32
    factors: torch.dtype = torch.float32
    block_size: int = 64  # 0: dense weight
    double_quant: bool = True
    bias: bool = True
    dropout: float = 0.0
    strided: bool = False
    mean: float = 0.0  # of x
    core: str = ""  # diagonal, band1 (any half-width), sparse, dense
    nf4_factors: bool = False
    branch: int = 0  # its rank

    def __str__(self) -> str:
        options = [f"M{self.M}-N{self.N}-K{self.K}-R{self.R}", str(self.dtype).removeprefix("torch.")]
        default = Sample(1, 1, 1, 1)
        options += [
            f"{name}={str(getattr(self, name)).removeprefix('torch.')}"
            for name in (
                "factors",
                "block_size",
                "double_quant",
                "bias",
                "dropout",
                "strided",
                "mean",
                "core",
                "nf4_factors",
                "branch",
            )
            if getattr(self, name) != getattr(default, name)
        ]
        return "-".join(options)


_BASE = Sample(M=3, N=48, K=128, R=5)
# The default sizes are odd: they are not multiples of a tile, blocks straddle rows, and rows start in the middle of a
# byte.
SAMPLES = [
    _BASE,
    replace(_BASE, M=1),
    replace(_BASE, M=17, R=16, dropout=0.3),
    replace(_BASE, M=63, N=67, K=192, R=16),
    replace(_BASE, M=7, N=65, K=77, R=5),
    replace(_BASE, M=17, N=19, K=99, R=1, block_size=32, dropout=0.5),
    replace(_BASE, M=5, N=7, K=250, R=7, block_size=128, double_quant=False),
    replace(_BASE, M=2, N=300, K=64, R=3, block_size=4096),
    replace(_BASE, M=1, N=1, K=1, R=1),
    replace(_BASE, M=4, N=40, K=130, R=70, strided=True),
    replace(_BASE, R=0),
    replace(_BASE, R=0, bias=False, M=17),
    replace(_BASE, M=9, N=65, K=129, R=5, block_size=0),
    replace(_BASE, M=33, N=50, K=70, R=4, block_size=0, bias=False, dropout=0.1),
    replace(_BASE, M=18, N=34, K=320, R=5, mean=3.0),
    replace(_BASE, M=50, N=96, K=160, R=4),  # whole tiles of a matrix unit in both directions, and left-over rows
]
CORE_SAMPLES = [
    replace(_BASE, core="diagonal"),
    replace(_BASE, M=1, R=16, core="band3"),
    replace(_BASE, M=17, R=5, core="band4", dropout=0.3),
    replace(_BASE, M=63, N=67, K=192, R=33, core="band8", nf4_factors=True),
    replace(_BASE, M=7, N=65, K=77, R=1, core="diagonal", nf4_factors=True),
    replace(_BASE, M=1, N=40, K=130, R=37, core="sparse"),
    replace(_BASE, M=18, N=65, K=129, R=20, core="sparse", block_size=0, nf4_factors=True),
    replace(_BASE, M=5, R=16, core="dense", strided=True),
    replace(_BASE, M=17, N=99, K=65, R=64, core="dense", nf4_factors=True, block_size=32),
    replace(_BASE, M=33, R=48, core="dense", dropout=0.2, double_quant=False),
    replace(_BASE, M=4, R=40, N=100, core="", nf4_factors=True),
]
BRANCH_SAMPLES = [
    replace(_BASE, branch=1),
    replace(_BASE, M=1, R=16, branch=16),
    replace(_BASE, M=17, R=16, branch=17, dropout=0.3),
    replace(_BASE, M=63, N=67, K=192, R=1, branch=16, block_size=32),
    replace(_BASE, M=7, N=65, K=77, R=0, branch=5),
    replace(_BASE, M=18, N=65, K=129, R=20, branch=17, core="sparse", block_size=0),
    replace(_BASE, M=50, N=96, K=160, R=40, branch=70, core="dense", nf4_factors=True, strided=True),
    replace(_BASE, M=4, N=40, K=130, R=37, branch=16, core="band3", bias=False),
    replace(_BASE, M=66, N=33, K=64, branch=16),
]


def samples(*dtypes: torch.dtype) -> list[Sample]:
    """Every sample in float32, and in each further dtype with factors of that dtype or of float32 in turn."""
    made = list(SAMPLES)
    for dtype in dtypes:
        made += [
            replace(s, dtype=dtype, factors=dtype if i % 2 else torch.float32)
            for i, s in enumerate(SAMPLES)
        ]  # fmt: skip
    return made


def dense(matrix: Tensor | NF4Weight | None, dtype: torch.dtype) -> Tensor | None:
    """Decode a matrix as the op does: NF4 levels times scales in float32, rounded once to ``dtype``."""
    if not isinstance(matrix, NF4Weight):
        return None if matrix is None else matrix.to(dtype)
    parts = (matrix.packed, matrix.absmax, matrix.absmax2, matrix.offset)
    return reference.nf4_dequantize(*parts, *matrix.shape, matrix.block_size, dtype)


def operand(type_: str, value: Any) -> Any:
    """Convert a value to the type in an op's declaration."""
    if type_ == "Matrix" and value is not None:
        return Matrix(value) if isinstance(value, Tensor) else value.operand()
    if type_ == "Core" and value is not None:
        return operands.Core(value.values, value.index)
    return value


def arguments(op: str, holder: object, **others: Any) -> tuple:
    """Flatten the operands of an op, taken by name from ``others`` or from ``holder``, to the arguments of its schema."""
    signature = ops.SIGNATURES[op]
    values = [others[o.name] if o.name in others else getattr(holder, o.name) for o in signature.operands]
    return tuple(signature.flatten(operand(o.type, v) for o, v in zip(signature.operands, values, strict=True)))


def places(op: str, *names: str) -> list[int]:
    """Positions of arguments in the schema of an op."""
    return [ops.SIGNATURES[op].arguments.index(name) for name in names]


@dataclass
class Tensors:
    """The operands of one sample."""

    x: Tensor
    weight: Tensor | NF4Weight
    rank: int
    down: Tensor | NF4Weight | None
    up: Tensor | NF4Weight | None
    core: Core | None
    bias: Tensor | None
    scale: float
    dropout: float
    seed: Tensor | None
    branch: Branch | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def arguments(self, **others: Any) -> tuple:
        """Return the arguments in the order of the schema of adapted_linear."""
        return arguments("adapted_linear", self, **others)

    def backward_arguments(self, g: Tensor, x: Tensor | None, h: Tensor | None, *needs: bool) -> tuple:
        """Return the arguments in the order of the schema of adapted_linear_backward; ``needs``: x, down, up, core."""
        needed = dict(zip(("need_x", "need_down", "need_up", "need_core"), needs, strict=True))
        return arguments("adapted_linear_backward", self, g=g, x=x, h=h, **needed)

    def _operands(self, dtype: torch.dtype) -> tuple:
        """Return down, up and core [R, R]; float64 ones for the judge, since gradients have the dtype of the factors."""
        wide = dtype == torch.float64
        down, up = (dense(f, dtype) if wide or isinstance(f, NF4Weight) else f for f in (self.down, self.up))
        core = None if self.core is None else self.core.dense().detach()
        return down, up, core.double() if wide and core is not None else core

    def run_reference(self, dtype: torch.dtype) -> Tensor:
        down, up, core = self._operands(dtype)
        return reference.adapted_linear(
            self.x.to(dtype), dense(self.weight, dtype), down, up, self.bias, self.scale, self.dropout, self.seed, core,
            self.branch,
        )  # fmt: skip

    def run_reference_backward(self, g: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        down, up, core = self._operands(dtype)
        dx, ddown, dup, dcore = reference.adapted_linear_backward(
            g.to(dtype), self.x.to(dtype), dense(self.weight, dtype), down, up, self.scale, self.dropout, self.seed,
            core=core, branch=self.branch,
        )  # fmt: skip
        if self.core is not None:
            dcore = reference.core_values(dcore, self.core.values, self.core.index)
        return dx, ddown, dup, dcore


def make_core(kind: str, R: int, dtype: torch.dtype, generator: torch.Generator) -> Core | None:
    """A random core by its name in a Sample; the sparse one has an empty row and column and rows of unlike counts."""

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.5).to(dtype)

    if not kind:
        return None
    if kind == "diagonal":
        return cores.Diagonal(normal(R))
    if kind == "dense":
        return cores.Dense(normal(R, R))
    if kind == "sparse":
        kept = torch.rand(R, R, generator=generator) < torch.rand(R, 1, generator=generator) * 0.5
        kept[R // 2], kept[:, R // 3], kept[0, 0] = False, False, True
        rows, cols = kept.nonzero().T
        shuffled = torch.randperm(len(rows), generator=generator)
        return cores.Sparse(rows[shuffled], cols[shuffled], normal(len(rows)), R)
    return cores.Banded(normal(2 * int(kind.removeprefix("band")) + 1, R))


def make(sample: Sample, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    s = sample
    x = normal(s.M, 2 * s.K if s.strided else s.K, dtype=s.dtype) + s.mean
    x = x[:, s.K // 2 : s.K // 2 + s.K] if s.strided else x
    w = normal(s.N, s.K, dtype=s.dtype if s.dtype != torch.float64 else torch.float32, std=s.K**-0.5)

    def packed(w: Tensor, block_size: int) -> Tensor | NF4Weight:
        return NF4Weight.quantize(w.cpu(), block_size, s.double_quant).to(device) if block_size else w

    down = up = core = None
    if s.R:
        down = packed(normal(s.R, s.K, dtype=s.factors, std=s.K**-0.5), 64 * s.nf4_factors)
        up = packed(normal(s.N, s.R, dtype=s.factors, std=s.R**-0.5), 32 * s.nf4_factors)
        core = make_core(s.core, s.R, s.factors, generator)
        core = None if core is None else on_device(core, device)
    bias = normal(s.N, dtype=s.factors) if s.bias else None
    mask_seed = torch.tensor([seed * 2**33 + 12345], device=device) if s.dropout else None
    dropout = s.dropout if s.R else 0.0
    branch = None
    if s.branch:
        factors = (
            normal(s.branch, s.K, dtype=s.dtype, std=s.K**-0.5),
            normal(s.N, s.branch, dtype=s.factors, std=s.branch**-0.5),
        )
        branch = Branch(*factors)
    return Tensors(x, packed(w, s.block_size), s.R, down, up, core, bias, 1.7, dropout, mask_seed, branch)


def on_device(core: Core, device: torch.device | str) -> Core:
    if isinstance(core, cores.Sparse):
        return cores.Sparse(core.rows.to(device), core.cols.to(device), core.values.to(device), core.size)
    if isinstance(core, cores.Banded):
        return cores.Banded(core.values.to(device), core.size)
    return type(core)(core.values.to(device))
