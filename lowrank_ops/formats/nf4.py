"""NF4Weight: a frozen 4-bit weight [N, K], bit-compatible with bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference  # noqa: F401  (ops registers torch.ops.lowrank_ops)
from ..kernels.operands import NF4, Matrix

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STORAGE_DTYPES = (torch.uint8, *FLOAT_DTYPES)
_STATE = "quant_state.bitsandbytes__nf4"


class NF4Weight(nn.Module):
    """w[n, k] = code[nibble(f)] · scale[f // block_size], f = n·K + k: 4.127 bits a weight with double quantisation.

    Blocks run over the row-major flattened weight. With double quantisation the scales are 8-bit indices themselves:
    ``scale[b] = code2[absmax[b]] · absmax2[b // 256] + offset``. The bytes are those that bitsandbytes 0.50.2 makes on a
    CPU, and they are never changed by anything that computes with them.

    It is a module with buffers only, so it moves with ``.to()``, saves, loads, copies and compiles with the layer that
    holds it. Its ``state_dict`` has bitsandbytes' keys. A change of dtype (``.half()``, ``.to(torch.bfloat16)``) does
    not touch it: its tensors are a format, not numbers to compute with.

    Attributes:
        packed: uint8 [ceil(N·K / 2)], the even element in the high nibble.
        absmax: float32 [blocks], or uint8 [blocks] with double quantisation.
        absmax2, offset: float32 [ceil(blocks / 256)] and float32 [], or None.
        shape, dtype: (N, K) and the dtype of the weight that was quantised.
        block_size: weights that share one scale.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        offset: Tensor | None,
        shape: tuple[int, int],
        block_size: int,
        dtype: torch.dtype,
        storage: torch.dtype = torch.uint8,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = (int(size) for size in shape)
        self.block_size, self.dtype, self.storage = int(block_size), dtype, storage
        self._check(packed, absmax, absmax2, offset)
        # The kernels read these by their addresses.
        packed, absmax = packed.contiguous(), absmax.contiguous()
        absmax2 = None if absmax2 is None else absmax2.contiguous()
        for name, tensor in (("packed", packed), ("absmax", absmax), ("absmax2", absmax2), ("offset", offset)):
            self.register_buffer(name, tensor)

    def _check(self, packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None) -> None:
        blocks = -(-self.numel() // self.block_size)
        expected: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
            ("packed", packed, torch.uint8, ((self.numel() + 1) // 2,)),
            ("absmax", absmax, torch.float32 if absmax2 is None else torch.uint8, (blocks,)),
        ]
        if absmax2 is not None:
            expected.append(("absmax2", absmax2, torch.float32, (-(-blocks // reference.ABSMAX_BLOCK),)))
            expected.append(("offset", offset, torch.float32, ()))
        for name, tensor, dtype, shape in expected:
            got = "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} of an NF4 weight {self.out_features} x {self.in_features} with block_size "
                    f"{self.block_size} must be {dtype} {list(shape)}, got {got}"
                )
            if dtype == torch.float32 and not tensor.is_meta and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} of an NF4 weight must be finite, got NaN or infinity in it")

    @classmethod
    def quantize(cls, weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
        """nibble = the NF4 level nearest to w / absmax(block), a tie taking the lower one.

        Args:
            weight: W [N, K], float32, bfloat16 or float16; any strides, on the CPU or a GPU.
            block_size: one of 32, 64, 128, …, 4096.
            double_quant: quantise the block scales to 8 bits too (0.127 instead of 0.5 bits a weight at 64).

        Raises:
            TypeError: weight is no tensor or of another dtype.
            ValueError: weight is not 2-D, empty, on the meta device or not finite; block_size is not allowed.

        Numerics: absmax and the comparison in float32. On a CPU the bytes equal those of bitsandbytes 0.50.2 on a CPU.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a Tensor [N, K], got {type(weight).__name__}")
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"weight must be a non-empty [N, K], got {list(weight.shape)}")
        if weight.layout != torch.strided:
            raise ValueError(f"weight must be a dense tensor, got layout {weight.layout}")
        if weight.device.type == "meta":
            raise ValueError("weight is on the meta device and holds no numbers; load or materialise it first")
        _check_block_size(block_size)
        packed, absmax = torch.ops.lowrank_ops.nf4_quantize.default(weight.detach(), block_size)
        # On a CPU the largest magnitude of a block is NaN or infinite where one of its weights is.
        if not all(torch.isfinite(t) for t in torch.aminmax(absmax if weight.device.type == "cpu" else weight)):
            raise ValueError("weight must be finite, got NaN or infinity in it")
        absmax2 = offset = None
        if double_quant:
            offset = absmax.mean()
            absmax, absmax2 = torch.ops.lowrank_ops.absmax_quantize.default(absmax, offset)
        return cls(packed, absmax, absmax2, offset, (weight.shape[0], weight.shape[1]), block_size, weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """w[n, k] = code[nibble] · scale, [N, K].

        Args:
            dtype: float32, bfloat16 or float16; default the dtype of the weight that was quantised.

        Numerics: exact: the product in float32, rounded once to ``dtype``.
        """
        dtype = dtype or self.dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        out: Tensor = torch.ops.lowrank_ops.nf4_dequantize.default(
            self.packed, self.absmax, self.absmax2, self.offset, self.out_features, self.in_features, self.block_size,
            dtype,
        )  # fmt: skip
        return out

    def operand(self) -> Matrix:
        """As :mod:`lowrank_ops.ops` takes a matrix; the tensors are the buffers."""
        held: dict[str, Any] = self._buffers  # a module's own look-up of each takes several times as long
        absmax, absmax2, offset = held["absmax"], held["absmax2"], held["offset"]
        return Matrix(held["packed"], (absmax,) if absmax2 is None else (absmax, absmax2, offset), self.block_size, NF4)

    # ---- what a weight is asked for ----

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def ndim(self) -> int:
        return 2

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        return self.absmax2 is not None

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        scales = "8-bit scales" if self.double_quant else "float32 scales"
        return f"{self.out_features} x {self.in_features}, block_size={self.block_size}, {scales}, dtype={self.dtype}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Fused paths of torch that read `layer.weight` themselves (TransformerEncoderLayer in eval) look for this method
        # and then take their ordinary path, which calls the layer.
        raise TypeError(
            f"{getattr(func, '__name__', func)} cannot take an NF4Weight, whose numbers are packed; call the layer that "
            "holds it, lowrank_ops.functional.adapted_linear(x, weight), or weight.dequantize()"
        )

    def forward(self, *args: Any) -> Any:
        raise TypeError("an NF4Weight is no layer; use lowrank_ops.Linear or lowrank_ops.functional.adapted_linear")

    # ---- moving, copying, saving ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Weight:
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return NF4Weight, (
            self.packed, self.absmax, self.absmax2, self.offset, tuple(self.shape), self.block_size, self.dtype,
            self.storage,
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> NF4Weight:
        copy = NF4Weight(
            self.packed.clone(),
            self.absmax.clone(),
            None if self.absmax2 is None else self.absmax2.clone(),
            None if self.offset is None else self.offset.clone(),
            (self.out_features, self.in_features),
            self.block_size,
            self.dtype,
            self.storage,
        )
        memo[id(self)] = copy
        return copy

    def to_bitsandbytes(self, prefix: str = "") -> dict[str, Tensor]:
        """The state-dict entries that bitsandbytes has for this weight: the inverse of :meth:`from_bitsandbytes`.

        Args:
            prefix: what stands before ``weight``, such as ``"model.layers.0.q_proj."``.

        Returns:
            ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4`` and, with
            double quantisation, ``weight.nested_absmax`` and ``weight.nested_quant_map``; all on this weight's device.
        """
        return self._entries(prefix + "weight")

    def _entries(self, base: str) -> dict[str, Tensor]:
        device = self.device
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        entries = {base: self.packed.view(self.storage).unsqueeze(1), f"{base}.absmax": self.absmax}
        entries[f"{base}.quant_map"] = reference.nf4_code(device)
        if self.absmax2 is not None and self.offset is not None:
            entries[f"{base}.nested_absmax"] = self.absmax2
            entries[f"{base}.nested_quant_map"] = reference.dynamic_code(device)
            state |= {
                "nested_blocksize": reference.ABSMAX_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float("nan") if self.offset.is_meta else self.offset.item(),
            }
        packed_state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=device)
        entries[f"{base}.{_STATE}"] = packed_state
        return entries

    @classmethod
    def from_bitsandbytes(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> NF4Weight:
        """The weight whose entries a bitsandbytes checkpoint has under ``prefix``; tensors are taken as they are.

        Args:
            state_dict: of a model, a layer or a safetensors file.
            prefix: what stands before ``weight``, such as ``"model.layers.0.q_proj."``.

        Raises:
            ValueError: an entry is missing or does not fit; the weight is FP4, not NF4; tables are not the standard ones.
        """
        return cls._from_entries(state_dict, prefix + "weight")

    @classmethod
    def _from_entries(cls, state_dict: Mapping[str, Tensor], base: str) -> NF4Weight:
        def entry(name: str) -> Tensor:
            key = f"{base}.{name}" if name else base
            if key not in state_dict:
                raise ValueError(f"no NF4 weight under {base!r}: the state dict lacks {key!r}")
            value = state_dict[key]
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} must be a Tensor, got {type(value).__name__}")
            return value.detach()

        if f"{base}.quant_state.bitsandbytes__fp4" in state_dict:
            raise ValueError(f"{base!r} is FP4; only NF4 weights are supported")
        packed, absmax, state_tensor = entry(""), entry("absmax"), entry(_STATE)
        try:
            state = json.loads(bytes(state_tensor.to("cpu", torch.uint8).tolist()))
            (N, K), block_size, kind = state["shape"], state["blocksize"], state["quant_type"]
            dtype = getattr(torch, state["dtype"])
            if not isinstance(N, int) or not isinstance(K, int):
                raise ValueError(f"shape {[N, K]} is not two integers")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{base}.{_STATE}' is no bitsandbytes quant_state: {error}") from error
        if kind != "nf4":
            raise ValueError(f"{base!r} has quant_type {kind!r}; only 'nf4' is supported")
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"{base!r} was quantised from {dtype}; only float32, bfloat16 and float16 are supported")
        _check_block_size(block_size)
        if N < 1 or K < 1:
            raise ValueError(f"{base!r} has shape {[N, K]}; it must be a non-empty [N, K]")
        _check_table(entry("quant_map"), reference.nf4_code(), f"{base}.quant_map")
        absmax2 = offset = None
        if "nested_offset" in state:
            if state.get("nested_blocksize") != reference.ABSMAX_BLOCK or state.get("nested_dtype") != "float32":
                raise ValueError(
                    f"{base!r} has nested_blocksize {state.get('nested_blocksize')} and nested_dtype "
                    f"{state.get('nested_dtype')!r}; only {reference.ABSMAX_BLOCK} and 'float32' are supported"
                )
            _check_table(entry("nested_quant_map"), reference.dynamic_code(), f"{base}.nested_quant_map")
            absmax2 = entry("nested_absmax")
            offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=packed.device)
        if packed.dtype not in _STORAGE_DTYPES:
            raise ValueError(f"{base!r} must be stored as uint8 or a float dtype, got {packed.dtype}")
        flat = packed.contiguous().view(-1).view(torch.uint8)
        return cls(flat, absmax, absmax2, offset, (N, K), block_size, dtype, packed.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update(self._entries(prefix[:-1] or "weight"))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Inside a layer, torch shows a child only the keys that start with "weight.", so Linear loads "weight" for it.
        if not prefix:
            self._load_entries(state_dict, "weight", local_metadata, missing_keys, unexpected_keys, error_msgs)

    def _load_entries(
        self,
        state_dict: Mapping[str, Any],
        base: str,
        local_metadata: Any,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = set(self._entries(base)) | {f"{base}.nested_absmax", f"{base}.nested_quant_map"}
        unexpected_keys += [key for key in state_dict if key.startswith(base + ".") and key not in own]
        if base not in state_dict:
            missing_keys.append(base)
            return
        try:
            loaded = NF4Weight._from_entries(state_dict, base)
            if loaded.shape != self.shape:
                raise ValueError(f"{base!r} is {list(loaded.shape)} in the state dict and {list(self.shape)} here")
        except ValueError as error:
            error_msgs.append(str(error))
            return
        device = None if self.packed.is_meta else self.device
        assign = bool(local_metadata.get("assign_to_params_buffers", False)) or device is None
        for name, new in loaded._buffers.items():
            old = self._buffers[name]
            if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype or assign:
                self._buffers[name] = None if new is None else new.to(device, copy=not assign)
            else:
                old.copy_(new)
        self.block_size, self.dtype, self.storage = loaded.block_size, loaded.dtype, loaded.storage


def _check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int) or block_size not in reference.BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, reference.BLOCK_SIZES))}, got {block_size!r}")


def _check_table(table: Tensor, expected: Tensor, key: str) -> None:
    if not table.is_meta and not torch.equal(table.to("cpu", torch.float32), expected):
        raise ValueError(f"{key!r} is not the standard table of NF4, so its weights mean something else")


# The second path is in files of before this folder.
torch.serialization.add_safe_globals([NF4Weight, (NF4Weight, "lowrank_ops.nf4.NF4Weight")])
