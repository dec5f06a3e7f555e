"""QuantizedWeight: the base class of all frozen weights in 4 or 8 bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..kernels.operands import Format, Matrix, of_expert
from ..ops import _cpu  # and this registers torch.ops.lowrank_ops
from .keepers import Keeper, Shards
from .rounding import Curvature, Rounding, check_moment, check_options, curvatures, rounded, with_second_level

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The ending of the state-dict key that tells a weight's format.
MARKS = {
    "nf4": ".quant_state.bitsandbytes__nf4",
    "fp4": ".quant_state.bitsandbytes__fp4",
    "mxfp4": "_blocks",
    "int8": ".quant_state.lowrank_ops__int8",
}


# Functions of integrations, called when an attribute of this name is set on a weight.
ON_ATTRIBUTE: dict[str, Callable[[Any, Any], None]] = {}


class _AnyName:
    """Answers to every public name with itself."""

    def __getattr__(self, name: str) -> _AnyName:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class QuantizedWeight(nn.Module, ABC):
    """w[n, k] = levels[code(f)] · scale[f // block_size], f = n·K + k: a frozen weight [N, K] in 4 or 8 bits.

    A stack [E, N, K] holds one such weight for each expert: every buffer has a leading E, and expert e has the bytes
    that it has alone. ``weight[e]`` is expert e as a weight [N, K] over the same memory.

    It is a module with buffers only, so it moves with ``.to()``, saves, loads, copies and compiles with the layer that
    holds it. A change of dtype (``.half()``, ``.to(torch.bfloat16)``) does not touch it, because its tensors encode a
    format and no computation changes them.

    Attributes:
        format: the levels and the kind of scale.
        packed: the codes: uint8 [ceil(N·K / 2)], the even element in the high nibble, or of 8 bits [N·K]. The other
            buffers are the scales.
        shape, dtype: (N, K), or (E, N, K) of a stack, and the dtype of the weight that was quantised.
        block_size: weights that share one scale.
        experts: E of a stack, 0 for a weight [N, K].
    """

    format: ClassVar[Format]
    # Attributes that the entries of a state dict hold besides the buffers.
    _STORED_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()
    # The buffer with a number for each block.
    _BLOCK_SCALES: ClassVar[str] = "absmax"
    layer_name = ""  # set by adapt, for messages
    # How quantize(second_moment=) rounded it; a tuple for the experts of a stack. Files do not hold it.
    rounding: Rounding | tuple[Rounding, ...] | None = None
    keeper: Keeper | None = None  # set where the buffers do not hold the bytes
    # What `_fqn_modifiers` names in place of entries that are no attribute.
    _entry_names = _AnyName()
    packed: Tensor

    def __init__(
        self, buffers: Mapping[str, Tensor | None], shape: tuple[int, ...], block_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        *leading, self.out_features, self.in_features = (int(size) for size in shape)
        self.experts = leading[0] if leading else 0
        self.block_size, self.dtype = int(block_size), dtype
        self._check(buffers)
        for name, tensor in buffers.items():  # kernels read them by address
            self.register_buffer(name, None if tensor is None else tensor.contiguous())

    def _check(self, buffers: Mapping[str, Tensor | None]) -> None:
        for name, dtype, shape in self._expected_buffers(buffers):
            tensor, shape = buffers[name], (*self.shape[:-2], *shape)
            got = "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} of an {self.name()} weight {' x '.join(map(str, self.shape))} with block_size "
                    f"{self.block_size} must be {dtype} {list(shape)}, got {got}"
                )
            if dtype == torch.float32 and not tensor.is_meta and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} of an {self.name()} weight must be finite, got NaN or infinity in it")

    # ---- what a format defines ----

    @abstractmethod
    def _expected_buffers(self, buffers: Mapping[str, Tensor | None]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every required buffer, for one expert of a stack."""

    @classmethod
    @abstractmethod
    def _suffixes(cls) -> tuple[str, ...]:
        """The endings that keys of a state dict add to a weight's name."""

    @abstractmethod
    def _entries(self, base: str) -> dict[str, Tensor]:
        """The entries of a state dict for a weight named ``base``."""

    @classmethod
    @abstractmethod
    def _from_entries(cls, state_dict: Mapping[str, Tensor], base: str, dtype: torch.dtype = torch.bfloat16) -> Self:
        """The inverse of :meth:`_entries`; dtype: of the quantised weight, for entries that do not say it."""

    @classmethod
    @abstractmethod
    def quantize(cls, weight: Tensor) -> Self:
        """Quantise W [N, K], or a stack [E, N, K], with the format's usual options."""

    @abstractmethod
    def operand(self) -> Matrix:
        """The weight as :mod:`lowrank_ops.ops` takes a matrix; its tensors come from :meth:`held`."""

    def _refuse_cast(self, held: Mapping[str, Tensor | None]) -> None:
        """Raise for the buffer that has another dtype than the kernels read."""
        for name, dtype, _ in self._expected_buffers(held):
            tensor = held[name]
            if tensor is not None and tensor.dtype != dtype:
                raise TypeError(
                    f"{name} of an {self.name()} weight must be {dtype}, got {tensor.dtype}: its buffers were cast "
                    "in place, as FSDP's MixedPrecision(buffer_dtype=...) does; leave it out, or load the weight again"
                    f"{self._place()}"
                )

    @abstractmethod
    def bound(self) -> float:
        """An upper bound of |w|, tight to a small factor."""

    @property
    def double_quant(self) -> bool:
        """Tell whether the scales are themselves 8-bit indices."""
        return False

    # ---- encoding and decoding ----

    @classmethod
    def name(cls) -> str:
        """The format's name in messages, such as "NF4"."""
        return cls.format.name.upper()

    @classmethod
    def check_dense(cls, weight: Tensor) -> None:
        """Raise what :meth:`quantize` raises for a W [N, K] or a stack [E, N, K] of finite numbers."""
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a Tensor [N, K] or [E, N, K], got {type(weight).__name__}")
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
        if weight.dim() not in (2, 3) or not weight.numel():
            raise ValueError(f"weight must be a non-empty [N, K] or [E, N, K], got {list(weight.shape)}")
        if weight.layout != torch.strided:
            raise ValueError(f"weight must be a dense tensor, got layout {weight.layout}")
        if weight.device.type == "meta":
            raise ValueError("weight is on the meta device and holds no numbers; load or materialise it first")

    @classmethod
    def _encode(cls, weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """(packed, scales) of W [N, K], each weight rounded to nearest."""
        op = getattr(torch.ops.lowrank_ops, f"{cls.format.name}_quantize").default
        packed, scales = op(weight.detach(), block_size)
        # On a CPU the scale of a block is NaN or infinite if one of its weights is, so the scales suffice.
        seen = scales if weight.device.type == "cpu" and not cls.format.exponents else weight
        if not all(torch.isfinite(t) for t in torch.aminmax(seen)):
            raise ValueError("weight must be finite, got NaN or infinity in it")
        return packed, scales

    @classmethod
    def _quantize(
        cls,
        weight: Tensor,
        block_size: int,
        double_quant: bool,
        second_moment: Tensor | Curvature | None,
        scales: str | None,
        order: str,
        damping: float,
    ) -> Self:
        """What :meth:`quantize` returns; a stack is quantised expert by expert."""
        cls.check_dense(weight)
        cls._check_block_size(block_size)
        check_options(scales, order, damping)
        check_moment(second_moment, weight)
        search = scales == "search" or (scales is None and second_moment is not None)
        kind: Any = cls
        made: list[Self] = []
        matrices = weight if weight.dim() == 3 else weight.unsqueeze(0)
        for w, curvature in zip(matrices, curvatures(second_moment, weight, order, damping), strict=True):
            report = None
            if search or curvature is not None:
                (packed, scales_of_blocks, *_), report = rounded(
                    w, cls.format, block_size, double_quant, curvature, search
                )
            else:
                packed, absmax = cls._encode(w, block_size)
                scales_of_blocks = with_second_level(cls.format, absmax, double_quant)
            held = scales_of_blocks if cls.format.exponents else (*scales_of_blocks, None, None)[:3]
            made.append(kind(packed, *held, (w.shape[0], w.shape[1]), block_size, w.dtype))
            made[-1].rounding = report
        if weight.dim() == 2:
            return made[0]
        stack = cls.stack(made)
        reports = [m.rounding for m in made if isinstance(m.rounding, Rounding)]
        stack.rounding = tuple(reports) or None
        return stack

    @classmethod
    def _check_block_size(cls, block_size: int) -> None:
        allowed = cls.format.block_sizes
        if not isinstance(block_size, int) or block_size not in allowed:
            raise ValueError(f"block_size must be one of {', '.join(map(str, allowed))}, got {block_size!r}")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """w[n, k] = levels[code] · scale, [N, K] or [E, N, K].

        Args:
            dtype: float32, bfloat16 or float16; default the dtype of the weight that was quantised.

        Numerics: exact: the product in float32, rounded once to ``dtype``.
        """
        dtype = dtype or self.dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if not self.experts:
            return self._decode(self.operand(), self.out_features, dtype)
        stack = torch.empty(self.shape, dtype=dtype, device=self.device)
        for expert, out in enumerate(stack):
            out.copy_(self._decode(of_expert(self.operand(), expert), self.out_features, dtype))
        return stack

    def _decode(self, matrix: Matrix, rows: int, dtype: torch.dtype) -> Tensor:
        op = getattr(torch.ops.lowrank_ops, f"{self.format.name}_dequantize").default
        absmax, absmax2, offset = (*matrix.scales, None, None)[:3]
        out: Tensor = op(matrix.data, absmax, absmax2, offset, rows, self.in_features, self.block_size, dtype)
        return out

    def dequantize_rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``dequantize(dtype)[index]``, to the bit, for which only these rows are decoded.

        Args:
            index: int64 or int32, of any shape, on the device of the weight.
            dtype: as in :meth:`dequantize`.

        Returns:
            [*index.shape, K].

        Raises:
            TypeError: index is not a dense Tensor of int64 or int32.
            ValueError: as :meth:`check_rows`.
            IndexError: on a CPU, an index is not within 0 and N - 1.
        """
        self.check_rows()
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            got = getattr(index, "dtype", type(index).__name__)
            raise TypeError(f"index must be a Tensor of int64 or int32, got {got}")
        if index.layout is not torch.strided:
            raise TypeError(f"index must be a dense Tensor, got layout {index.layout}")
        dtype = dtype or self.dtype
        held, flat = self.held(), index.reshape(-1)
        if not len(flat):
            return torch.empty(*index.shape, self.in_features, dtype=dtype, device=self.device)
        try:
            packed = self.operand().data.view(self.out_features, -1).index_select(0, flat)
        except IndexError as error:
            rows = f"from 0 to {self.out_features - 1}"
            raise IndexError(f"index must be {rows}, got {flat.min()} to {flat.max()}") from error
        matrix = Matrix(packed.view(-1), (self._row_scales(held, flat),), self.block_size, self.format)
        return self._decode(matrix, len(flat), dtype).view(*index.shape, self.in_features)

    def check_rows(self) -> None:
        """Raise ValueError if a row does not consist of whole blocks, or the weight is a stack."""
        if self.experts or self.in_features % self.block_size:
            raise ValueError(
                f"a row of a quantised embedding must be whole blocks of {self.block_size} weights, and the weight is "
                f"{list(self.shape)}; keep it dense, or quantise with a block_size that divides {self.in_features}"
            )

    @abstractmethod
    def _row_scales(self, held: Mapping[str, Any], rows: Tensor) -> Tensor:
        """The scales of the blocks in some rows, as the format has them without double quantisation."""

    # ---- what a weight can be asked ----

    @property
    def shape(self) -> torch.Size:
        leading = (self.experts,) if self.experts else ()
        return torch.Size((*leading, self.out_features, self.in_features))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def ndim(self) -> int:
        return 3 if self.experts else 2

    def dim(self) -> int:
        return self.ndim

    @property
    def device(self) -> torch.device:
        return self.packed.device if self.keeper is None else self.keeper.device

    def held(self) -> Mapping[str, Any]:
        """The buffers by name; brought here if their bytes are kept elsewhere."""
        return self._buffers if self.keeper is None else self.keeper.read()

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and scales."""
        return sum(tensor.nbytes for tensor in (*self.buffers(), *self.parameters()))

    def extra_repr(self) -> str:
        scales = "8-bit" if self.double_quant else "power-of-two" if self.format.exponents else "float32"
        return f"{' x '.join(map(str, self.shape))}, block_size={self.block_size}, {scales} scales, dtype={self.dtype}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Fused paths of torch that read `layer.weight` themselves (TransformerEncoderLayer in eval) look for this
        # method; if it is there they take their ordinary path, which calls the layer.
        weight = next((a for a in (*args, *(kwargs or {}).values()) if isinstance(a, QuantizedWeight)), None)
        raise TypeError(
            f"{getattr(func, '__name__', func)} cannot take an {cls.__name__}, whose numbers are packed; call the layer "
            "that holds it, lowrank_ops.functional.adapted_linear(x, weight), or weight.dequantize()"
            f"{'' if weight is None else weight._place_and_remedy()}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if (react := ON_ATTRIBUTE.get(name)) is not None:
            react(self, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not hasattr(Tensor, name):
                raise
        raise AttributeError(
            f"{type(self).__name__} has no {name!r}: its numbers are packed; call the layer that holds it, or "
            f"weight.dequantize(){self._place_and_remedy()}"
        )

    def _place(self) -> str:
        return f"; it is the weight of layer {self.layer_name!r}" if self.layer_name else ""

    def _place_and_remedy(self) -> str:
        if not self.layer_name:
            return ""
        return (
            f"{self._place()}, which the model reads by itself: leave this layer out of the "
            "targets of lowrank_ops.adapt"
        )

    def forward(self, *args: Any) -> Any:
        raise TypeError(
            f"an {type(self).__name__} is not a layer; use lowrank_ops.Linear or lowrank_ops.functional.adapted_linear"
        )

    # ---- stacks ----

    @classmethod
    def stack(cls, weights: Sequence[Self]) -> Self:
        """stack[e] = weights[e]: the stack [E, N, K] of weights [N, K]; their bytes are copied.

        Args:
            weights: at least one; all of this class and alike in shape, block_size, dtype and kind of scales.

        Raises:
            TypeError, ValueError: a weight is of another class or shape, or differs in one of these.
        """
        if not weights:
            raise ValueError("weights must hold at least one weight, got none")
        for expert, weight in enumerate(weights):
            if type(weight) is not cls:
                raise TypeError(f"weights[{expert}] must be an {cls.__name__}, got {type(weight).__name__}")
            if weight.experts:
                raise ValueError(f"weights[{expert}] must be [N, K], got {list(weight.shape)}")
            if (got := weight._likeness()) != (need := weights[0]._likeness()):
                raise ValueError(f"weights[{expert}] is {got}, but weights[0] is {need}; a stack needs weights alike")
        columns = zip(*(weight.held().values() for weight in weights), strict=True)
        buffers = [None if tensors[0] is None else _cpu.stack(tensors) for tensors in columns]
        return weights[0]._with(buffers, (len(weights), *weights[0].shape))

    def _likeness(self) -> str:
        """What weights of one stack have in common."""
        return f"{self.extra_repr()}, on {self.device}"

    def _with(self, buffers: Iterable[Tensor | None], shape: Sequence[int]) -> Self:
        """The same kind of weight with other buffers and another shape."""
        kind: Any = type(self)
        made: Self = kind(*buffers, *self._arguments_after_buffers(shape))
        return made

    def __getitem__(self, expert: int) -> Self:
        if not self.experts:
            raise TypeError(f"only a stack [E, N, K] can be indexed, and this weight is {list(self.shape)}")
        if not isinstance(expert, int):
            raise TypeError(f"the index of a stack must be an integer, got {type(expert).__name__}")
        if not -self.experts <= expert < self.experts:
            raise IndexError(f"expert {expert} of a stack of {self.experts}")
        # IndexError also ends a loop over the experts.
        buffers = (None if tensor is None else tensor[expert] for tensor in self.held().values())
        return self._with(buffers, self.shape[1:])

    # ---- parts of a matrix ----

    def cut(self, dim: int, begin: int, end: int) -> Self:
        """Rows (dim 0) or columns (dim 1) begin to end - 1 as a weight of their own, with the same numbers in a copy.

        Scales that are 8-bit indices stay so where the rows begin at a group of 256 blocks, else they become float32.

        Raises:
            ValueError: the part does not consist of whole blocks, or the weight is a stack.
        """
        self.check_cut(dim, begin, end)
        (N, K), B = self.shape, self.block_size

        def take(tensor: Tensor, unit: int) -> Tensor:
            """The part of a tensor that has one number for ``unit`` weights."""
            if dim == 0:
                return tensor[begin * K // unit : -(-end * K // unit)].clone()
            return tensor.view(N, K // unit)[:, begin // unit : end // unit].reshape(-1)

        held = self.held()
        return self._with(
            [
                take(held["packed"], 8 // self.format.bits),
                *self._cut_scales(held, lambda tensor: take(tensor, B), begin * K // B, dim),
            ],
            (end - begin, K) if dim == 0 else (N, end - begin),
        )

    def check_cut(self, dim: int, begin: int, end: int) -> None:
        """Raise as :meth:`cut` does."""
        if self.experts:
            raise ValueError(f"only a matrix [N, K] can be cut, and this weight is {list(self.shape)}")
        (N, K), B = self.shape, self.block_size
        if not 0 <= begin < end <= (N, K)[dim]:
            raise ValueError(f"begin and end must be within 0 and {(N, K)[dim]}, got {begin} and {end}")
        whole = (
            begin * K % B == 0 and (end * K % B == 0 or end == N) if dim == 0 else not (K % B or begin % B or end % B)
        )
        if not whole:
            raise ValueError(
                f"{('rows', 'columns')[dim]} {begin} to {end - 1} of a weight {N} x {K} are not whole blocks of {B} weights"
            )

    @abstractmethod
    def _cut_scales(
        self, held: Mapping[str, Any], take: Callable[[Tensor], Tensor], first: int, dim: int
    ) -> list[Tensor | None]:
        """The buffers after ``packed`` of a part; take: of a tensor with one number a block; first: the first block."""

    # ---- moving, copying, saving ----

    def make_shardable(self) -> None:
        """Turn the bytes into Parameters without a gradient: see :func:`lowrank_ops.make_shardable`."""
        self.check_shardable()
        if self.keeper is None:
            self.keeper = Shards(self, ("packed", self._BLOCK_SCALES), self.name())

    def check_shardable(self) -> None:
        """Raise if the bytes are elsewhere already."""
        if self.keeper is not None and not isinstance(self.keeper, Shards):
            raise ValueError("the weight is offloaded; take the hooks that offload it off first")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._parameters:  # of bytes, which no change of dtype touches
            buffers, self._buffers = self._buffers, {}
            super()._apply(fn, recurse)
            self._buffers = buffers
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def _arguments(self) -> tuple[Any, ...]:
        """The arguments of the constructor that make a copy."""
        return *self.held().values(), *self._arguments_after_buffers(self.shape)

    def _arguments_after_buffers(self, shape: Sequence[int]) -> tuple[Any, ...]:
        return tuple(shape), self.block_size, self.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        kind, arguments = self.__reduce__()
        copy: Self = kind(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
        copy.layer_name = self.layer_name
        memo[id(self)] = copy
        return copy

    def _fqn_modifiers(self) -> dict[str, str]:
        # torch.distributed.checkpoint looks every key of a state dict up as an attribute, and asks here for other names.
        return {suffix.split(".")[1]: "_entry_names" for suffix in self._suffixes() if suffix.startswith(".")}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if isinstance(self.keeper, Shards):  # an entry for each Parameter, as the tools for sharded models need it
            super()._save_to_state_dict(destination, prefix, keep_vars)
        else:
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
        # Inside a layer torch shows a child only keys that start with "weight.", so Linear loads "weight" for it.
        if isinstance(self.keeper, Shards):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        elif not prefix:
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
        if isinstance(self.keeper, Shards):
            return
        own = {base + suffix for suffix in self._suffixes()}
        # The module that holds this one would report keys without a point as unexpected.
        plain = [base, f"{base}_blocks", f"{base}_scales"]
        unexpected_keys[:] = [key for key in unexpected_keys if key not in plain]
        try:
            check_format(state_dict, base, self.format)
            # torch.distributed.checkpoint adds the buffers as they are to a full state dict.
            known = own | {f"{base}.{name}" for name in self._buffers}
            unexpected_keys += [key for key in state_dict if key.startswith(base + ".") and key not in known]
            present = {key: state_dict[key] for key in own if key in state_dict}
            if not present:
                missing_keys += [key for key in plain if key in own]
                return
            # A shard of a checkpoint may hold some of the entries only; the others keep their values.
            entries = present if self.packed.is_meta else self._entries(base) | present
            loaded = self._from_entries(entries, base, self.dtype)
            missing_keys += [key for key in loaded._entries(base) if key not in present]
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
        for name in self._STORED_ATTRIBUTES:
            setattr(self, name, getattr(loaded, name))


def check_format(state_dict: Mapping[str, Any], base: str, format: Format | None) -> None:
    """Raise ValueError if a state dict has the weight ``base`` in another format; None means a dense weight."""
    found = [name.upper() for name, mark in MARKS.items() if base + mark in state_dict]
    if not found and base in state_dict and f"{base}.absmax" not in state_dict and not _is_packed(state_dict[base]):
        found = ["dense"]
    here = "dense" if format is None else format.name.upper()
    for name in found:
        if name != here:
            raise ValueError(f"{base!r} is {name} in the state dict and {here} here")


def _is_packed(entry: Any) -> bool:
    """Whether it is a column of bytes, as bitsandbytes stores them; the scales may be in another shard."""
    return isinstance(entry, Tensor) and (entry.dtype == torch.uint8 or (entry.dim() == 2 and entry.shape[1] == 1))
