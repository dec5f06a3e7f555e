"""The rows of each expert inside other kernels: rows are sorted by expert, and offsets int32 [E + 1] stay on the device.

Expert e has the rows offsets[e] … offsets[e + 1] - 1 of P; rows from offsets[E] on have no expert. Whatever the offsets
hold, no row outside [0, P) is touched.
"""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_expert(offsets_ptr, e, P):
    """(first row, end) of expert ``e``."""
    first = tl.load(offsets_ptr + e)
    end = tl.load(offsets_ptr + e + 1)
    return tl.minimum(tl.maximum(first, 0), P), tl.minimum(tl.maximum(end, 0), P)


@triton.jit
def tile_of_rows(offsets_ptr, tile, P, E, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, rows, end) of a tile: BLOCK_M rows, int32, those from ``end`` on masked; expert is int64.

    Tiles are numbered through the experts in their order, then through the rows without an expert, whose expert is E. A
    tile beyond the last has an expert above E and no rows. GROUPS is a power of two above E.
    """
    e = tl.arange(0, GROUPS)
    first = tl.load(offsets_ptr + e, mask=e <= E, other=P)
    end = tl.load(offsets_ptr + e + 1, mask=e < E, other=P)
    first = tl.minimum(tl.maximum(first, 0), P)
    end = tl.minimum(tl.maximum(end, 0), P)
    tiles = tl.cdiv(tl.maximum(end - first, 0), BLOCK_M)
    through = tl.cumsum(tiles, 0)
    mine = tl.sum((through <= tile).to(tl.int32), axis=0)
    row0 = tl.sum(tl.where(e == mine, first + (tile - (through - tiles)) * BLOCK_M, 0), axis=0)
    last = tl.sum(tl.where(e == mine, end, 0), axis=0)
    return mine.to(tl.int64), row0 + tl.arange(0, BLOCK_M), last


def groups_of(E: int) -> int:
    """GROUPS of :func:`tile_of_rows` for E experts."""
    return triton.next_power_of_2(E + 1)


def count_tiles(P: int, E: int, rows: int) -> int:
    """The largest number of tiles of ``rows`` rows that P rows can take, whatever the offsets."""
    return (P + min(E + 1, P) * (rows - 1)) // rows
