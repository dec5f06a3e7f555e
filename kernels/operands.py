"""The types of operands: formats, matrices and cores, as ops, launchers and compiled code take them. Needs only torch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Format(NamedTuple):
    """A format: w[f] = levels[code(f)] · scale(f // block_size), f runs over the row-major flattened matrix.

    A code is a nibble, two in a byte, the even element in the high one; or a whole byte.

    Attributes:
        name: "nf4", "fp4", "mxfp4" or "int8".
        element_type: its number on the compiled side and in an arena's table.
        levels: values of the nibbles 0 … 15, or of the bytes 0 … 255.
        block_sizes: allowed numbers of weights that share a scale.
        exponents: True if the scale of a block is 2^(byte - 127), one uint8 for each block; otherwise it is ``absmax``:
            float32, or uint8 with a second level (double quantisation).
    """

    name: str
    element_type: int
    levels: tuple[float, ...]
    block_sizes: tuple[int, ...]
    exponents: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code, 4 or 8."""
        return 4 if len(self.levels) == 16 else 8

    def bytes_of(self, numel: int) -> int:
        """Bytes of the codes of a matrix."""
        return -(-numel * self.bits // 8)


_ABSMAX_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# QLoRA (arXiv 2305.14314, appendix E): quantiles of a normal distribution, asymmetric so that 0 is exact.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes: sign, two bits of exponent, one of mantissa, in its own order, divided by the largest value, 12.
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
# OCP Microscaling formats v1.0, section 5.3.3: E2M1.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

NF4 = Format("nf4", 3, _NF4, _ABSMAX_BLOCKS)
# 0.0 - level, because bitsandbytes decodes nibble 8 to +0.
FP4 = Format("fp4", 5, _FP4 + tuple(0.0 - level for level in _FP4), _ABSMAX_BLOCKS)
MXFP4 = Format("mxfp4", 6, _E2M1 + tuple(-level for level in _E2M1), (32,), exponents=True)
# The bytes are signed; -128 is never made.
INT8 = Format("int8", 7, tuple(float(b - 256 * (b > 127)) for b in range(256)), _ABSMAX_BLOCKS)
FORMATS = {format.name: format for format in (NF4, FP4, MXFP4, INT8)}


class Matrix(NamedTuple):
    """A matrix [rows, columns], or a stack of them [E, rows, columns] whose tensors have a leading E, as an operand.

    Attributes:
        data: the tensor itself, or the codes, uint8 [ceil(rows · columns / 2)] or [rows · columns].
        scales: () for a dense matrix; (absmax,), or (absmax, absmax2, offset) with double quantisation; (exponents,).
        block_size: weights that share a scale; 0 for a dense matrix.
        format: None for a dense matrix.
    """

    data: Tensor
    scales: tuple[Tensor, ...] = ()
    block_size: int = 0
    format: Format | None = None


class Core(NamedTuple):
    """A core C [R, R]: the values of its pattern, and the int32 index of a sparse core (None for others).

    The cores of a stack have values with a leading E and share one index.
    """

    values: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which is never used


class Branch(NamedTuple):
    """A frozen low-rank part U_b D_b of the base beside W: dense, contiguous, of any float dtype; or a stack of them.

    Attributes:
        down: D_b [R_b, K], or [E, R_b, K].
        up: U_b [N, R_b], or [E, N, R_b].
    """

    down: Tensor
    up: Tensor


def of_expert(matrix: Matrix, expert: int) -> Matrix:
    """Matrix ``expert`` of a stack, over the same memory."""
    data, scales, block_size, format = matrix
    return Matrix(data[expert], tuple(scale[expert] for scale in scales), block_size, format)
