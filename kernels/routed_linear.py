"""y[t] = W x[t] + U_b (D_b x[t]) + bias + s_a · U_a C_a (D_a x[t]), a = slots[t]: each token has its own update.

With strengths it has several: y[t] = W x[t] + … + Σ_j strengths[t, j] s_a · U_a C_a (D_a x[t]), a = slots[t, j].

:mod:`adapted_linear` without an update computes W x + U_b (D_b x) + bias. Three kernels then add the updates of all
tokens, whatever their ranks, cores and dtypes: h = D x, c = s · C h, y += U c. Tokens are sorted by slot, and a program
takes a tile of them and loops over j and the slots in it; where every adapter has many tokens, a tile has one or two
slots. Its products run on the tensor cores with the rows of other slots masked.

Grids depend on shapes alone, and slots are sorted on the device, so a captured graph serves any mix of adapters that
the table, the slots and the strengths hold when it is replayed.

The arena is a uint8 tensor and the table int64 with a row for each slot: see :mod:`arena_layout`.

Letters: M tokens, N out features, K in features, R rank.
"""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adapted_linear, experts_linear
from .arena_layout import CORE_FIELDS, CORE_KINDS, FIELD, FIELDS, MATRIX_FIELDS
from .config import Config, power_of_two
from .launch import check_dtypes, interpreted, launch
from .matrix import dynamic_table, exponent_scale, load_tile, unit_rows
from .operands import FORMATS, MXFP4, Branch, Matrix

# The length of a row of the table, and where D, U, C and s begin in it.
_ROW = tl.constexpr(len(FIELDS))
_DOWN, _UP = tl.constexpr(FIELD["down_data"]), tl.constexpr(FIELD["up_data"])
_CORE, _SCALE = tl.constexpr(FIELD["core_values"]), tl.constexpr(FIELD["scale"])
# Positions within the fields of D or U, and of C.
_TYPE, _ABSMAX, _ABSMAX2, _OFFSET, _BLOCK = map(tl.constexpr, range(1, len(MATRIX_FIELDS)))
_KIND, _ENTRIES, _BANDWIDTH, _INDEX = map(tl.constexpr, range(2, len(CORE_FIELDS)))
_FLOAT32, _BFLOAT16, _FLOAT16, _FIRST_FORMAT = map(tl.constexpr, range(4))
_MXFP4 = tl.constexpr(MXFP4.element_type)
_NONE, _BANDED, _SPARSE, _DENSE = map(tl.constexpr, range(len(CORE_KINDS)))
_TYPES = [FIELD[part + "_type"] for part in ("down", "up", "core")]
# Programs that share the ranks of a tile of tokens; their number must not depend on the ranks.
_PIECES = 4
# h and c are float32 for every dtype. Other tiles spill for some target; there is nothing to prefetch.
_CORE_TILE = Config(BLOCK_M=32, BLOCK_R=32, num_stages=1)


# ---- helpers


class Routes(NamedTuple):
    """The updates and each token's slot, as one argument of a kernel.

    Attributes:
        arena, table: see :mod:`arena_layout`.
        experts: E if row a of the table has E updates, those of the slots a E … a E + E - 1; None if it has one.
        order: int64 [M], the tokens sorted by slot.
        entries: int64 [M S], the entries (m, j) of slots sorted by slot.
        slots: int32 [M, S].
        strengths: float32 [M, S]; None for 1.
        S: the most updates of a token.
        levels, dynamic: pointers to :func:`all_levels` and :func:`matrix.dynamic_table`.
    """

    arena: Any
    table: Any
    experts: Any
    order: Any
    entries: Any
    slots: Any
    strengths: Any
    S: Any
    levels: Any
    dynamic: Any


