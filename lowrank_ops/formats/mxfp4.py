"""MXFP4Weight: OCP microscaling, blocks of 32 that share a power-of-two scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ..kernels.operands import MXFP4, Matrix
from .base import FLOAT_DTYPES, QuantizedWeight, check_format
from .rounding import Curvature

_BLOCK = MXFP4.block_sizes[0]
_LARGEST = 252


class MXFP4Weight(QuantizedWeight):
    """w[n, k] = E2M1[nibble] · 2^(exponents[n·K/32 + k // 32] − 127): 4.25 bits a weight, K a multiple of 32.

    E2M1 is 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. The entries in a state dict are those of gpt-oss:
    ``weight_blocks`` uint8 [N, K/32, 16] and ``weight_scales`` uint8 [N, K/32]. They keep the even element in the low
    nibble; the kernels of all formats expect it in the high nibble, so nibbles are swapped when entries are read and
    written. A stack [E, N, K] has blocks [E, N, K/32, 16] and scales [E, N, K/32], as gpt-oss's experts do.

    The entries do not record the dtype of the quantised weight, so a layer that loads them keeps its own.

    Attributes:
        packed: uint8 [N·K / 2], the even element in the high nibble.
        exponents: uint8 [N·K / 32], at most 252: 255 stands for NaN, and 253 and 254 reach infinity in float32.
        shape, dtype: (N, K), or (E, N, K) of a stack, whose buffers have a leading E; the dtype of the weight that was
            quantised.

    Source: OCP Microscaling Formats (MX) v1.0.
    """

    format = MXFP4
    _BLOCK_SCALES = "exponents"
    exponents: Tensor

    def __init__(
        self,
        packed: Tensor,
        exponents: Tensor,
        shape: tuple[int, ...],
        block_size: int = _BLOCK,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._check_block_size(block_size)
        super().__init__({"packed": packed, "exponents": exponents}, shape, block_size, dtype)

    def _check(self, buffers: Mapping[str, Tensor | None]) -> None:
        self._check_columns(self.in_features)
        super()._check(buffers)
        exponents = buffers["exponents"]
        if exponents is not None and not exponents.is_meta and (largest := int(exponents.max())) > _LARGEST:
            raise ValueError(
                f"scales of an MXFP4 weight must be at most {_LARGEST} (255 is NaN, 253 and 254 reach infinity in float32), "
                f"got {largest}"
            )

    @staticmethod
    def _check_columns(K: int) -> None:
        if K % _BLOCK:
            raise ValueError(f"an MXFP4 weight [N, K] needs K a multiple of {_BLOCK}, got K={K}")

    def _expected_buffers(self, buffers: Mapping[str, Tensor | None]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        numel = self.out_features * self.in_features
        return [("packed", torch.uint8, (numel // 2,)), ("exponents", torch.uint8, (numel // _BLOCK,))]

    @classmethod
    def check_dense(cls, weight: Tensor) -> None:
        super().check_dense(weight)
        cls._check_columns(weight.shape[-1])

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        *,
        second_moment: Tensor | Curvature | None = None,
        scales: str | None = None,
        order: str = "diagonal",
        damping: float = 0.1,
    ) -> Self:
        """exponent = ⌊log2 max |w|⌋ − 2 over a block of 32, nibble = the E2M1 number nearest to w / 2^exponent.

        With ``second_moment`` or ``scales="search"`` the same format has other codes and scales: docs/quantization.md.

        Args:
            weight: W [N, K] or a stack [E, N, K], K a multiple of 32, float32, bfloat16 or float16; any strides, on the
                CPU or a GPU.
            second_moment: H = E[x xᵀ] of the layer's inputs, [K, K] float32 or float64 on the device of weight; a stack
                may have [E, K, K]. The codes are then chosen to make tr(E H Eᵀ) small, E = W − Ŵ: the mean square of
                the error of W x. Or a :class:`formats.Curvature`, for layers that share an input.
            scales: "absmax" takes this exponent; "search" the one with the least error, weighted by H_kk.
                Default: "search" with a second moment, else "absmax".
            order: "diagonal" feeds errors back by falling H_kk, "columns" in the order of the columns.
            damping: the part of the mean of H_kk that is added to H's diagonal; doubled where H is not positive definite
                with it. ``weight.rounding`` tells what was used.

        Raises:
            TypeError: weight or second_moment is not a tensor or has another dtype.
            ValueError: weight is not 2-D or 3-D, empty, on the meta device or not finite; K is not a multiple of 32;
                second_moment has another shape, is not finite, symmetric and positive semidefinite, or is zero.

        Numerics: scaling is exact; ties take the even mantissa, and values beyond 6 saturate to 6.

        Source: OCP Microscaling Formats (MX) v1.0, section 6.3.
        """
        return cls._quantize(weight, _BLOCK, False, second_moment, scales, order, damping)

    @classmethod
    def from_blocks(cls, blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Self:
        """Make the weight from gpt-oss's ``…_blocks`` and ``…_scales``; the inverse of :meth:`to_blocks`.

        Args:
            blocks: uint8 [N, K/32, 16], or [E, N, K/32, 16] for a stack; byte j of a block holds element 2j (low nibble)
                and 2j + 1 (high nibble).
            scales: uint8 [N, K/32] or [E, N, K/32], 127 + the exponent of two.
            dtype: of the quantised weight, which the blocks do not record.

        Raises:
            TypeError, ValueError: a tensor has another dtype or shape; a scale is NaN or beyond float32.
        """
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        for name, tensor in (("blocks", blocks), ("scales", scales)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8:
                raise TypeError(f"{name} must be a uint8 Tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if blocks.dim() not in (3, 4) or blocks.shape[-1] != _BLOCK // 2 or not blocks.numel():
            raise ValueError(
                f"blocks must be a non-empty [N, K/{_BLOCK}, {_BLOCK // 2}] or [E, N, K/{_BLOCK}, {_BLOCK // 2}], got "
                f"{list(blocks.shape)}"
            )
        if scales.shape != blocks.shape[:-1]:
            raise ValueError(f"scales must be {list(blocks.shape[:-1])} for these blocks, got {list(scales.shape)}")
        *leading, count = scales.shape
        flat = (*leading[:-1], -1)
        packed, exponents = _swap_nibbles(blocks).reshape(flat), scales.detach().reshape(flat)
        return cls(packed, exponents, (*leading, count * _BLOCK), _BLOCK, dtype)

    def to_blocks(self) -> tuple[Tensor, Tensor]:
        """(blocks uint8 [N, K/32, 16], scales uint8 [N, K/32]) in gpt-oss's order, on this weight's device; a leading E."""
        shape, held = (*self.shape[:-1], self.in_features // _BLOCK), self.held()
        return _swap_nibbles(held["packed"]).view(*shape, _BLOCK // 2), held["exponents"].view(shape)

    def operand(self) -> Matrix:
        held = self.held()
        packed, exponents = held["packed"], held["exponents"]
        if packed.dtype is not torch.uint8 or exponents.dtype is not torch.uint8:
            self._refuse_cast(held)
        return Matrix(packed, (exponents,), self.block_size, self.format)

    def _row_scales(self, held: Mapping[str, Any], rows: Tensor) -> Tensor:
        return held["exponents"].view(self.out_features, -1).index_select(0, rows).view(-1)

    def _cut_scales(
        self, held: Mapping[str, Any], take: Callable[[Tensor], Tensor], first: int, dim: int
    ) -> list[Tensor | None]:
        return [take(held["exponents"])]

    def bound(self) -> float:
        return 6.0 * 2.0 ** (int(self.held()["exponents"].max()) - 127)

    @classmethod
    def _suffixes(cls) -> tuple[str, ...]:
        return "_blocks", "_scales"

    def _entries(self, base: str) -> dict[str, Tensor]:
        return {base + suffix: tensor for suffix, tensor in zip(self._suffixes(), self.to_blocks(), strict=True)}

    @classmethod
    def _from_entries(cls, state_dict: Mapping[str, Tensor], base: str, dtype: torch.dtype = torch.bfloat16) -> Self:
        check_format(state_dict, base, cls.format)
        keys = [base + suffix for suffix in cls._suffixes()]
        for key in keys:
            if key not in state_dict:
                raise ValueError(f"no MXFP4 weight under {base!r}: the state dict lacks {key!r}")
        try:
            return cls.from_blocks(state_dict[keys[0]], state_dict[keys[1]], dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{keys[0]!r} and {keys[1]!r}: {error}") from error


def _swap_nibbles(packed: Tensor) -> Tensor:
    """Swap the two nibbles of every byte."""
    return (packed << 4) | (packed >> 4)


torch.serialization.add_safe_globals([MXFP4Weight])
