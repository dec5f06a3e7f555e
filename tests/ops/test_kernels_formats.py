"""The Triton launchers that quantise and dequantise, in every format: bytes and bits of the reference.

They run in the interpreter, so in the process of ``TRITON_INTERPRET=1 pytest -m interpret``.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_bits_equal
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs in Triton's interpreter only", allow_module_level=True)
pytest.importorskip("triton")

from lowrank_ops import reference
from lowrank_ops.kernels import nf4
from lowrank_ops.kernels.operands import FORMATS, FP4, MXFP4, Format, Matrix

pytestmark = pytest.mark.interpret

F32, F16 = torch.float32, torch.float16
EVERY = pytest.mark.parametrize("format", list(FORMATS.values()), ids=list(FORMATS))


def assert_bytes_of_the_reference(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed, scales = nf4.quantize(format, w, block_size)
    for mine, expected in zip((packed, scales), reference.quantize(format, w, block_size), strict=True):
        assert_bits_equal(mine, expected)
    return packed, scales


@EVERY
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("numel", [1, 31, 64, 65, 1000, 4097])
def test_quantise_and_dequantise(numel: int, dtype: torch.dtype, format: Format) -> None:
    torch.manual_seed(numel)
    w = torch.randn(numel).to(dtype)
    w[numel // 4 : numel // 2] = 0
    w[numel // 3] = -0.0
    for block_size in sorted({format.block_sizes[0], format.block_sizes[-1]}):
        packed, scales = assert_bytes_of_the_reference(format, w, block_size)
        for of in (F32, F16):
            got = nf4.dequantize(Matrix(packed, (scales,), block_size, format), 1, numel, of)
            assert_bits_equal(got, reference.dequantize(format, packed, scales, None, None, 1, numel, block_size, of))


@EVERY
def test_ties(format: Format) -> None:
    levels = torch.tensor(sorted(format.levels))
    ties = torch.cat([(levels[1:] + levels[:-1]) / 2, levels])
    largest = torch.tensor([float(levels[-1])])
    # Once with the scale 1 in every block, once with other powers of two.
    blocks = [torch.cat([part, largest]) for part in torch.nn.functional.pad(ties, (0, -len(ties) % 31)).split(31)]
    for exponent in (0, 3, -20, 100, -110):
        assert_bytes_of_the_reference(format, torch.cat(blocks) * 2.0**exponent, 32)


@pytest.mark.parametrize("numel", [64, 640, 1003])
def test_fp4_is_that_of_bitsandbytes(numel: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(numel)
    w = torch.randn(numel)
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="fp4")
    packed, absmax = nf4.quantize(FP4, w, 64)
    assert_bits_equal(packed, theirs.flatten())
    assert_bits_equal(absmax, state.absmax)
    got = nf4.dequantize(Matrix(packed, (absmax,), 64, FP4), 1, numel, F32)
    assert_bits_equal(got.flatten(), functional.dequantize_4bit(theirs, state).flatten())


def test_mxfp4_of_any_bits() -> None:
    torch.manual_seed(4)
    w = torch.randint(-(2**31), 2**31, (32 * 256,)).to(torch.int32).view(F32)
    assert_bytes_of_the_reference(MXFP4, w, 32)
    edges = (float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-45, 2.0**-126, 2.0**-125, 0.0, -0.0)
    blocks = torch.tensor(edges).repeat_interleave(32)
    blocks[::3] *= 0.3
    assert_bytes_of_the_reference(MXFP4, blocks, 32)


def test_mxfp4_with_any_exponent() -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(16)
    exponents = torch.arange(256, dtype=torch.uint8)
    for dtype in (F32, F16):
        got = nf4.dequantize(Matrix(packed, (exponents,), 32, MXFP4), 256, 32, dtype)
        expected = reference.dequantize(MXFP4, packed, exponents, None, None, 256, 32, 32, dtype)
        assert_bits_equal(got[:255], expected[:255])
        assert got[255].isnan().all() and not got[:255].isnan().any()