@triton.jit
def _tile_of(order_ptr, M, BLOCK_M: tl.constexpr):
    """The tokens of a program, or its entries; M means none."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.load(order_ptr + at, mask=at < M, other=M).to(tl.int32)


@triton.jit
def _slots_of(routes, m, j, M, slot_count):
    """Update j of tokens: the entry of each, and its slot; -1 means none."""
    entry = m * routes.S + j
    slot = tl.load(routes.slots + entry, mask=m < M, other=-1)
    return entry, tl.where(slot < slot_count, slot, -1)


@triton.jit
def _fields_of(routes, a):
    """The fields of the update of slot ``a``."""
    row = a if routes.experts is None else a // routes.experts
    return routes.table + row.to(tl.int64) * _ROW


@triton.jit
def _expert_of(routes, a):
    """The expert of slot ``a``, int64; None if a slot is one update."""
    if routes.experts is None:
        expert = routes.experts
    else:
        expert = (a % routes.experts).to(tl.int64)
    return expert


@triton.jit
def _size_of(dtype):
    """Bytes of an element of a dense type."""
    return tl.where(dtype == _FLOAT32, 4, 2)


@triton.jit
def _values(data_ptr, dtype, at, mask):
    """Elements of a dense part of the arena in float32; two of the three loads are masked out."""
    single = tl.load(data_ptr.to(tl.pointer_type(tl.float32)) + at, mask=mask & (dtype == _FLOAT32), other=0.0)
    brain = tl.load(data_ptr.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask & (dtype == _BFLOAT16), other=0.0)
    half = tl.load(data_ptr.to(tl.pointer_type(tl.float16)) + at, mask=mask & (dtype > _BFLOAT16), other=0.0)
    return single + brain.to(tl.float32) + half.to(tl.float32)


@triton.jit
def _decoded_tile(routes, factor_ptr, expert, dtype, rows, columns, row_count, column_count):
    """A tile of a 4-bit factor of type ``dtype``, float32, zero outside it; factor_ptr: its fields in the table."""
    packed = tl.load(factor_ptr)
    absmax = tl.load(factor_ptr + _ABSMAX)
    second = tl.load(factor_ptr + _ABSMAX2)
    offset = tl.load(factor_ptr + _OFFSET)
    twice, exponents = second >= 0, dtype == _MXFP4
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    flat = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    # The block size is a power of two, so the exponent of its float32 value is the shift that divides by it.
    block_size = tl.load(factor_ptr + _BLOCK).to(tl.float32)
    shift = ((block_size.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.int64)
    block = flat >> shift
    if expert is not None:
        size = tl.cast(row_count, tl.int64) * column_count
        blocks = (size - 1 >> shift) + 1
        packed += expert * ((size + 1) >> 1)
        absmax += expert * blocks * tl.where(twice | exponents, 1, 4)
        second += expert * tl.where(twice, (blocks + 255 >> 8) * 4, 0)
        offset += expert * tl.where(twice, 4, 0)
    absmax_ptr = routes.arena + absmax
    byte = tl.load(routes.arena + packed + (flat >> 1), mask=mask, other=0).to(tl.int32)
    nibble = (byte >> (4 - 4 * (flat & 1).to(tl.int32))) & 15
    # There are three kinds of scale; masks keep the pointers of the other two from being read.
    index = tl.load(absmax_ptr + block, mask=mask & (twice | exponents), other=0).to(tl.int32)
    absmax2_ptr = (routes.arena + second).to(tl.pointer_type(tl.float32))
    absmax2 = tl.load(absmax2_ptr + (block >> 8), mask=mask & twice, other=0.0)
    offset_ptr = (routes.arena + offset).to(tl.pointer_type(tl.float32))
    quantised = tl.load(routes.dynamic + index) * absmax2 + tl.load(offset_ptr, mask=twice, other=0.0)
    single = mask & (second < 0) & (dtype != _MXFP4)
    plain = tl.load(absmax_ptr.to(tl.pointer_type(tl.float32)) + block, mask=single, other=0.0)
    scale = tl.where(exponents, exponent_scale(index), tl.where(twice, quantised, plain))
    level = tl.load(routes.levels + (dtype - _FIRST_FORMAT).to(tl.int32) * 16 + nibble)
    return tl.where(mask, level * scale, 0.0)


@triton.jit
def _dense_product(
    acc, x_ptr, m, M, K, stride_xm, data_ptr, rows, row_count, STORED: tl.constexpr, DTYPE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    factor_ptr = data_ptr.to(tl.pointer_type(STORED))
    for k0 in range(0, K, STEP):
        k = k0 + tl.arange(0, STEP)
        x = load_tile(x_ptr, m, k, stride_xm, 1, M, K).to(DTYPE)
        factor = load_tile(factor_ptr, rows, k, K, 1, row_count, K).to(DTYPE)
        acc = tl.dot(x, tl.trans(factor), acc, input_precision="ieee")
    return acc


@triton.jit
def _product(
    x_ptr, m, M, K, stride_xm, routes, factor_ptr, expert, rows, row_count, DTYPE: tl.constexpr, STEP: tl.constexpr
):
    """Σ_k x[m, k] · factor[rows, k], float32 [len(m), len(rows)]; factor_ptr points to its fields in the table.

    Of a stack of factors it is that of ``expert``, int64; None if there is one factor.

    Numerics: both operands are rounded to DTYPE, 4-bit factors once from float32.
    """
    acc = tl.zeros((m.shape[0], rows.shape[0]), tl.float32)
    data_ptr = routes.arena + tl.load(factor_ptr)
    dtype = tl.load(factor_ptr + _TYPE)
    if expert is not None:
        data_ptr += expert * row_count * K * _size_of(dtype)
    if dtype >= _FIRST_FORMAT:
        # Each decoded weight takes registers: limit them to about 1024 at a time.
        THIN: tl.constexpr = 1024 // rows.shape[0]
        NARROW: tl.constexpr = THIN if THIN < STEP else STEP
        for k0 in range(0, K, NARROW):
            k = k0 + tl.arange(0, NARROW)
            x = load_tile(x_ptr, m, k, stride_xm, 1, M, K).to(DTYPE)
            factor = _decoded_tile(routes, factor_ptr, expert, dtype, rows, k, row_count, K).to(DTYPE)
            acc = tl.dot(x, tl.trans(factor), acc, input_precision="ieee")
    elif dtype == _FLOAT32:
        acc = _dense_product(acc, x_ptr, m, M, K, stride_xm, data_ptr, rows, row_count, tl.float32, DTYPE, STEP)
    elif dtype == _BFLOAT16:
        acc = _dense_product(acc, x_ptr, m, M, K, stride_xm, data_ptr, rows, row_count, tl.bfloat16, DTYPE, STEP)
    else:
        acc = _dense_product(acc, x_ptr, m, M, K, stride_xm, data_ptr, rows, row_count, tl.float16, DTYPE, STEP)
    return acc


@triton.jit
def _core_product(h_ptr, m, r, M, R, stride_hm, routes, core_ptr, expert, STEP: tl.constexpr):
    """(C h)[m, r] in float32; core_ptr points to the core's fields in the table, ``expert`` as in :func:`_product`."""
    values_ptr = routes.arena + tl.load(core_ptr)
    dtype = tl.load(core_ptr + _TYPE)
    kind = tl.load(core_ptr + _KIND)
    if expert is not None:
        values_ptr += expert * tl.load(core_ptr + _ENTRIES) * _size_of(dtype)
    c = tl.zeros((m.shape[0], r.shape[0]), tl.float32)
    if kind == _NONE:
        c = load_tile(h_ptr, m, r, stride_hm, 1, M, R)
    elif kind == _BANDED:
        width = tl.load(core_ptr + _BANDWIDTH).to(tl.int32)
        start = tl.full((), 0, tl.int64)  # of the diagonal in values
        for o in range(-width, width + 1):
            other = r + o
            inside = (r < R) & (other >= 0) & (other < R)
            value = _values(values_ptr, dtype, start + tl.minimum(o, 0) + r, inside)
            h = load_tile(h_ptr, m, tl.where(inside, other, R), stride_hm, 1, M, R)
            c += h * value[None, :]
            start += R - tl.abs(o)
    elif kind == _SPARSE:
        starts_ptr = (routes.arena + tl.load(core_ptr + _INDEX)).to(tl.pointer_type(tl.int32))
        first = tl.load(starts_ptr + r, mask=r < R, other=0)
        last = tl.load(starts_ptr + r + 1, mask=r < R, other=0)
        for entry in range(tl.max(last - first)):
            at = first + entry
            inside = at < last
            other = tl.load(starts_ptr + R + 1 + at, mask=inside, other=R)
            value = _values(values_ptr, dtype, at, inside)
            h = load_tile(h_ptr, m, other, stride_hm, 1, M, R)
            c += h * value[None, :]
    else:
        for s0 in range(0, R, STEP):
            s = s0 + tl.arange(0, STEP)
            h = load_tile(h_ptr, m, s, stride_hm, 1, M, R)
            at = r.to(tl.int64)[None, :] * R + s[:, None]
            value = _values(values_ptr, dtype, at, (r < R)[None, :] & (s < R)[:, None])
            c = tl.dot(h, value, c, input_precision="ieee")
    return c


