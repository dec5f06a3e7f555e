"""Int8Weight: signed bytes in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ..kernels.operands import INT8
from .absmax import AbsmaxWeight


class Int8Weight(AbsmaxWeight):
    """w[n, k] = byte[f] · scale[f // block_size], f = n·K + k, with signed bytes from −127 to 127: 8.5 bits a weight.

    It is for output heads and embeddings, which lose more by 4 bits than other layers do. ``state_dict`` has the entries of
    :class:`AbsmaxWeight` with the mark ``quant_state.lowrank_ops__int8``; bitsandbytes has no such format.

    Attributes:
        packed: uint8 [N·K], the bytes; ``packed.view(torch.int8)`` has their signs.
        absmax: float32 [blocks], the scales: a block's largest magnitude / 127. Or uint8 [blocks] with double quantisation.
        The other attributes are those of :class:`AbsmaxWeight`.
    """

    format = INT8

    @classmethod
    def quantize(cls, weight: Tensor, block_size: int = 64, double_quant: bool = False) -> Self:  # type: ignore[override]
        """byte = w · 127 / absmax(block), rounded to the nearest whole number, half to even; scale = absmax / 127.

        Args:
            weight: W [N, K] or a stack [E, N, K], float32, bfloat16 or float16; any strides, on the CPU or a GPU.
            block_size: one of 32, 64, 128, …, 4096.
            double_quant: also quantise the scales to 8 bits, which saves 0.37 bits a weight at 64 and adds an error of the
                scales that is larger than that of the bytes.

        Raises:
            TypeError: weight is not a tensor or has another dtype.
            ValueError: weight is not 2-D or 3-D, empty, on the meta device or not finite; block_size is not allowed.

        Numerics: float32; every device makes the same bytes. absmax counts as at least 2^-119. The error of a weight is at
        most absmax / 254, but for the roundings of float32.
        """
        return cls._quantize(weight, block_size, double_quant, None, None, "diagonal", 0.1)

    def bound(self) -> float:
        return 127.0 * super().bound()

    def to_bitsandbytes(self, prefix: str = "") -> NoReturn:
        """Raise TypeError: bitsandbytes has no such format."""
        raise TypeError("bitsandbytes has no format with signed bytes in blocks; state_dict() has the entries of int8")

    @classmethod
    def from_bitsandbytes(cls, state_dict: Mapping[str, Any], prefix: str = "") -> NoReturn:
        """Raise TypeError: bitsandbytes has no such format."""
        raise TypeError(
            "bitsandbytes has no format with signed bytes in blocks; from_state_dict reads the entries of int8"
        )


torch.serialization.add_safe_globals([Int8Weight])
