"""Declare an op's operands once; derive its schema, its flat arguments and what autograd needs from the declaration.

A declaration is a torch schema with three more types, Matrix, Core and Branch (:mod:`lowrank_ops.kernels.operands`), and
with what an operand must be (:mod:`lowrank_ops.ops._contract` checks it)::

    (Tensor x[M,K], Matrix weight[N,K], int out_features[N], Core? core[R], Tensor? seed[1]:int64) -> (Tensor y, Tensor h)

In brackets are the names of the sizes, ``...`` for any. Those of an int say which size it is; a branch, whose rank is its
own, has those of its product; ``E?`` is there only if another operand has ``E``, and ``S?`` at the end may be missing.
After a colon is the dtype: one of torch's, that of another operand, "wide" (:func:`wide_dtype` of the first operand with a
free dtype), "floating", which includes float64, or "any"; without a colon it is a float dtype of the kernels. A Matrix or
Core that is optional is None where one of its sizes is 0, and the Matrix only there.

torch's schemas have no such groups: there a matrix is five arguments (data, absmax, absmax2, offset, block), a core two
(values, index) and a branch two (down, up). They are not lists, because autograd would take longer to take a list apart
than for all the rest. The block is 0 for a dense matrix, otherwise ``block_size | code << 16``, where code is the
format's position in FORMATS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..kernels.arena_layout import CORE_KINDS
from ..kernels.operands import FORMATS, Branch, Core, Format, Matrix, of_expert

# Numbers of the dtypes on the compiled side and in an arena's table; a format's number is its element_type.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_FORMATS = tuple(FORMATS.values())
_CODES = {format.name: code << 16 for code, format in enumerate(_FORMATS)}
_ABSENT_MATRIX = (None, None, None, None, 0)


class Operand(NamedTuple):
    """One operand of a declaration: ``Matrix? down[R,K]`` is optional, named down and has the sizes R and K."""

    type: str
    optional: bool
    name: str
    default: str
    shape: tuple[str, ...]
    dtype: str

    def arguments(self) -> tuple[tuple[str, str], ...]:
        """(type, name) of each of its arguments in the schema."""
        own = "?" if self.optional else ""
        if self.type == "Matrix":
            scales = [("Tensor?", f"{self.name}_{scale}") for scale in ("absmax", "absmax2", "offset")]
            return (f"Tensor{own}", self.name), *scales, ("int", f"{self.name}_block")
        if self.type == "Core":
            return (f"Tensor{own}", self.name), ("Tensor?", f"{self.name}_index")
        if self.type == "Branch":
            return tuple((f"Tensor{own}", f"{self.name}_{factor}{self.default}") for factor in ("down", "up"))
        return ((self.type + own, self.name + self.default),)


class Signature:
    """A parsed declaration.

    Attributes:
        operands: as declared.
        arguments: names of the flat arguments of the schema.
        tensors: positions of the tensors among the arguments.
        grouped: whether any operand takes more than one argument.
        outputs: names of the results; "" for a result without a name.
        schema: the text registered with torch.
    """

    def __init__(self, declaration: str) -> None:
        declared, returns = declaration[1:].split(") -> ")
        self.operands = tuple(_operand(text) for text in declared.split(", "))
        flat = [argument for operand in self.operands for argument in operand.arguments()]
        self.schema = f"({', '.join(' '.join(argument) for argument in flat)}) -> {returns}"
        self.arguments = [name.partition("=")[0] for _, name in flat]
        self.outputs = [text.partition(" ")[2] for text in returns.strip("()").split(", ")]
        self.tensors = [at for at, (type_, _) in enumerate(flat) if type_.startswith("Tensor")]
        self.grouped = len(flat) > len(self.operands)
        self._types = [operand.type for operand in self.operands]

    def group(self, arguments: Iterable[Any]) -> list[Any]:
        """Group the schema's arguments into operands; trailing defaults may be left out."""
        operands: list[Any] = []
        take = iter(arguments)
        for type_, value in zip(self._types, take, strict=False):
            if type_ == "Matrix":
                absmax, absmax2, offset, block = next(take), next(take), next(take), next(take)
                if value is not None:
                    if block:
                        scales = (absmax,) if absmax2 is None else (absmax, absmax2, offset)
                        value = Matrix(value, scales, block & 0xFFFF, _FORMATS[block >> 16])
                    else:
                        value = Matrix(value.contiguous())
            elif type_ == "Core":
                index = next(take)
                value = None if value is None else Core(value.contiguous(), index)
            elif type_ == "Branch":
                up = next(take)
                value = None if value is None else Branch(value.contiguous(), up.contiguous())
            operands.append(value)
        return operands

    def flatten(self, operands: Iterable[Any]) -> list[Any]:
        """The inverse of :meth:`group`."""
        arguments: list[Any] = []
        for type_, value in zip(self._types, operands, strict=True):
            if type_ == "Matrix":
                arguments += _ABSENT_MATRIX if value is None else _matrix_arguments(value)
            elif type_ in ("Core", "Branch"):
                arguments += value or (None, None)
            else:
                arguments.append(value)
        return arguments

    def by_name(self, operands: Sequence[Any]) -> dict[str, Any]:
        """Map the operands' names to the operands."""
        return {operand.name: value for operand, value in zip(self.operands, operands, strict=False)}


