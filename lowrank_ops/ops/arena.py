"""Adapters side by side in one piece of memory, as the routed kernels read them.

An arena is a uint8 tensor that holds factors and cores; a table is an int64 tensor [slots, 20] that says for each slot
where its parts begin, in bytes from the start of the arena, and what they are:

    0        R, 0 for a slot that holds nothing
    1 … 6    D [R, K]: data, element type, absmax, absmax2, offset, block size
    7 … 12   U [N, R]: likewise
    13 … 18  C: values, element type, kind, entries, half-width of the band, index
    19       s, the bits of a float32

Element types are 0 float32, 1 bfloat16, 2 float16, 3 NF4; kinds of core 0 none, 1 banded (a diagonal is one), 2 sparse,
3 dense. A part that is absent begins at -1. Slots whose D begins at the same place share it. Every part begins at a multiple
of ALIGNMENT. Nothing here has a size for all: ranks, kinds and types differ from slot to slot and nothing is padded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference

FIELDS = 20
ALIGNMENT = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NF4 = len(DTYPES)
OFFSETS = (1, 3, 4, 5, 7, 9, 10, 11, 13, 18)  # the fields that say where a part begins, those of C last
_KINDS = ("none", "banded", "sparse", "dense")

# A matrix: data, scales, block size. A core: values, index. As lowrank_ops.ops has them.
Matrix = tuple[Tensor, Sequence[Tensor], int]
Core = tuple[Tensor, Tensor | None]
Place = Callable[[Tensor], int]
# R, D, U, C, s: what a slot holds.
Update = tuple[int, Matrix, Matrix, Core | None, float]


def factors(down: Matrix, up: Matrix, place: Place) -> list[int]:
    """The fields 1 … 12 of a row; place copies a contiguous tensor to the arena and says where it begins."""
    fields: list[int] = []
    for data, scales, block_size in (down, up):
        absmax, absmax2, offset = (*map(place, scales), -1, -1, -1)[:3] if block_size else (-1, -1, -1)
        dtype = NF4 if block_size else DTYPES.index(data.dtype)
        fields += [place(data), dtype, absmax, absmax2, offset, block_size]
    return fields


def row(rank: int, placed: Sequence[int], core: Core | None, scale: float, place: Place) -> list[int]:
    """One row of the table.

    Args:
        rank: R.
        placed: what :func:`factors` made of D and U.
        core, scale: of the update s · U C D.
        place: copies a contiguous tensor to the arena, or knows that it is there, and says where it begins.
    """
    fields = [rank, *placed]
    if core is None:
        fields += [-1, 0, 0, 0, 0, -1]
    else:
        values, index = core
        kind = "dense" if values.dim() == 2 else "banded" if index is None else "sparse"
        bandwidth = reference.core_bandwidth(values.numel(), rank) if kind == "banded" else 0
        fields += [place(values), DTYPES.index(values.dtype), _KINDS.index(kind), values.numel(), bandwidth]
        fields.append(-1 if index is None else place(index))
    return [*fields, *struct.unpack("i", struct.pack("f", scale))]


def update(arena: Tensor, fields: Sequence[int], N: int, K: int) -> tuple[Any, ...]:
    """(R, down, up, core, s) of a row: views of the arena. The inverse of :func:`row`."""
    rank = fields[0]
    if not rank:
        return 0, None, None, None, 0.0

    def part(at: int, dtype: torch.dtype, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return arena[at : at + count * dtype.itemsize].view(dtype).view(shape)

    def matrix(at: int, rows: int, columns: int) -> Matrix:
        data, dtype, absmax, absmax2, offset, block_size = fields[at : at + 6]
        if dtype != NF4:
            return part(data, DTYPES[dtype], rows, columns), (), 0
        blocks = -(-rows * columns // block_size)
        scales: tuple[Tensor, ...] = (part(absmax, torch.float32, blocks),)
        if absmax2 >= 0:
            groups = -(-blocks // reference.ABSMAX_BLOCK)
            second = part(absmax2, torch.float32, groups), part(offset, torch.float32, 1).view(())
            scales = (part(absmax, torch.uint8, blocks), *second)
        return part(data, torch.uint8, -(-rows * columns // 2)), scales, block_size

    values, dtype, kind, entries, _, index = fields[13:19]
    core: Core | None = None
    if kind:
        shape = (rank, rank) if _KINDS[kind] == "dense" else (entries,)
        length = 2 * (rank + 1) + 3 * entries
        core = part(values, DTYPES[dtype], *shape), None if index < 0 else part(index, torch.int32, length)
    (scale,) = struct.unpack("f", struct.pack("i", fields[19]))
    return rank, matrix(1, rank, K), matrix(7, N, rank), core, scale


def pack(updates: Sequence[Update | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """An arena and its table for updates (R, down, up, core, s), or None; tensors that are shared lie there once."""
    begins: dict[tuple[Any, ...], int] = {}
    parts: list[tuple[int, Tensor]] = []
    size = 0

    def place(tensor: Tensor) -> int:
        nonlocal size
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in begins:
            begins[key] = size
            parts.append((size, tensor))
            size += aligned(tensor.nbytes)
        return begins[key]

    rows = [[0] * FIELDS if u is None else row(u[0], factors(u[1], u[2], place), *u[3:], place) for u in updates]
    arena = torch.zeros(max(size, ALIGNMENT), dtype=torch.uint8, device=device)
    for begin, tensor in parts:
        arena[begin : begin + tensor.nbytes] = bytes_of(tensor)
    return arena, torch.tensor(rows, dtype=torch.int64, device=device).view(-1, FIELDS)


def bytes_of(tensor: Tensor) -> Tensor:
    """Its elements as uint8 [nbytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
