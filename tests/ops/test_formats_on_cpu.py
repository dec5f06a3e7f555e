"""Every format in the C++ kernels: bytes and decoded bits against the reference, products in every form."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from mixes import Mix

from lowrank_ops import reference
from lowrank_ops.kernels.operands import FORMATS, Core, Format, Matrix
from lowrank_ops.ops import _cpu, arena

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=FORMATS.values(), ids=lambda format: format.name)
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


def random(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """Every midpoint of levels and its float32 neighbours, zeros of both signs, and blocks of extreme magnitudes."""
    parts = []
    for format in FORMATS.values():
        levels = torch.tensor(sorted(format.levels))
        middle = (levels[1:] + levels[:-1]) / 2
        infinity = torch.tensor(torch.inf)
        near = torch.cat([levels, middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)])
        parts += [near, near * 2.0**-20, near * 2.0**15]
    smallest = torch.finfo(dtype).smallest_normal
    parts += [torch.zeros(64), -torch.zeros(64), random((64,)) * smallest, random((64,)) * smallest / 64]
    parts += [torch.full((64,), torch.finfo(dtype).max), torch.full((64,), smallest)]
    for value in (torch.inf, -torch.inf, torch.nan):
        block = random((64,))
        block[17] = value
        parts.append(block)
    return torch.cat(parts).to(dtype)


def one_nan(x: torch.Tensor) -> torch.Tensor:
    """Replace every NaN by one, because a kernel may return any NaN."""
    return torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x


def parts_of(matrix: Matrix) -> tuple[torch.Tensor, ...]:
    return (*matrix.scales, None, None)[:3]  # type: ignore[return-value]


def dense(matrix: Matrix, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    if matrix.format is None:
        return matrix.data.to(dtype)
    return reference.dequantize(matrix.format, matrix.data, *parts_of(matrix), *shape, matrix.block_size, dtype)


def packed(format: Format, w: torch.Tensor, block_size: int, twice: bool = False) -> Matrix:
    data, scales = reference.quantize(format, w, block_size)
    if not twice or format.exponents:
        return Matrix(data, (scales,), block_size, format)
    offset = scales.mean()
    return Matrix(data, (*reference.absmax_quantize(scales, offset), offset), block_size, format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes(format: Format, dtype: torch.dtype, isa: str) -> None:
    for w in (random((33, 96)).to(dtype), random((7, 11)).to(dtype), random((1, 70001)).to(dtype), awkward(dtype)):
        for block_size in format.block_sizes[:3]:
            expected = reference.quantize(format, w, block_size)
            for got, bits in zip(_cpu.quantize(format, w, block_size), expected, strict=True):
                assert_bits_equal(one_nan(got), one_nan(bits))


def test_fp4_bytes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for dtype in DTYPES:
        for w in (random((33, 96)).to(dtype), awkward(dtype)[: -3 * 64]):
            theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="fp4")
            ours = _cpu.quantize(FORMATS["fp4"], w, 64)
            assert_bits_equal(ours[0], theirs.flatten())
            assert_bits_equal(ours[1], state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoded_bits(format: Format, dtype: torch.dtype, isa: str) -> None:
    for shape in ((1, 1), (3, 7), (5, 64), (9, 333), (3, 30000)):
        for block_size in format.block_sizes[:2]:
            numel = shape[0] * shape[1]
            data = torch.randint(0, 256, (format.bytes_of(numel),), dtype=torch.uint8)
            if format.exponents:
                scales = (torch.arange(-(-numel // block_size)) % 256).to(torch.uint8)
            else:
                scales = random((-(-numel // block_size),))
            out = torch.empty(shape, dtype=dtype)
            got = _cpu.dequantize(format, data, scales, None, None, out, block_size)
            expected = reference.dequantize(format, data, scales, None, None, *shape, block_size, dtype)
            assert_bits_equal(one_nan(got), one_nan(expected))


@pytest.mark.parametrize("form", _cpu.FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(format: Format, dtype: torch.dtype, form: str, isa: str) -> None:
    for M, N, K, block_size, twice in (
        (1, 70, 256, 64, True), (5, 67, 192, 32, False), (7, 65, 77, 64, False), (35, 80, 320, 64, True),
    ):  # fmt: skip
        block_size = block_size if block_size in format.block_sizes else 32
        R = 5
        weight = packed(format, random((N, K)), block_size, twice)
        down, up = packed(format, random((R, K), 1), 32), packed(format, random((N, R), 2), 32)
        x, g = random((M, K), 3).to(dtype), random((M, N), 4).to(dtype)

        def run(precise: torch.dtype, weights: torch.dtype) -> tuple[torch.Tensor, ...]:
            W, D, U = (
                dense(m, s, weights).to(precise)
                for m, s in ((weight, (N, K)), (down, (R, K)), (up, (N, R)))  # noqa: B023
            )
            to, from_ = x.to(precise), g.to(precise)  # noqa: B023
            return to @ W.T + 0.5 * (to @ D.T) @ U.T, from_ @ W + 0.5 * (from_ @ U) @ D

        exact, plain = run(torch.float64, torch.float32), run(dtype, dtype)
        y, h = _cpu.adapted_linear(x, weight, N, R, down, up, None, None, 0.5, 0.0, None, form)
        assert_within_baseline(y, exact[0], plain[0])
        dx = _cpu.adapted_linear_backward(
            g, x, h, weight, K, R, down, up, None, 0.5, 0.0, None, form, True, False, False, False
        )[0]
        assert dx is not None
        assert_within_baseline(dx, exact[1], plain[1])


@pytest.mark.parametrize("form", _cpu.FORMS)
def test_singular_basis(format: Format, form: str, isa: str) -> None:
    M, N, K, R = 5, 67, 192, 64
    u, vt = packed(format, random((N, R)), 32), packed(format, random((R, K), 1), 32)
    core = Core(random((R, R), 2))
    for dtype in DTYPES:
        x, g = random((M, K), 3).to(dtype), random((M, N), 4).to(dtype)

        def run(precise: torch.dtype, weights: torch.dtype) -> tuple[torch.Tensor, ...]:
            U, V = (dense(m, s, weights).to(precise) for m, s in ((u, (N, R)), (vt, (R, K))))
            C = core.values.to(precise)
            return x.to(precise) @ V.T @ C.T @ U.T, g.to(precise) @ U @ C @ V  # noqa: B023

        exact, plain = run(torch.float64, torch.float32), run(dtype, dtype)
        y, h = _cpu.svd_linear(x, u, core, vt, None, N, R, form)
        assert_within_baseline(y, exact[0], plain[0])
        dx = _cpu.svd_linear_backward(g, h, u, core, vt, K, R, True, False)[0]
        assert dx is not None
        assert_within_baseline(dx, exact[1], plain[1])


@pytest.mark.parametrize("form", _cpu.FORMS)
def test_one_nan_scale_reaches_its_rows_alone(form: str, isa: str) -> None:
    N, K = 6, 128
    weight = packed(FORMATS["mxfp4"], random((N, K)), 32)
    weight.scales[0][2 * K // 32 + 1] = 255
    for dtype in DTYPES:
        y = _cpu.adapted_linear(random((3, K)).to(dtype), weight, N, 0, None, None, None, None, 1.0, 0.0, None, form)[0]
        assert torch.equal(y.isnan().any(0).nonzero().flatten(), torch.tensor([2]))


@pytest.mark.parametrize("form", _cpu.FORMS)
def test_routed(format: Format, form: str, isa: str) -> None:
    N, K = 67, 192
    weight = packed(format, random((N, K)), 32)
    mix = Mix(N, K)
    for rank, kind in ((5, ""), (16, "dense"), (64, "diagonal")):
        mix.add(rank, kind, format.name if format.bits == 4 else "nf4")
    memory, table = arena.build(mix.packed, torch.device("cpu"))
    for dtype in DTYPES:
        x, slots, _ = mix.tokens(dtype)
        got = _cpu.routed_linear(x, weight, N, None, memory, table, slots, form)
        exact, plain = (
            mix.add_updates(x, slots, x.to(to) @ dense(weight, (N, K), of).to(to).T, to)
            for to, of in ((torch.float64, torch.float32), (dtype, dtype))
        )
        assert_within_baseline(got, exact, plain)