_OPERAND = re.compile(r"(\w+)(\??) (\w+)(?:\[(.*)\])?(?::(\w+))?(=.*)?")


def _operand(text: str) -> Operand:
    match = _OPERAND.fullmatch(text)
    assert match is not None, text
    type_, optional, name, shape, dtype, default = match.groups(default="")
    return Operand(type_, bool(optional), name, default, tuple(shape.split(",")) if shape else (), dtype)


def _matrix_arguments(matrix: Matrix) -> tuple[Any, ...]:
    data, scales, block_size, format = matrix
    if format is None:
        return data, None, None, None, 0
    return data, *scales, *[None] * (3 - len(scales)), block_size | _CODES[format.name]


# ---- what implementations share ----


def element_type(data: Tensor, format: Format | None = None) -> int:
    """The number of a tensor's dtype, or of its format if it holds packed bytes."""
    return ELEMENT_TYPES[data.dtype] if format is None else format.element_type


def core_fields(core: Core, rank: int) -> tuple[int, int, int, int]:
    """(element type, kind, entries, bandwidth) of a core R × R."""
    values, index = core
    kind = "dense" if values.dim() == 2 else "banded" if index is None else "sparse"
    bandwidth = reference.core_bandwidth(values.numel(), rank) if kind == "banded" else 0
    return element_type(values), CORE_KINDS.index(kind), values.numel(), bandwidth


def dense(matrix: Matrix, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Decode the matrix [rows, columns], or a stack of them, for the reference."""
    data, scales, block_size, format = matrix
    if format is None:
        return data
    if data.dim() == 2:
        return torch.stack([dense(of_expert(matrix, e), rows, columns, dtype) for e in range(len(data))])
    absmax, absmax2, offset = scales if len(scales) == 3 else (scales[0], None, None)
    return reference.dequantize(format, data, absmax, absmax2, offset, rows, columns, block_size, dtype)


def core_matrix(core: Core | None, rank: int) -> Tensor | None:
    """C [R, R] for the reference."""
    return None if core is None else reference.core_matrix(*core, rank)


def core_matrices(core: Core | None, rank: int) -> Tensor | None:
    """C [E, R, R] of a stack of cores for the reference."""
    if core is None:
        return None
    return torch.stack([reference.core_matrix(values, core.index, rank) for values in core.values])


def unit_stride(x: Tensor) -> Tensor:
    """Copy x unless its rows are contiguous: kernels take any row stride, but unit stride within a row."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 where the reference computes in it."""
    return torch.promote_types(x.dtype, torch.float32)


def backward_fake(g: Tensor, in_features: int, **operands: Any) -> tuple[Tensor, ...]:
    """Empty results: dx and the gradient of every operand with a need_… flag; no elements where not needed."""
    gradients = []
    for name in [name.removeprefix("need_") for name in operands if name.startswith("need_")]:
        shape: tuple[int, ...] = (0,)
        like = g
        if operands[f"need_{name}"] and name == "x":
            shape = (g.shape[0], in_features)
        elif operands[f"need_{name}"] and operands[name] is not None:
            like = operands[name][0]
            shape = like.shape
        gradients.append(like.new_empty(shape))
    return tuple(gradients)


def zero_gradient(needed: bool, like: Matrix | Core | None) -> Tensor | None:
    return torch.zeros_like(like[0]) if needed and like is not None else None


def empty_for_none(g: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients as a schema returns them: an empty tensor in place of a gradient that is not needed."""
    return tuple(g.new_empty(0) if grad is None else grad for grad in grads)
