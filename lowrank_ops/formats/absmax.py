"""AbsmaxWeight: formats whose scale follows from the largest magnitude in a block; bitsandbytes' own are among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from .. import reference
from ..files import load_json
from ..kernels.operands import Matrix
from .base import FLOAT_DTYPES, MARKS, QuantizedWeight, check_format
from .rounding import Curvature

_STORAGE_DTYPES = (torch.uint8, *FLOAT_DTYPES)
# As numbers, which torch.compile takes into its graph.
_CODE = tuple(reference.dynamic_code("cpu").tolist())


class AbsmaxWeight(QuantizedWeight):
    """w[n, k] = levels[nibble(f)] · absmax[f // block_size], f = n·K + k, bit-compatible with bitsandbytes.

    Blocks run over the row-major flattened weight. With double quantisation the scales are themselves 8-bit indices:
    ``scale[b] = code2[absmax[b]] · absmax2[b // 256] + offset``. The bytes equal those bitsandbytes 0.50.2 makes on a
    CPU, and ``state_dict`` uses its keys.

    Attributes:
        packed: uint8 [ceil(N·K / 2)], the even element in the high nibble.
        absmax: float32 [blocks], or uint8 [blocks] with double quantisation.
        absmax2, offset: float32 [ceil(blocks / 256)] and float32 [], or None.
        shape, dtype: (N, K), or (E, N, K) of a stack, whose buffers have a leading E; the dtype of the weight that was
            quantised.
        block_size: weights that share one scale.
        storage: the dtype as which bitsandbytes' entries store the bytes.
    """

    _STORED_ATTRIBUTES = ("block_size", "dtype", "storage")
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        offset: Tensor | None,
        shape: tuple[int, ...],
        block_size: int,
        dtype: torch.dtype,
        storage: torch.dtype = torch.uint8,
    ) -> None:
        buffers = {"packed": packed, "absmax": absmax, "absmax2": absmax2, "offset": offset}
        super().__init__(buffers, shape, block_size, dtype)
        self.storage = storage

    def _arguments_after_buffers(self, shape: Sequence[int]) -> tuple[Any, ...]:
        return *super()._arguments_after_buffers(shape), self.storage

    def _expected_buffers(self, buffers: Mapping[str, Tensor | None]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        numel = self.out_features * self.in_features
        blocks = -(-numel // self.block_size)
        double = buffers["absmax2"] is not None
        expected: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("packed", torch.uint8, (self.format.bytes_of(numel),)),
            ("absmax", torch.uint8 if double else torch.float32, (blocks,)),
        ]
        if double:
            expected.append(("absmax2", torch.float32, (-(-blocks // reference.ABSMAX_BLOCK),)))
            expected.append(("offset", torch.float32, ()))
        return expected

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        block_size: int = 64,
        double_quant: bool = True,
        *,
        second_moment: Tensor | Curvature | None = None,
        scales: str | None = None,
        order: str = "diagonal",
        damping: float = 0.1,
    ) -> Self:
        """nibble = the index of the level nearest to w / absmax(block); a tie takes the lower level.

        With ``second_moment`` or ``scales="search"`` the same format has other codes and scales: docs/quantization.md.

        Args:
            weight: W [N, K], float32, bfloat16 or float16; any strides, on the CPU or a GPU. A stack [E, N, K] is
                quantised expert by expert: no block straddles two experts, and K may be any number.
            block_size: one of 32, 64, 128, …, 4096.
            double_quant: also quantise the block scales to 8 bits (0.127 instead of 0.5 bits a weight at 64).
            second_moment: H = E[x xᵀ] of the layer's inputs, [K, K] float32 or float64 on the device of weight; a stack
                may have [E, K, K]. The codes are then chosen to make tr(E H Eᵀ) small, E = W − Ŵ: the mean square of
                the error of W x. Or a :class:`formats.Curvature`, for layers that share an input.
            scales: "absmax" takes the largest magnitude of a block; "search" the one with the least error, weighted by H_kk.
                Default: "search" with a second moment, else "absmax".
            order: "diagonal" feeds errors back by falling H_kk, "columns" in the order of the columns.
            damping: the part of the mean of H_kk that is added to H's diagonal; doubled where H is not positive definite
                with it. ``weight.rounding`` tells what was used.

        Raises:
            TypeError: weight or second_moment is not a tensor or has another dtype.
            ValueError: weight is not 2-D or 3-D, empty, on the meta device or not finite; block_size is not allowed;
                second_moment has another shape, is not finite, symmetric and positive semidefinite, or is zero.

        Numerics: absmax and the comparison in float32. On a CPU the bytes equal those of bitsandbytes 0.50.2 on a CPU.
        The factor of a second moment is computed in float64, all else in float32.
        """
        return cls._quantize(weight, block_size, double_quant, second_moment, scales, order, damping)

    @property
    def double_quant(self) -> bool:
        return self.absmax2 is not None

    def operand(self) -> Matrix:
        # Looking each up as an attribute of a module takes several times as long.
        held: Mapping[str, Any] = self._buffers if self.keeper is None else self.keeper.read()
        packed, absmax, absmax2, offset = held["packed"], held["absmax"], held["absmax2"], held["offset"]
        if absmax2 is None:
            if packed.dtype is not torch.uint8 or absmax.dtype is not torch.float32:
                self._refuse_cast(held)
            return Matrix(packed, (absmax,), self.block_size, self.format)
        whole = packed.dtype is torch.uint8 and absmax.dtype is torch.uint8
        if not whole or absmax2.dtype is not torch.float32 or offset.dtype is not torch.float32:
            self._refuse_cast(held)
        return Matrix(packed, (absmax, absmax2, offset), self.block_size, self.format)

    def _row_scales(self, held: Mapping[str, Any], rows: Tensor) -> Tensor:
        absmax, absmax2, offset = held["absmax"], held["absmax2"], held["offset"]
        count = self.in_features // self.block_size
        blocks = (rows.unsqueeze(-1) * count + torch.arange(count, device=rows.device)).view(-1)
        taken = absmax[blocks]
        if absmax2 is None:
            return taken
        groups = absmax2[blocks.div(reference.ABSMAX_BLOCK, rounding_mode="floor")]
        return torch.tensor(_CODE, dtype=torch.float32, device=taken.device)[taken.long()] * groups + offset

    def _cut_scales(
        self, held: Mapping[str, Any], take: Callable[[Tensor], Tensor], first: int, dim: int
    ) -> list[Tensor | None]:
        absmax, absmax2, offset = held["absmax"], held["absmax2"], held["offset"]
        if absmax2 is None:
            return [take(absmax), None, None]
        if dim or first % reference.ABSMAX_BLOCK:
            return [take(reference.absmax_dequantize(absmax, absmax2, offset)), None, None]
        part, group = take(absmax), first // reference.ABSMAX_BLOCK
        return [part, absmax2[group : group - (-len(part) // reference.ABSMAX_BLOCK)].clone(), offset.clone()]

    @classmethod
    def join(cls, weights: Sequence[Self]) -> Self:
        """The rows of several weights [N_i, K] one after the other, with the same numbers; the inverse of :meth:`cut`.

        8-bit scales become float32 unless the weights share an offset and all but the last hold whole groups of 256 blocks.

        Raises:
            ValueError: K or the block sizes differ, or a weight but the last ends within a block.
        """
        first, group = weights[0], reference.ABSMAX_BLOCK
        K, size = first.in_features, first.block_size
        if any(w.in_features != K or w.block_size != size or w.experts for w in weights):
            raise ValueError("weights to join must have the same K and block_size and be no stacks")
        if any(w.out_features * K % size for w in weights[:-1]):
            raise ValueError(
                f"weights to join must hold whole blocks of {size}, got {[list(w.shape) for w in weights]}"
            )
        held = [w.held() for w in weights]
        packed = torch.cat([h["packed"] for h in held])
        aligned = all(w.out_features * K // size % group == 0 for w in weights[:-1])
        offsets = [h["offset"] for h in held]
        absmax2 = offset = None
        if aligned and all(o is not None and torch.equal(o, offsets[0]) for o in offsets):
            absmax, absmax2, offset = (
                torch.cat([h["absmax"] for h in held]),
                torch.cat([h["absmax2"] for h in held]),
                offsets[0],
            )
        else:
            absmax = torch.cat([w._scales() for w in weights])
        shape = (sum(w.out_features for w in weights), K)
        return cls(packed, absmax, absmax2, offset, shape, size, first.dtype, first.storage)

    def _scales(self) -> Tensor:
        """The scale of every block, float32."""
        held = self.held()
        if held["absmax2"] is None:
            return held["absmax"]
        return reference.absmax_dequantize(held["absmax"], held["absmax2"], held["offset"])

    def bound(self) -> float:
        held = self.held()
        scales, offset = held["absmax"] if held["absmax2"] is None else held["absmax2"], held["offset"]
        bound = float(scales.abs().max())
        return bound if offset is None else bound + float(offset.abs().max())

    # ---- bitsandbytes' entries ----

    @classmethod
    def _suffixes(cls) -> tuple[str, ...]:
        return MARKS[cls.format.name], "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"

    def to_bitsandbytes(self, prefix: str = "") -> dict[str, Tensor]:
        """The state-dict entries bitsandbytes has for this weight; the inverse of :meth:`from_bitsandbytes`.

        Args:
            prefix: the part of the key before ``weight``, such as ``"model.layers.0.q_proj."``.

        Returns:
            ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``)
            and, with double quantisation, ``weight.nested_absmax`` and ``weight.nested_quant_map``; all on this weight's
            device. A stack has the same entries: its tensors are those of its experts one after the other, ``shape`` is
            [E, N, K], and ``nested_offset`` lists E numbers. With float32 scales these are the entries that
            ``bitsandbytes.nn.parametrize`` makes for a 3-D parameter whose N·K is a multiple of the block size.
        """
        return self._entries(prefix + "weight")

    def _entries(self, base: str) -> dict[str, Tensor]:
        device, held = self.device, self.held()
        absmax, absmax2, offset = held["absmax"], held["absmax2"], held["offset"]
        state: dict[str, Any] = {
            "quant_type": self.format.name,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        entries = {base: held["packed"].view(-1).view(self.storage).unsqueeze(1), f"{base}.absmax": absmax.view(-1)}
        entries[f"{base}.quant_map"] = torch.tensor(self.format.levels, dtype=torch.float32, device=device)
        if absmax2 is not None and offset is not None:
            entries[f"{base}.nested_absmax"] = absmax2.view(-1)
            entries[f"{base}.nested_quant_map"] = reference.dynamic_code(device)
            state |= {
                "nested_blocksize": reference.ABSMAX_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": (
                    offset.new_full(offset.shape, torch.nan, device="cpu") if offset.is_meta else offset
                ).tolist(),
            }
        if self.experts and self.out_features * self.in_features % self.block_size:
            # bitsandbytes' blocks would run across experts here; it refuses a key that it does not know.
            state["expert_blocks"] = absmax.shape[-1]
        packed_state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=device)
        entries[base + MARKS[self.format.name]] = packed_state
        return entries

    @classmethod
    def from_bitsandbytes(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> Self:
        """Make the weight from the entries of a bitsandbytes checkpoint under ``prefix``; tensors are not copied.

        Args:
            state_dict: of a model, a layer or a safetensors file.
            prefix: the part of the key before ``weight``, such as ``"model.layers.0.q_proj."``.

        Raises:
            ValueError: an entry is missing or does not fit, the weight has another format, or a table is not the
            standard one.
        """
        return cls._from_entries(state_dict, prefix + "weight")

    @classmethod
    def _from_entries(cls, state_dict: Mapping[str, Tensor], base: str, dtype: torch.dtype = torch.bfloat16) -> Self:
        check_format(state_dict, base, cls.format)
        name, mark = cls.format.name, MARKS[cls.format.name]

        def entry(suffix: str) -> Tensor:
            key = base + suffix
            if key not in state_dict:
                raise ValueError(f"no {cls.name()} weight under {base!r}: the state dict lacks {key!r}")
            value = state_dict[key]
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} must be a Tensor, got {type(value).__name__}")
            return value.detach()

        packed, absmax, state_tensor = entry(""), entry(".absmax"), entry(mark)
        try:
            state = load_json(bytes(state_tensor.to("cpu", torch.uint8).tolist()))
            shape, block_size, kind = tuple(state["shape"]), state["blocksize"], state["quant_type"]
            dtype = getattr(torch, state["dtype"])
            if len(shape) not in (2, 3) or not all(isinstance(size, int) for size in shape):
                raise ValueError(f"shape {list(shape)} is not two or three integers")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{base + mark!r} is not a bitsandbytes quant_state: {error}") from error
        if kind != name:
            raise ValueError(f"{base!r} has quant_type {kind!r}, where {base + mark!r} needs {name!r}")
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"{base!r} was quantised from {dtype}; only float32, bfloat16 and float16 are supported")
        cls._check_block_size(block_size)
        if min(shape) < 1:
            raise ValueError(f"{base!r} has shape {list(shape)}; it must be a non-empty [N, K] or [E, N, K]")
        levels = torch.tensor(cls.format.levels, dtype=torch.float32, device="cpu")
        cls._check_table(entry(".quant_map"), levels, f"{base}.quant_map")
        absmax2 = offset = None
        if "nested_offset" in state:
            if state.get("nested_blocksize") != reference.ABSMAX_BLOCK or state.get("nested_dtype") != "float32":
                raise ValueError(
                    f"{base!r} has nested_blocksize {state.get('nested_blocksize')} and nested_dtype "
                    f"{state.get('nested_dtype')!r}; only {reference.ABSMAX_BLOCK} and 'float32' are supported"
                )
            cls._check_table(entry(".nested_quant_map"), reference.dynamic_code("cpu"), f"{base}.nested_quant_map")
            absmax2 = entry(".nested_absmax")
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
        if packed.dtype not in _STORAGE_DTYPES:
            raise ValueError(f"{base!r} must be stored as uint8 or a float dtype, got {packed.dtype}")
        flat = packed.contiguous().view(-1).view(torch.uint8)
        if len(shape) == 2:
            return cls(flat, absmax, absmax2, offset, shape, block_size, dtype, packed.dtype)
        experts, numel = shape[0], shape[1] * shape[2]
        blocks = -(-numel // block_size)
        if numel % block_size and state.get("expert_blocks") != blocks:
            raise ValueError(
                f"{base!r} is a stack {list(shape)} whose blocks of {block_size} run across experts; it needs blocks "
                "that start anew with each expert"
            )
        if absmax2 is not None and offset is not None and not offset.dim():
            # bitsandbytes has one offset for all experts. Where its second-level blocks run across them, the scales
            # stay float32, so that the weights are the same.
            if blocks % reference.ABSMAX_BLOCK:
                absmax, absmax2, offset = reference.absmax_dequantize(absmax, absmax2, offset), None, None
            else:
                offset = offset.expand(experts)

        def part(tensor: Tensor) -> Tensor:
            return tensor.view(experts, -1) if tensor.numel() % experts == 0 else tensor

        flat, absmax, absmax2 = part(flat), part(absmax), None if absmax2 is None else part(absmax2)
        return cls(flat, absmax, absmax2, offset, shape, block_size, dtype, packed.dtype)

    @classmethod
    def _check_table(cls, table: Tensor, expected: Tensor, key: str) -> None:
        if not table.is_meta and not torch.equal(table.to("cpu", torch.float32), expected):
            raise ValueError(f"{key!r} is not the standard table of {cls.name()}, so its weights mean something else")
