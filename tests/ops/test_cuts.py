"""Parts of a 4-bit weight, for tensor parallelism: the same numbers."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal

import lowrank_ops as lo
from lowrank_ops.formats import WEIGHTS, from_state_dict

# N, K, first and second part; the second level of scales starts again every 16384 weights.
ROWS = [(6, 64, 2, 6), (257, 128, 128, 257), (384, 128, 128, 256), (3, 96, 2, 3)]
COLUMNS = [(6, 192, 64, 192), (5, 256, 128, 256), (70, 512, 0, 256)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", WEIGHTS)
def test_a_part_has_the_numbers_of_the_whole(format: str, double_quant: bool) -> None:
    options = {} if format == "mxfp4" else {"double_quant": double_quant}
    for dim, cases in enumerate((ROWS, COLUMNS)):
        for N, K, begin, end in cases:
            whole = WEIGHTS[format].quantize(torch.randn(N, K, dtype=torch.bfloat16), **options)
            part, numbers = whole.cut(dim, begin, end), whole.dequantize(torch.float32)
            expected = numbers[begin:end] if dim == 0 else numbers[:, begin:end].contiguous()
            assert_bits_equal(part.dequantize(torch.float32), expected)
            assert part.dtype == whole.dtype and part.block_size == whole.block_size
            entries = {f"weight{key}": value for key, value in part._entries("").items()}
            assert_bits_equal(from_state_dict(entries, "weight").dequantize(torch.float32), expected)


def test_scales_stay_in_8_bits_where_rows_begin_a_group() -> None:
    whole = lo.NF4Weight.quantize(torch.randn(512, 128))
    assert whole.cut(0, 128, 256).double_quant and not whole.cut(0, 64, 256).double_quant
    assert not whole.cut(1, 0, 64).double_quant


def test_what_is_no_whole_block_is_refused() -> None:
    whole = lo.NF4Weight.quantize(torch.randn(6, 96))
    with pytest.raises(ValueError, match="rows 0 to 2 of a weight 6 x 96 are not whole blocks of 64"):
        whole.cut(0, 0, 3)
    with pytest.raises(ValueError, match="columns 0 to 63 of a weight 6 x 96 are not whole blocks"):
        whole.cut(1, 0, 64)
    with pytest.raises(ValueError, match="within 0 and 6, got 4 and 8"):
        whole.cut(0, 4, 8)
    with pytest.raises(ValueError, match="only a matrix"):
        lo.NF4Weight.quantize(torch.randn(2, 6, 64)).cut(0, 0, 2)
