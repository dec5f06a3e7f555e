"""Check the arguments of an op against its declaration, so that no kernel reads outside of its tensors.

An op is checked where the dispatcher enters it. Callers that have checked its operands already say so with
:func:`checked`: :func:`lowrank_ops.ops.call`, and the backward of a forward that was checked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..kernels.operands import FORMATS, Format
from . import _cpu, _plan
from ._operands import ELEMENT_TYPES, Operand, Signature, wide_dtype

_FORMATS = tuple(FORMATS.values())
FLOATS = tuple(ELEMENT_TYPES)
_ANY = (*FLOATS, torch.float64, torch.uint8, torch.int32, torch.int64)
# Dtypes by what a declaration says; None: whatever the implementation in use takes.
_FREE: dict[str, Sequence[torch.dtype] | None] = {"": None, "floating": (*FLOATS, torch.float64), "any": _ANY}
_LARGEST = 2**62
Sizes = dict[str, int]


class _Entry(threading.local):
    checked = False  # whether the op that this thread enters next has been checked


_entry = _Entry()


def checked(op: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call the op with arguments that need no check, because their operands have been checked."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    _entry.checked = True
    try:
        return op(*arguments)
    finally:
        _entry.checked = False


def enter() -> bool:
    """Tell whether the op that is entered now has been checked."""
    was, _entry.checked = _entry.checked, False
    return was


def _devices(tensors: Sequence[Tensor]) -> str:
    return " and ".join(sorted({str(tensor.device) for tensor in tensors}))


class Contract:
    """What the declaration of an op asks of its arguments.

    Args:
        name: of the op.
        signature: its declaration.
        also: a check of its own that takes the arguments and the sizes by name, for what a declaration cannot say.

    Attributes:
        needs: for a backward, which operand each gradient needs, such as x=("down",).
    """

    def __init__(self, name: str, signature: Signature, also: Callable[..., None] | None = None) -> None:
        self.name, self._also, self._names = name, also, signature.arguments
        self.needs: dict[str, Sequence[str]] = {}
        self._ints: list[tuple[int, Operand]] = []
        self._first: list[tuple[int, Operand]] = []
        self._rest: list[tuple[int, Operand]] = []
        self._dropout = signature.arguments.index("dropout") if "dropout" in signature.arguments else None
        free = [operand.name for operand in signature.operands if operand.type == "Tensor" and operand.dtype in _FREE]
        self._free = self._names.index(free[0]) if free else 0
        at = 0
        self._defaults: list[Any] = []
        for operand in signature.operands:
            default = operand.default.lstrip("=")
            self._defaults += [int(default) if default.isdigit() else None] * len(operand.arguments())
            plain = operand.type == "Tensor" and not any(size in ("E", "E?") for size in operand.shape)
            if operand.type == "int" and operand.shape:
                self._ints.append((at, operand))
            elif plain:
                self._first.append((at, operand))
            elif operand.type in ("Tensor", "Matrix", "Core", "Branch"):
                self._rest.append((at, operand))
            at += len(operand.arguments())

    def check(self, given: Sequence[Any]) -> list[Any]:
        """The arguments, with contiguous tensors where kernels need them.

        Raises:
            TypeError: a tensor has another dtype.
            ValueError: a size, layout, device or number does not fit, memory is missing, or an operand is.
        """
        arguments = [*given, *self._defaults[len(given) :]]  # the dispatcher leaves out trailing defaults
        sizes: Sizes = {}
        for at, operand in self._ints:
            sizes[operand.shape[0]] = size = arguments[at]
            if not 0 <= size < _LARGEST:
                raise self._wrong(operand.name, "be a size of at least 0", size)
        reader = _Reader(self, arguments, sizes)
        for at, operand in self._first:
            reader.tensor(at, operand)
        for at, operand in self._rest:
            getattr(reader, operand.type.lower())(at, operand)
        reader.finish()
        if self._dropout is not None:
            self._check_dropout(arguments)
        if self.needs:
            self._check_needs(arguments)
        if self._also is not None:
            self._also(**sizes, **dict(zip(self._names, arguments, strict=True)))
        return arguments

    def check_meta(self, given: Sequence[Any]) -> None:
        """Check a call for which torch only makes empty results: what it needs is there, and all on the meta device or none.

        Raises:
            ValueError: a tensor is missing; or some hold numbers and others are on the meta device.
        """
        for at, operand in (*self._first, *self._rest):
            if not operand.optional and given[at] is None:
                raise self._wrong(operand.name, "be a Tensor", None)
        tensors = [a for a in given if isinstance(a, Tensor)]
        meta = [tensor.is_meta for tensor in tensors]
        if any(meta) and not all(meta):
            raise ValueError(f"lowrank_ops::{self.name}: tensors must be on one device, got {_devices(tensors)}")

    def _check_dropout(self, arguments: Sequence[Any]) -> None:
        dropout = arguments[self._dropout or 0]
        if not 0 <= dropout < 1:
            raise self._wrong("dropout", "be in [0, 1)", dropout)
        if dropout and arguments[self._names.index("seed")] is None:
            raise self._wrong("seed", f"be given for dropout {dropout}", None)

    def _check_needs(self, arguments: Sequence[Any]) -> None:
        value = dict(zip(self._names, arguments, strict=True))
        for kept, gradients in self.needs.items():
            for gradient in gradients:
                if value.get(f"need_{gradient}") and value[kept] is None:
                    raise self._wrong(kept, f"be given for need_{gradient}", None)
        for name in ("down", "up"):
            if value.get(f"need_{name}") and value.get(f"{name}_block"):
                raise self._wrong(f"need_{name}", f"be False for a frozen quantised {name}", True)

    def _wrong(self, name: str, must: str, got: Any) -> ValueError:
        return ValueError(f"lowrank_ops::{self.name}: {name} must {must}, got {got}")


class _Reader:
    """Checks the operands of one call; sizes that an operand names become known with the first tensor that has them."""

    def __init__(self, contract: Contract, arguments: list[Any], sizes: Sizes) -> None:
        self.wrong, self.op = contract._wrong, contract.name
        self.arguments, self.sizes = arguments, sizes
        self.names, self.free = contract._names, contract._free
        self.floats = (*FLOATS, torch.float64) if _plan.forced() == "reference" else FLOATS
        self.device: torch.device | None = None
        self.strided: list[int] = []
        self.indices: list[tuple[int, int, int]] = []
        self.of = ""

    def tensor(self, at: int, operand: Operand) -> None:
        tensor = self.arguments[at]
        if tensor is None:
            if not operand.optional:
                raise self.wrong(operand.name, "be a Tensor", None)
            return
        self._take(at, self._dtypes(operand))
        shape, sizes = operand.shape, self.sizes
        if shape == ("...",):
            return
        if "E?" in shape:
            shape = ("E", *shape[1:]) if "E" in sizes else shape[1:]
        got = tensor.shape
        if shape[-1:] == ("S?",):
            shape = (*shape[:-1], "S") if len(got) == len(shape) else shape[:-1]
        if len(got) == len(shape):
            for size, number in zip(shape, got, strict=True):
                if size.endswith("+1"):
                    size, number = size[:-2], number - 1
                if (
                    (known := sizes.setdefault(size, number)) != number
                    or known < 0
                    or (size.isdigit() and int(size) != number)
                ):
                    break
            else:
                return
        raise self._shape(operand.name, shape, got)

    def matrix(self, at: int, operand: Operand) -> None:
        data, absmax, absmax2, offset, block = self.arguments[at : at + 5]
        name, shape = operand.name, self._shape_of(operand)
        *leading, rows, columns = (self.sizes[size] for size in shape)
        if data is None or not all((*leading, rows, columns)):
            if not operand.optional or data is not None or all((*leading, rows, columns)):
                sizes = ", ".join(f"{size} = {self.sizes[size]}" for size in shape)
                raise self.wrong(
                    name, f"be {'None' if data is not None and operand.optional else 'given'} for {sizes}", _brief(data)
                )
            if operand.optional:
                return
        if not block:
            self._take(at, self.floats, copy=False)
            if data.shape != (*leading, rows, columns):
                raise self._shape(name, shape, data.shape)
            for scale in range(at + 1, at + 4):
                if self.arguments[scale] is not None:
                    raise self.wrong(self.names[scale], f"be None for a dense {name}", _brief(self.arguments[scale]))
            return
        code, size = block >> 16, block & 0xFFFF
        if not 0 <= code < len(_FORMATS) or size not in _FORMATS[code].block_sizes:
            raise self.wrong(f"{name}_block", "be 0 or a block size of a format | its number << 16", block)
        if _FORMATS[code].exponents and columns % size:
            raise self.wrong(name, f"have columns in whole blocks of {size} in {_FORMATS[code].name}", columns)
        for place in range(at, at + 4):
            if self.arguments[place] is not None:
                self._take(place, _ANY)
        parts = dict(zip(self.names[at : at + 4], self.arguments[at : at + 4], strict=True))
        check_packed(self.op, parts, _FORMATS[code], tuple(leading), rows, columns, size)

    def core(self, at: int, operand: Operand) -> None:
        values, index = self.arguments[at : at + 2]
        *leading, R = (self.sizes[size] for size in self._shape_of(operand))
        name = operand.name
        if values is None:
            if not operand.optional:
                raise self.wrong(name, "be given", None)
            if index is not None:
                raise self.wrong(f"{name}_index", f"be None without {name}", _brief(index))
            return
        if not R:
            raise self.wrong(name, "be None for rank 0", _brief(values))
        self._take(at, self.floats, copy=False)
        shape = tuple(values.shape)
        own = shape[len(leading) :]
        if shape[: len(leading)] != tuple(leading) or len(own) not in (1, 2) or (len(own) == 2 and own != (R, R)):
            must = f"be {[*leading, R, R]}, or {leading or ''}[entries] of a band or a sparse core"
            raise self.wrong(name, must, list(shape))
        entries = own[0]
        if index is None:
            if len(own) == 1:
                reference.core_bandwidth(entries, R)
            return
        self._take(at + 1, (torch.int32,))
        if len(own) == 2 or not entries or index.shape != (2 * (R + 1) + 3 * entries,):
            must = "be None for a dense core" if len(own) == 2 else f"be [{2 * (R + 1) + 3 * entries}] for these values"
            raise self.wrong(f"{name}_index", must, list(index.shape))
        self.indices.append((at + 1, R, entries))

    def branch(self, at: int, operand: Operand) -> None:
        down, up = self.arguments[at : at + 2]
        name = operand.name
        if (down is None) != (up is None):
            missing = "down" if down is None else "up"
            raise self.wrong(f"{name}_{missing}", "be given as the other factor is", None)
        if down is None:
            return
        *leading, N, K = (self.sizes[size] for size in self._shape_of(operand))
        for place in (at, at + 1):
            self._take(place, self.floats, copy=False)
        rank = down.shape[-2] if down.dim() > 1 else 0
        for place, shape in ((at, (*leading, rank, K)), (at + 1, (*leading, N, rank))):
            if not rank or self.arguments[place].shape != shape:
                raise self.wrong(self.names[place], f"be {list(shape)}", list(self.arguments[place].shape))

    def finish(self) -> None:
        """Copy what must be contiguous, and read what says where a kernel reads."""
        for at in self.strided:
            self.arguments[at] = self.arguments[at].contiguous()
        for at, R, entries in self.indices:
            if fault := _cpu.index_fault(self.arguments[at], R, entries):
                raise ValueError(f"lowrank_ops::{self.op}: {self.names[at]} is wrong: {fault}")

    # ---- what all operands share ----

    def _take(self, at: int, dtypes: Sequence[torch.dtype], copy: bool = True) -> None:
        """Check layout, device, dtype and memory of an argument; copy: whether kernels need it contiguous."""
        tensor, name = self.arguments[at], self.names[at]
        if tensor.layout is not torch.strided:
            raise self.wrong(name, "be a dense tensor", f"layout {tensor.layout}")
        if self.device is None:
            self.device, self.of = tensor.device, name
        elif tensor.device != self.device:
            raise self.wrong(name, f"be on {self.device} as {self.of} is", tensor.device)
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"lowrank_ops::{self.op}: {name} must be {names}, got {tensor.dtype}")
        whole = tensor.is_contiguous()
        last = tensor.numel() - 1
        if last >= 0:
            if not whole:
                last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            need = (tensor.storage_offset() + last + 1) * tensor.itemsize
            if (held := tensor.untyped_storage().nbytes()) < need:
                raise self.wrong(name, f"have memory for its shape {list(tensor.shape)}, {need} bytes", held)
        if not whole and copy and name not in ("x", "g"):  # those may have any stride between rows
            self.strided.append(at)

    def _dtypes(self, operand: Operand) -> Sequence[torch.dtype]:
        dtype = operand.dtype
        if dtype in _FREE:
            return _FREE[dtype] or self.floats
        if dtype != "wide" and dtype not in self.names:
            return (getattr(torch, dtype),)
        other = self.free if dtype == "wide" else self.names.index(dtype)
        if self.arguments[other] is None:
            raise self.wrong(self.names[other], "be a Tensor", None)
        return (wide_dtype(self.arguments[other]) if dtype == "wide" else self.arguments[other].dtype,)

    def _shape_of(self, operand: Operand) -> tuple[str, ...]:
        if operand.shape[0] != "E?":
            return operand.shape
        return ("E", *operand.shape[1:]) if "E" in self.sizes else operand.shape[1:]

    def _shape(self, name: str, shape: Sequence[str], got: Sequence[int]) -> ValueError:
        sizes = [f"{size}={self.sizes[size]}" if size in self.sizes and not size.isdigit() else size for size in shape]
        return self.wrong(name, f"be [{', '.join(sizes)}]", list(got))


def check_packed(
    op: str, parts: Mapping[str, Tensor | None], format: Format, leading: tuple[int, ...], rows: int, columns: int,
    block_size: int,
) -> None:  # fmt: skip
    """Raise unless the parts are data, absmax, absmax2 and offset of a matrix in a format, or of a stack of them.

    Args:
        parts: by the names for messages.
        leading: (E,) of a stack, else ().
    """

    def wrong(name: str, must: str, got: Any) -> ValueError:
        sizes = " x ".join(map(str, (*leading, rows, columns)))
        return ValueError(
            f"lowrank_ops::{op}: {name} must {must} for {format.name} {sizes} in blocks of {block_size}, got {got}"
        )

    blocks = -(-rows * columns // block_size)
    data, absmax, absmax2, offset = parts
    double = parts[absmax2] is not None and not format.exponents
    need: dict[str, tuple[torch.dtype, tuple[int, ...]] | None] = {
        data: (torch.uint8, (format.bytes_of(rows * columns),)),
        absmax: (torch.uint8 if double or format.exponents else torch.float32, (blocks,)),
        absmax2: (torch.float32, (-(-blocks // reference.ABSMAX_BLOCK),)) if double else None,
        offset: (torch.float32, ()) if double else None,
    }
    for name, tensor in parts.items():
        dtype, shape = need[name] or (None, ())
        if dtype is None or tensor is None:
            if (dtype is None) != (tensor is None):
                raise wrong(name, "be None" if dtype is None else "be given", _brief(tensor))
        elif tensor.dtype != dtype:
            raise TypeError(f"lowrank_ops::{op}: {name} must be {dtype} for {format.name}, got {tensor.dtype}")
        elif tensor.shape != (*leading, *shape):
            raise wrong(name, f"be {[*leading, *shape]}", list(tensor.shape))


def _brief(value: Any) -> Any:
    return f"a Tensor {list(value.shape)}" if isinstance(value, Tensor) else value
