"""16-bit tokens as whole numbers (tile/word_levels.h) in every instruction set: any range, any numbers, any batch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import WEIGHTS, assert_bits_equal, assert_within_baseline, weights_of

import lowrank_ops as lo
from lowrank_ops import reference
from lowrank_ops.kernels.operands import FP4, MXFP4, NF4, Format, Matrix
from lowrank_ops.ops import _cpu

N, K, M = 67, 192, 11
DTYPES = (torch.bfloat16, torch.float16)
FORMATS = ((NF4, 64, True), (FP4, 32, False), (MXFP4, 32, False))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(w: torch.Tensor, format: Format, block_size: int, twice: bool) -> tuple[Matrix, torch.Tensor]:
    """The operand, and W in float32."""
    data, scales = reference.quantize(format, w, block_size)
    parts: tuple[torch.Tensor, ...] = (scales,)
    if twice:
        offset = scales.mean()
        parts = (*reference.absmax_quantize(scales, offset), offset)
    more = (*parts, None, None)[:3]
    return Matrix(data, parts, block_size, format), reference.dequantize(
        format, data, *more, *w.shape, block_size, torch.float32
    )


def product(x: torch.Tensor, weight: Matrix, form: str) -> torch.Tensor:
    return _cpu.adapted_linear(x, weight, N, 0, None, None, None, None, 1.0, 0.0, None, form)[0]


def gradient(g: torch.Tensor, weight: Matrix, K: int = K) -> torch.Tensor:
    """The product of g with W: dx."""
    dx = _cpu.adapted_linear_backward(
        g, None, None, weight, K, 0, None, None, None, 1.0, 0.0, None, "many", True, False, False, False
    )[0]
    assert dx is not None
    return dx


def tokens(kind: str, K: int = K) -> torch.Tensor:
    x = random(M, K, seed=1)
    if kind == "a large column":
        x[:, 70] *= 3e4
    elif kind == "some large columns":
        x[:, ::5] *= 3e3
    elif kind == "wide":
        x = torch.sign(x) * torch.exp(3 * random(M, K, seed=2) - 5)
    elif kind == "sparse":
        x = torch.where(x > 1.6, x, 0)
        x[3] = 0
    elif kind == "equal":
        x = torch.full((M, K), 1.7)
    elif kind == "small":
        x *= 1e-6
    return x


@pytest.mark.parametrize("form", _cpu.FORMS)
@pytest.mark.parametrize(
    "kind", ["a large column", "some large columns", "wide", "sparse", "equal", "small", "tiny", "huge"]
)
def test_any_range(kind: str, form: str, isa: str) -> None:
    for format, block_size, twice in FORMATS:
        for dtype in DTYPES:
            x = tokens(kind)
            if kind == "tiny":
                # Products of bfloat16 that are not normal are flushed to 0 by AVX-512 BF16.
                x *= 1e-22 if dtype == torch.bfloat16 else torch.finfo(dtype).smallest_normal * 8
            elif kind == "huge":
                x *= torch.finfo(dtype).max / 64
            x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
            x = torch.cat([x, x], 1)[:, :K]  # strided
            w = random(N, K) * (1e-3 if kind == "huge" else 1)
            if "large" in kind:  # what is rounded because of them is all there is
                w[:, tokens(kind).abs().amax(0) > 100] = 0
            weight, decoded = quantised(w, format, block_size, twice and "large" not in kind)
            y = product(x, weight, form)
            exact = x.double() @ decoded.double().T
            assert_within_baseline(y, exact, x @ decoded.to(dtype).T)


@pytest.mark.parametrize("kind", ["a large column", "wide", "sparse", "tiny", "huge"])
@pytest.mark.parametrize("rows", ["alike", "far apart", "a large one", "a small one", "none"])
def test_gradient_of_any_range(rows: str, kind: str, isa: str) -> None:
    N, large = 131, "large" in kind
    for format, block_size, twice in FORMATS:
        w = random(N, K) * (1e-3 if kind == "huge" else 1)
        if rows == "far apart":
            w *= torch.exp(3 * random(N, 1, seed=3))
        elif rows == "a large one":
            w[100] *= 1e4
        elif rows == "a small one":
            w[100] *= 1e-4
        elif rows == "none":
            w[:64] = 0
        if large:  # what is rounded because of it is all there is
            w[70] = 0
        weight, decoded = quantised(w, format, block_size, twice and not large and rows == "alike")
        for dtype in DTYPES:
            g = tokens(kind, N)
            # So that the other rows matter, and so does this one.
            g[:, 100] *= {"a large one": 1e-4, "a small one": 1e3}.get(rows, 1)
            if kind == "tiny":
                g *= 1e-22 if dtype == torch.bfloat16 else torch.finfo(dtype).smallest_normal * 8
            elif kind == "huge":
                g *= torch.finfo(dtype).max / 2**17
            g = g.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
            g = torch.cat([g, g], 1)[:, :N]  # strided
            exact = g.double() @ decoded.double()
            fits = exact.abs() < torch.finfo(dtype).max / 2
            dx = gradient(g, weight)
            zero = torch.zeros((), dtype=dtype)
            assert_within_baseline(
                torch.where(fits, dx, zero), exact.where(fits, zero), torch.where(fits, g @ decoded.to(dtype), zero)
            )


def test_gradient_of_numbers_that_are_not_finite(isa: str) -> None:
    N = 131
    for format, block_size, _ in FORMATS:
        weight, decoded = quantised(random(N, K), format, block_size, False)
        for dtype in DTYPES:
            g = random(M, N, seed=1).to(dtype)
            plain = gradient(g, weight)
            g[2, 5], g[4, 100], g[6, 130], g[6, 3] = torch.inf, torch.nan, -torch.inf, torch.inf
            dx, exact = gradient(g, weight), g.float() @ decoded
            for row in (2, 4, 6):
                assert torch.equal(dx[row].isnan(), exact[row].isnan()) and not dx[row].isfinite().any()
                assert torch.equal(dx[row] > 0, exact[row] > 0)
            rest = [0, 1, 3, 5, 7, 8, 9, 10]
            assert_bits_equal(dx[rest], plain[rest])


def test_gradient_of_scales_that_are_not_finite(isa: str) -> None:
    """Of more rows than a block has others, so that their median is not finite."""
    for number in (torch.nan, torch.inf):
        weight, _ = quantised(random(N, K), NF4, 64, False)
        g = random(M, N, seed=1).to(torch.bfloat16)
        plain = gradient(g, weight)
        weight[1][0].view(N, -1)[:40, 0] = number
        dx = gradient(g, weight)
        assert not dx[:, :64].isfinite().any()
        assert_bits_equal(dx[:, 64:], plain[:, 64:])


def test_gradient_of_a_row_does_not_depend_on_its_neighbours(isa: str) -> None:
    w = random(300, 640)
    w[100:110] *= 1e-3  # these rows are multiplied in float32
    weight, _ = quantised(w, *FORMATS[0][:2], False)
    threads = torch.get_num_threads()
    for dtype in DTYPES:
        g = random(140, 300, seed=1).to(dtype)
        g[1::3, 9] = 2000  # these columns are, too
        whole = gradient(g, weight, 640)
        for rows in (slice(0, 1), slice(1, 2), slice(2, 9), slice(1, 136)):
            assert_bits_equal(gradient(g[rows], weight, 640), whole[rows])
        try:
            torch.set_num_threads(3)
            assert_bits_equal(gradient(g, weight, 640), whole)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("form", _cpu.FORMS)
def test_numbers_that_are_not_finite(form: str, isa: str) -> None:
    for format, block_size, _ in FORMATS:
        weight, decoded = quantised(random(N, K), format, block_size, False)
        for dtype in DTYPES:
            x = random(M, K, seed=1).to(dtype)
            plain = product(x, weight, form)
            x[2, 5], x[4, 100], x[6, 191], x[6, 3] = torch.inf, torch.nan, -torch.inf, torch.inf
            y, exact = product(x, weight, form), x.float() @ decoded.T
            assert_bits_equal(y[:2], plain[:2])
            for row in (2, 4, 6):
                assert torch.equal(y[row].isnan(), exact[row].isnan()) and not y[row].isfinite().any()
                assert torch.equal(y[row] > 0, exact[row] > 0)
            assert_bits_equal(y[7:], plain[7:])


@pytest.mark.parametrize("form", _cpu.FORMS)
def test_a_row_does_not_depend_on_its_neighbours(form: str, isa: str) -> None:
    weight, _ = quantised(random(N, K), *FORMATS[0])
    for dtype in DTYPES:
        x = random(M, K, seed=1).to(dtype)
        x[1::3, 9] = 2000  # these columns are multiplied in float32
        whole = product(x, weight, form)
        for rows in (slice(0, 1), slice(1, 2), slice(2, 7), slice(1, 10)):
            assert_bits_equal(product(x[rows], weight, form), whole[rows])


def test_levels_of_words() -> None:
    """Check the claims of csrc/cpu/tile/word_levels.h about the rounded NF4 levels."""
    source = (Path(__file__).parents[2] / "csrc/cpu/tile/word_levels.h").read_text()
    ((fine, coarse),) = re.findall(r"kWordFactors\[2\]\[kFormats\] = \{\{(\d+),.*?\{(\d+),", source)
    code = torch.tensor(reference.NF4_CODE, dtype=torch.float64)
    for factor, claim in ((int(fine), 1e-6), (int(coarse), 4e-6)):
        error = (code * factor).round() / factor - code
        for kind in WEIGHTS:
            packed = lo.NF4Weight.quantize(weights_of(kind, 1024, 4096)).packed.long()
            share = torch.bincount(torch.cat([packed >> 4, packed & 15])).double() / (2 * packed.numel())
            assert abs((share * error).sum()) <= claim * (share * code.abs()).sum()


def test_an_instruction_set_that_is_not_there() -> None:
    module = _cpu.module()
    with pytest.raises(ValueError, match=f"'avx1024' is not usable here; usable: {', '.join(module.isas())}"):
        module.set_isa("avx1024")
