"""Adapters side by side in one block of memory, as the routed kernels read them.

An arena is a uint8 tensor that holds factors and cores. A table is an int64 tensor [slots, len(FIELDS)] that tells for
each
slot where its parts begin and what they are: :mod:`lowrank_ops.kernels.arena_layout`. Slots whose D begins at the same
position share it. Ranks, kinds and types may differ from slot to slot, and nothing is padded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..kernels.arena_layout import ALIGNMENT, CORE_KINDS, FIELD, FIELDS
from ..kernels.operands import FORMATS, Core, Matrix
from ._operands import ELEMENT_TYPES, core_fields, element_type

# The fields that hold the position of a part, C's last.
OFFSETS = tuple(
    at
    for at, name in enumerate(FIELDS)
    if name.endswith(("_data", "_absmax", "_absmax2", "_offset", "_values", "_index"))
)
_DTYPES = {number: dtype for dtype, number in ELEMENT_TYPES.items()}
_FORMATS = {format.element_type: format for format in FORMATS.values() if format.bits == 4}

Place = Callable[[Tensor], int]
# R, D, U, C, s: the contents of a slot.
Update = tuple[int, Matrix, Matrix, Core | None, float]


def factor_fields(down: Matrix, up: Matrix, place: Place) -> list[int]:
    """The fields of D and U; ``place`` copies a contiguous tensor to the arena and returns its position.

    Raises:
        ValueError: a factor is in 8 bits, which the routed kernels do not read.
    """
    fields: list[int] = []
    for data, scales, block_size, format in (down, up):
        if format is not None and format.bits == 8:
            raise ValueError(f"factors in an arena must be dense or in 4 bits, got {format.name}")
        absmax, absmax2, offset = (*map(place, scales), -1, -1, -1)[:3]
        fields += [place(data), element_type(data, format), absmax, absmax2, offset, block_size]
    return fields


def row(rank: int, placed: Sequence[int], core: Core | None, scale: float, place: Place, experts: int = 0) -> list[int]:
    """One row of the table.

    Args:
        rank: R.
        placed: the fields of D and U from :func:`factor_fields`.
        core, scale: of the update s · U C D.
        place: copies a contiguous tensor to the arena unless it is there already, and returns its position.
        experts: E where D, U and the values of the core are stacks, whose fields are those of the first expert.
    """
    fields = [rank, *placed]
    if core is None:
        fields += [-1, 0, CORE_KINDS.index("none"), 0, 0, -1]
    else:
        values, index = core
        one = core._replace(values=values[0]) if experts else core
        fields += [place(values), *core_fields(one, rank), -1 if index is None else place(index)]
    return [*fields, *struct.unpack("i", struct.pack("f", scale))]


def update(arena: Tensor, fields: Sequence[int], N: int, K: int, experts: int = 0) -> Update | None:
    """(R, down, up, core, s) of a row, as views of the arena; None if the slot is empty. The inverse of :func:`row`."""
    stack = (experts,) if experts else ()
    rank = fields[FIELD["rank"]]
    if not rank:
        return None

    def part(at: int, dtype: torch.dtype, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return arena[at : at + count * dtype.itemsize].view(dtype).view(shape)

    def matrix(name: str, rows: int, columns: int) -> Matrix:
        at = FIELD[f"{name}_data"]
        data, type_, absmax, absmax2, offset, block_size = fields[at : at + 6]
        format = _FORMATS.get(type_)
        if format is None:
            return Matrix(part(data, _DTYPES[type_], *stack, rows, columns))
        blocks = -(-rows * columns // block_size)
        packed = part(data, torch.uint8, *stack, -(-rows * columns // 2))
        if absmax2 < 0:
            scales: tuple[Tensor, ...] = (
                part(absmax, torch.uint8 if format.exponents else torch.float32, *stack, blocks),
            )
        else:
            groups = -(-blocks // reference.ABSMAX_BLOCK)
            second = part(absmax2, torch.float32, *stack, groups), part(offset, torch.float32, *stack)
            scales = (part(absmax, torch.uint8, *stack, blocks), *second)
        return Matrix(packed, scales, block_size, format)

    at = FIELD["core_values"]
    values, type_, kind, entries, _, index = fields[at : at + 6]
    core: Core | None = None
    if CORE_KINDS[kind] != "none":
        shape = (rank, rank) if CORE_KINDS[kind] == "dense" else (entries,)
        length = 2 * (rank + 1) + 3 * entries
        core = Core(
            part(values, _DTYPES[type_], *stack, *shape), None if index < 0 else part(index, torch.int32, length)
        )
    (scale,) = struct.unpack("f", struct.pack("i", fields[FIELD["scale"]]))
    return rank, matrix("down", rank, K), matrix("up", N, rank), core, scale


def build(updates: Sequence[Update | None], device: torch.device, experts: int = 0) -> tuple[Tensor, Tensor]:
    """Build an arena and its table from updates (R, down, up, core, s) or None; shared tensors are stored once.

    Args:
        experts: E where the updates are stacks.
    """
    begins: dict[tuple[Any, ...], int] = {}
    parts: list[tuple[int, Tensor]] = []
    size = 0

    def place(tensor: Tensor) -> int:
        nonlocal size
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in begins:
            begins[key] = size
            parts.append((size, tensor))
            size += align(tensor.nbytes)
        return begins[key]

    rows = [
        [0] * len(FIELDS) if u is None else row(u[0], factor_fields(u[1], u[2], place), *u[3:], place, experts)
        for u in updates
    ]
    arena = torch.zeros(max(size, ALIGNMENT), dtype=torch.uint8, device=device)
    for begin, tensor in parts:
        arena[begin : begin + tensor.nbytes] = bytes_of(tensor)
    return arena, torch.tensor(rows, dtype=torch.int64, device=device).view(-1, len(FIELDS))


def bytes_of(tensor: Tensor) -> Tensor:
    """View a tensor's elements as uint8 [nbytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def align(size: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
