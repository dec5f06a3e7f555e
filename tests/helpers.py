"""What the tests share: the tolerance rule, sample inputs, a reference for every op."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_ops import NF4Weight, reference


def _worst_row_rms(error: Tensor) -> float:
    return error.square().mean(dim=1).sqrt().max().item()


METRICS = {
    "maximum": lambda error: error.abs().max().item(),
    "worst row's RMS": _worst_row_rms,
    "worst column's RMS": lambda error: _worst_row_rms(error.T),
}


def assert_within_baseline(got: Tensor, exact: Tensor, baseline: Tensor, factor: float = 2.0) -> None:
    """The tolerance rule: the error of ``got`` is at most twice that of plain torch in the same dtype.

    Args:
        got: what the kernel made, 1-D or 2-D.
        exact: the float64 reference.
        baseline: plain torch in the dtype of ``got``.

    The slack, 1e-6 of the largest value, allows another order of summation in float32 and nothing else.
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

    def __str__(self) -> str:
        options = [f"M{self.M}-N{self.N}-K{self.K}-R{self.R}", str(self.dtype).removeprefix("torch.")]
        default = Sample(1, 1, 1, 1)
        options += [
            f"{name}={str(getattr(self, name)).removeprefix('torch.')}"
            for name in ("factors", "block_size", "double_quant", "bias", "dropout", "strided", "mean")
            if getattr(self, name) != getattr(default, name)
        ]
        return "-".join(options)


_BASE = Sample(M=3, N=48, K=128, R=5)
# Odd sizes by default: no multiple of a tile, blocks that straddle rows, rows that start in the middle of a byte.
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


@dataclass
class Tensors:
    """The operands of one sample, in the order of the op's schema."""

    x: Tensor
    weight: Tensor
    absmax: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    out_features: int
    block_size: int
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    scale: float
    dropout: float
    seed: Tensor | None

    def arguments(self) -> tuple:
        return tuple(vars(self).values())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] as the op sees it."""
        if not self.block_size:
            return self.weight.to(dtype)
        N, K = self.out_features, self.x.shape[1]
        return reference.nf4_dequantize(
            self.weight, self.absmax, self.absmax2, self.offset, N, K, self.block_size, dtype
        )

    def run_reference(self, dtype: torch.dtype) -> Tensor:
        return reference.adapted_linear(
            self.x.to(dtype), self.dense(dtype), self.down, self.up, self.bias, self.scale, self.dropout, self.seed
        )

    def run_reference_backward(self, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if dtype == torch.float64:  # gradients come out in the dtype of the factors, so widen those too
            down, up = (None if t is None else t.double() for t in (self.down, self.up))
        else:
            down, up = self.down, self.up
        return reference.adapted_linear_backward(
            g.to(dtype), self.x.to(dtype), self.dense(dtype), down, up, self.scale, self.dropout, self.seed
        )


def make(sample: Sample, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    s = sample
    x = normal(s.M, 2 * s.K if s.strided else s.K, dtype=s.dtype) + s.mean
    x = x[:, s.K // 2 : s.K // 2 + s.K] if s.strided else x
    w = normal(s.N, s.K, dtype=s.dtype if s.dtype != torch.float64 else torch.float32, std=s.K**-0.5)
    scales: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    weight = w
    if s.block_size:
        nf4 = NF4Weight.quantize(w.cpu(), s.block_size, s.double_quant).to(device)
        weight, scales = nf4.packed, (nf4.absmax, nf4.absmax2, nf4.offset)
    down = up = None
    if s.R:
        down = normal(s.R, s.K, dtype=s.factors, std=s.K**-0.5)
        up = normal(s.N, s.R, dtype=s.factors, std=s.R**-0.5)
    bias = normal(s.N, dtype=s.factors) if s.bias else None
    mask_seed = torch.tensor([seed * 2**33 + 12345], device=device) if s.dropout else None
    return Tensors(x, weight, *scales, s.N, s.block_size, down, up, bias, 1.7, s.dropout if s.R else 0.0, mask_seed)