# ---- kernels


@triton.jit(do_not_specialize=["slot_count", "capacity", "pieces"])
def _routed_shrink_kernel(
    x_ptr, routes, slot_count, h_ptr, M, K, stride_xm, capacity, pieces, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[e, r] = Σ_k D[r, k] x[m, k], e = (m, j)."""
    E = M * routes.S
    entry = _tile_of(routes.entries, E, BLOCK_M)
    slot = tl.load(routes.slots + entry, mask=entry < E, other=-1)
    slot = tl.where(slot < slot_count, slot, -1)
    a = tl.max(slot)
    while a >= 0:
        fields_ptr = _fields_of(routes, a)
        R = tl.minimum(tl.load(fields_ptr), capacity).to(tl.int32)
        mine = tl.where(slot == a, entry // routes.S, M)
        for r0 in range(tl.program_id(1) * BLOCK_R, R, pieces * BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            expert = _expert_of(routes, a)
            dtype = x_ptr.dtype.element_ty
            h = _product(x_ptr, mine, M, K, stride_xm, routes, fields_ptr + _DOWN, expert, r, R, dtype, BLOCK_K)
            at = entry.to(tl.int64)[:, None] * capacity + r[None, :]
            tl.store(h_ptr + at, h, mask=(mine < M)[:, None] & (r < R)[None, :])
        slot = tl.where(slot == a, -1, slot)
        a = tl.max(slot)


@triton.jit(do_not_specialize=["slot_count", "capacity", "pieces"])
def _routed_core_kernel(
    h_ptr, routes, slot_count, c_ptr, M, capacity, pieces, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """c[e, r] = w s · (C h)[e, r], w the strength of entry e."""
    E = M * routes.S
    entry = _tile_of(routes.entries, E, BLOCK_M)
    slot = tl.load(routes.slots + entry, mask=entry < E, other=-1)
    slot = tl.where(slot < slot_count, slot, -1)
    a = tl.max(slot)
    while a >= 0:
        fields_ptr = _fields_of(routes, a)
        R = tl.minimum(tl.load(fields_ptr), capacity).to(tl.int32)
        mine = tl.where(slot == a, entry, E)
        scale = tl.load(fields_ptr + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
        for r0 in range(tl.program_id(1) * BLOCK_R, R, pieces * BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            c = scale * _core_product(
                h_ptr, mine, r, E, R, capacity, routes, fields_ptr + _CORE, _expert_of(routes, a), BLOCK_R
            )
            if routes.strengths is not None:
                c *= tl.load(routes.strengths + mine, mask=mine < E, other=0.0)[:, None]
            at = mine.to(tl.int64)[:, None] * capacity + r[None, :]
            tl.store(c_ptr + at, c, mask=(mine < E)[:, None] & (r < R)[None, :])
        slot = tl.where(slot == a, -1, slot)
        a = tl.max(slot)


@triton.jit(do_not_specialize=["slot_count", "capacity"])
def _routed_expand_kernel(
    c_ptr, routes, slot_count, y_ptr, M, N, capacity, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[m, n] += Σ_r U[n, r] c[e, r], e = (m, j), in the order of j."""
    m = _tile_of(routes.order, M, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = y_ptr.dtype.element_ty
    E = M * routes.S
    for j in range(routes.S):
        entry, slot = _slots_of(routes, m, j, M, slot_count)
        a = tl.max(slot)
        while a >= 0:
            fields_ptr = _fields_of(routes, a)
            rank = tl.load(fields_ptr)
            if rank > 0:
                mine = tl.where(slot == a, entry, E)
                added = tl.full((BLOCK_M, BLOCK_N), float("nan"), tl.float32)
                if rank <= capacity:
                    R = rank.to(tl.int32)
                    expert = _expert_of(routes, a)
                    added = _product(
                        c_ptr, mine, E, R, capacity, routes, fields_ptr + _UP, expert, n, N, dtype, BLOCK_R
                    )
                at = m.to(tl.int64)[:, None] * N + n[None, :]
                mask = (mine < E)[:, None] & (n < N)[None, :]
                y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(y_ptr + at, (y + added).to(dtype), mask=mask)
            slot = tl.where(slot == a, -1, slot)
            a = tl.max(slot)


# ---- launchers


def forward(
    x: Tensor, weight: Matrix, out_features: int, bias: Tensor | None, arena: Tensor, table: Tensor, slots: Tensor,
    form: str, capacity: int = 512, offsets: Tensor | None = None, config: Config | None = None,
    branch: Branch | None = None, strengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[t] = W x[t] + U_b (D_b x[t]) + bias + s_a · U_a C_a (D_a x[t]), a = slots[t], without the update where a is -1.

    With strengths the updates are summed: Σ_j strengths[t, j] s_a · U_a C_a (D_a x[t]), a = slots[t, j].

    With offsets W, the branch, bias, D, U and C are those of the row's expert, and y is 0 where there is none: W is then
    read by the rows of an expert, and an update by the rows of an expert with one adapter.

    Args:
        x: [M, K], float32, bfloat16 or float16, any row stride; M >= 1.
        weight: W [N, K]; with offsets [E, N, K].
        out_features: N.
        bias: [N] or None; with offsets [E, N].
        arena, table: uint8 and int64 [slots, fields], see :mod:`arena_layout`; with offsets slots hold stacks.
        slots: int32 [M], or [M, S] with strengths; indices outside the table mean no adapter.
        form: "few" or "many", for the product with W.
        capacity: the largest rank a slot may have; rows of a slot with a larger rank become NaN.
        offsets: None, or as in :func:`experts_linear.forward`.
        config: tiles of the kernels that multiply by D and by U; None for :func:`default_config`.
        branch: as in :func:`adapted_linear.forward`; with offsets as in :func:`experts_linear.forward`.
        strengths: float32 [M, S], or None.

    Returns:
        y [M, N] in the dtype of x.

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: the product with W as in :func:`adapted_linear.forward`, or :func:`experts_linear.forward`, rounded to the
    dtype of x; then :func:`add_updates`, which rounds once more for each update.
    """
    if offsets is None:
        y = base(x, weight, out_features, bias, form, branch)
        return add_updates(x, arena, table, slots, y, capacity, config, strengths=strengths)
    y, _ = experts_linear.forward(
        x, weight, offsets, out_features, 0, None, None, None, bias, 1.0, 0.0, None, form, branch=branch
    )  # fmt: skip
    experts = offsets.numel() - 1
    expert = torch.bucketize(torch.arange(len(x), dtype=torch.int32, device=x.device), offsets[1:], right=True)
    if strengths is not None:
        expert = expert.unsqueeze(1)
    # The zeros of a row without an expert stay.
    routed = (slots >= 0) & (slots < len(table)) & (expert < experts)
    pairs = torch.where(routed, slots * experts + expert, -1).to(torch.int32)
    return add_updates(x, arena, table, pairs, y, capacity, config, experts, strengths)


def base(
    x: Tensor, weight: Matrix, out_features: int, bias: Tensor | None, form: str, branch: Branch | None
) -> Tensor:  # fmt: skip
    """y = W x + U_b (D_b x) + bias, arguments as in :func:`forward`; here or in a CUDA kernel the updates are added."""
    operands = (x, weight, out_features, 0, None, None, None, bias, 1.0, 0.0, None, form)
    return adapted_linear.forward(*operands, branch=branch)[0]


def add_updates(
    x: Tensor, arena: Tensor, table: Tensor, slots: Tensor, y: Tensor, capacity: int = 512,
    config: Config | None = None, experts: int | None = None, strengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[t] += Σ_j strengths[t, j] s_a · U_a C_a (D_a x[t]), a = slots[t, j], in place; arguments as in :func:`forward`.

    Args:
        y: [M, N] in the dtype of x, contiguous; rows without an update stay unchanged.
        experts: E if a row of the table has E updates; slots are then those of :class:`Routes`.

    Numerics: factors and s · C h are rounded to the dtype of x as operands, 4-bit factors once, from the float32
    product of level and scale; sums, h and C h are float32; y is rounded after each update of a token. Within a
    configuration a token's row does not depend on other rows, and it has the same bits every time.
    """
    _check(x, table)
    x = unit_rows(x)
    (M, K), N = x.shape, y.shape[1]
    cfg = config or default_config(M, 8 * x.itemsize, experts)
    h, c = (torch.empty(slots.numel(), capacity, dtype=torch.float32, device=x.device) for _ in range(2))
    tiles = triton.cdiv(M, cfg.BLOCK_M)
    pieces = min(_PIECES, triton.cdiv(capacity, cfg.BLOCK_R))
    columns = slots.view(M, -1)
    order = torch.argsort(columns[:, -1], stable=True)
    for column in columns.T[:-1].flip(0):  # by the first column, then by the second, and so on
        order = order[torch.argsort(column[order], stable=True)]
    entries = order if strengths is None else torch.argsort(slots.view(-1), stable=True)
    levels, dynamic = all_levels(x.device), dynamic_table(x.device)
    routes = Routes(arena, table, experts, order, entries, slots, strengths, columns.shape[1], levels, dynamic)
    routed = {"routes": routes, "slot_count": len(table) * (experts or 1), "M": M, "capacity": capacity}
    along = {"K": K, "stride_xm": x.stride(0), "pieces": pieces}
    shrink_grid = triton.cdiv(slots.numel(), cfg.BLOCK_M), pieces
    launch(_routed_shrink_kernel, shrink_grid, x.device, cfg, x_ptr=x, h_ptr=h, **along, **routed)
    grid = triton.cdiv(slots.numel(), _CORE_TILE.BLOCK_M), pieces
    launch(_routed_core_kernel, grid, x.device, _CORE_TILE, h_ptr=h, c_ptr=c, pieces=pieces, **routed)
    launch(_routed_expand_kernel, (tiles, triton.cdiv(N, cfg.BLOCK_N)), x.device, cfg, c_ptr=c, y_ptr=y, N=N, **routed)
    return y


@functools.cache
def all_levels(device: torch.device) -> Tensor:
    """The levels of each format, in the row of its element type, 4-bit types only; float32, cached per device."""
    first = _FIRST_FORMAT.value
    formats = [format for format in FORMATS.values() if format.bits == 4]
    levels = torch.zeros(max(format.element_type for format in formats) + 1 - first, 16, device="cpu")
    for format in formats:
        levels[format.element_type - first] = torch.tensor(format.levels, device="cpu")
    return levels.to(device)


def default_config(M: int, bits: int, experts: int | None = None) -> Config:
    """Tiles for M tokens with elements of ``bits`` bits, whose experts, if any, are as in :func:`add_updates`."""
    if bits == 32:
        return Config()
    # Rows of one expert with one adapter are few; with experts a tile of 32 would spill for sm_80.
    rows = power_of_two(M, 16, 64) if experts is None else 16 if M <= 32 * experts else 64
    # With 16 rows and 64 columns of x, D would spill for sm_120 where a row of it may start at any element.
    return Config(BLOCK_M=rows, BLOCK_N=64, BLOCK_K=128 if rows == 16 else 64, BLOCK_R=32)


def _check(x: Tensor, table: Tensor) -> None:
    check_dtypes(x)
    if interpreted() and bool((table[:, _TYPES] == _BFLOAT16.value).any()):
        check_dtypes(torch.bfloat16)
