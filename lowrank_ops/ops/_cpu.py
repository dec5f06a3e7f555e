"""The compiled module _C behind tensors: it takes only raw pointers, sizes and strides.

This module trusts its caller: lowrank_ops.ops has checked shapes, dtypes and devices. Arguments go in the order of
csrc/bindings.cpp, because matching them by name would take a good part of a small call's time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..kernels.operands import Branch, Core, Format, Matrix
from ._operands import ELEMENT_TYPES, core_fields

# torch is imported first, so that _C finds torch's OpenMP runtime already loaded and shares its thread pool.
_module: ModuleType | None = None
_error: ImportError | None = None
try:
    _module = importlib.import_module("lowrank_ops._C")
except ImportError as error:
    _error = error

FORMS = {"few": 0, "many": 1}
FLOAT32_ONLY = ("avx512_vnni", "avx512", "avx_vnni", "avx2")  # instruction sets without products of bfloat16


def module() -> ModuleType:
    """The compiled module; without it, a RuntimeError that tells how to get it."""
    if _module is None:
        raise RuntimeError(
            "the compiled module lowrank_ops._C is missing or does not load, and this path needs it: build it with "
            f"`pip install .` in the repository (it takes a C++20 compiler), or install a wheel. Import said: {_error}"
        )
    return _module


def isa() -> str:
    """The instruction set of the CPU kernels; "" without them."""
    return "" if _module is None else str(_module.isa())


def has_bfloat16() -> bool:
    """Tell whether the processor multiplies bfloat16, by the instruction set in use; where not, torch's bfloat16
    products take up to hundreds of times as long as those of float32."""
    return isa() not in FLOAT32_ONLY


def import_error() -> ImportError | None:
    """The error that importing _C raised, or None."""
    return _error


def has_cuda(device: torch.device) -> bool:
    """Tell whether this is a CUDA device and the module has kernels for it."""
    return device.type == "cuda" and _module is not None and bool(_module.cuda_targets())


def _ptr(tensor: Tensor | None, name: str = "an operand") -> int:
    """The address of a tensor's memory, 0 for None.

    Raises:
        ValueError: its memory was freed, as FSDP does with parameters that are not in use.
    """
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"{name} must have memory for its shape {list(tensor.shape)}, but its storage was freed")
    return address


def _dtype(tensor: Tensor | None) -> int:
    return 0 if tensor is None else ELEMENT_TYPES[tensor.dtype]


def index_fault(index: Tensor, R: int, entries: int) -> str:
    """What is wrong with the index of a sparse core, "" if nothing is. Memory of a GPU is not looked at, because the host
    would have to wait; without this module plain PyTorch runs, which checks every position itself."""
    return "" if _module is None or not index.is_cpu else module().index_fault(index.data_ptr(), R, entries)


def arena_fault(arena: Tensor, table: Tensor, slots: Tensor, N: int, K: int, E: int) -> str:
    """What is wrong with slots and the rows of the table that they name; as :func:`index_fault`."""
    if _module is None or not arena.is_cpu:
        return ""
    return module().arena_fault(
        _ptr(arena, "arena"),
        arena.numel(),
        _ptr(table, "table"),
        len(table),
        _ptr(slots, "slots"),
        slots.numel(),
        N,
        K,
        E,
    )


def quantize(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    w = w.contiguous()
    packed = w.new_empty(format.bytes_of(w.numel()), dtype=torch.uint8)
    scales = w.new_empty(-(-w.numel() // block_size), dtype=torch.uint8 if format.exponents else torch.float32)
    module().quantize(
        format.element_type, _ptr(w, "w"), ELEMENT_TYPES[w.dtype], w.numel(), block_size, _ptr(packed, "packed"),
        scales.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return packed, scales


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack, on a CPU into huge pages if the system has them, because every forward will read the bytes."""
    stacked = torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
    if _module is not None and stacked.is_cpu and type(stacked) is Tensor:
        module().prefer_huge_pages(stacked.data_ptr(), stacked.nbytes)
    return torch.stack(list(tensors), out=stacked)


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    absmax = absmax.contiguous()
    index = absmax.new_empty(absmax.numel(), dtype=torch.uint8)
    absmax2 = absmax.new_empty(-(-absmax.numel() // 256))
    module().absmax_quantize(
        _ptr(absmax, "absmax"), _ptr(offset, "offset"), absmax.numel(), index.data_ptr(), absmax2.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return index, absmax2


def dequantize(
    format: Format, packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, out: Tensor,
    block_size: int,
) -> Tensor:  # fmt: skip
    arguments = (
        format.element_type, _ptr(packed, "packed"), _ptr(absmax, "absmax"), _ptr(absmax2), _ptr(offset), out.numel(),
        block_size, out.data_ptr(), ELEMENT_TYPES[out.dtype],
    )  # fmt: skip
    if out.is_cuda:
        with torch.cuda.device(out.device):
            module().dequantize_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        module().dequantize(*arguments, torch.get_num_threads())
    return out


_ABSENT = (0, 0, 0, 0, 0, 0)


def _matrix(matrix: Matrix | None) -> tuple[int, ...]:
    """The matrix as csrc/bindings.cpp takes it: address, element type, absmax, absmax2, offset, block size."""
    if matrix is None:
        return _ABSENT
    data, scales, block_size, format = matrix
    if format is None:
        return (_ptr(data, "a weight or factor"), ELEMENT_TYPES[data.dtype], 0, 0, 0, 0)
    absmax2, offset = (
        (_ptr(scales[1], "the scales of a weight"), _ptr(scales[2], "the scales of a weight"))
        if len(scales) == 3
        else (0, 0)
    )
    return (
        _ptr(data, "a weight or factor"),
        format.element_type,
        _ptr(scales[0], "the scales of a weight"),
        absmax2,
        offset,
        block_size,
    )


def search_scales(format: Format, w: Tensor, importance: Tensor, block_size: int) -> Tensor:
    (N, K), importance = w.shape, importance.contiguous()
    scales = w.new_empty(-(-w.numel() // block_size), dtype=torch.uint8 if format.exponents else torch.float32)
    module().search_scales(
        format.element_type, _ptr(w, "w"), N, K, _ptr(importance, "importance"), block_size, scales.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return scales


def round_nearest(w: Tensor, matrix: Matrix) -> Matrix:
    matrix = matrix._replace(data=torch.empty_like(matrix.data))
    module().round_nearest(_ptr(w, "w"), w.numel(), _matrix(matrix), torch.get_num_threads())
    return matrix


def weighted_errors(w: Tensor, matrix: Matrix, factor: Tensor, order: Tensor) -> Tensor:
    N, K = w.shape
    errors, work = w.new_empty(N, dtype=torch.float64), w.new_empty(K, K + 3)
    factor, order = factor.contiguous(), order.int()
    module().weighted_errors(
        N, K, _ptr(w, "w"), _matrix(matrix), _ptr(factor, "factor"), _ptr(order, "order"), work.data_ptr(),
        errors.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return errors


def round_weighted(
    w: Tensor, matrix: Matrix, before: Tensor, moment: Tensor, factor: Tensor, order: Tensor, choose: bool, passes: int
) -> tuple[Matrix, Tensor]:
    N, K = w.shape
    errors, work = before.repeat(3, 1), w.new_empty(2, K, K + 3)
    moment, factor, order = moment.contiguous(), factor.contiguous(), order.int()
    matrix = matrix._replace(data=matrix.data.clone(), scales=(matrix.scales[0].clone(), *matrix.scales[1:]))
    module().round_weighted(
        N, K, _ptr(w, "w"), _matrix(matrix), _ptr(moment, "moment"), _ptr(factor, "factor"), _ptr(order, "order"),
        int(choose), passes, work.data_ptr(), errors.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return matrix, errors


def _core(core: Core | None, rank: int) -> tuple[int, ...]:
    """The core as csrc/bindings.cpp takes it: address, element type, kind, entries, bandwidth, address of the index."""
    return _ABSENT if core is None else (_ptr(core[0], "core"), *core_fields(core, rank), _ptr(core[1]))


def _branch(branch: Branch | None) -> tuple[int, ...] | None:
    """The branch as csrc/bindings.cpp takes it: rank, address and element type of each factor."""
    if branch is None:
        return None
    down, up = branch
    return up.shape[-1], _ptr(down, "branch"), ELEMENT_TYPES[down.dtype], _ptr(up, "branch"), ELEMENT_TYPES[up.dtype]


def adapted_linear(
    x: Tensor, weight: Matrix, out_features: int, rank: int, down: Matrix | None, up: Matrix | None,
    core: Core | None, bias: Tensor | None, scale: float, dropout: float, seed: Tensor | None, form: str,
    branch: Branch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    M, K = x.shape
    y, h = x.new_empty(M, out_features), x.new_empty(M, rank, dtype=torch.float32)
    module().adapted_linear(
        FORMS[form], M, out_features, K, rank,
        _ptr(x, "x"), ELEMENT_TYPES[x.dtype], x.stride(0),
        _matrix(weight), _branch(branch), _matrix(down), _matrix(up), _core(core, rank),
        _ptr(bias, "bias"), _dtype(bias),
        scale, dropout, 0 if seed is None else int(seed),
        y.data_ptr(), h.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, h


# The updates of tokens: an arena, its table, the slots, and their strengths or None.
Updates = tuple[Tensor, Tensor, Tensor, Tensor | None]


def bind_adapted_linear(
    in_features: int, scale: float, branch: Branch | None, weight: Matrix, out_features: int, rank: int,
    down: Matrix | None, up: Matrix | None, core: Core | None, bias: Tensor | None,
) -> Callable[..., Tensor]:  # fmt: skip
    """run(x, M, form, updates=None) -> y: adapted_linear of a contiguous x without dropout, with the operands' addresses
    read once; or routed_linear, without the factors.

    The caller must keep the operands at their addresses as long as it calls.
    """
    W, B, D, U, C, b = (
        _matrix(weight),
        _branch(branch),
        _matrix(down),
        _matrix(up),
        _core(core, rank),
        _ptr(bias, "bias"),
    )
    b_dtype = _dtype(bias)

    def run(x: Tensor, M: int, form: str, updates: Updates | None = None) -> Tensor:
        dtype, at = x.dtype, x.data_ptr()
        if not at:  # empty calls come by another path
            _ptr(x, "x")
        y = x.new_empty(M, out_features)
        if updates is not None:
            arena, table, slots, strengths = updates
            module().routed_linear(
                FORMS[form], 0, M, out_features, in_features, 1, 0,
                at, ELEMENT_TYPES[dtype], in_features, W, B, b, b_dtype,
                _ptr(arena, "arena"), _ptr(table, "table"), 1 if slots.dim() == 1 else slots.shape[1], _ptr(slots, "slots"),
                _ptr(strengths, "strengths"), y.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            return y
        # A dtype by name takes longer than the allocation.
        h = x.new_empty(M, rank) if dtype is torch.float32 else x.new_empty(M, rank, dtype=torch.float32)
        module().adapted_linear(
            FORMS[form], M, out_features, in_features, rank,
            at, ELEMENT_TYPES[dtype], in_features, W, B, D, U, C, b, b_dtype, scale, 0.0, 0,
            y.data_ptr(), h.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y

    return run


def adapted_linear_backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Matrix, in_features: int, rank: int, down: Matrix | None,
    up: Matrix | None, core: Core | None, scale: float, dropout: float, seed: Tensor | None, form: str, need_x: bool,
    need_down: bool, need_up: bool, need_core: bool, branch: Branch | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    # `form` is accepted so that all launchers share a signature; one form of the backward serves every M here.
    M, N = g.shape
    dx = g.new_empty(M, in_features) if need_x else None
    ddown = torch.empty_like(down[0]) if need_down and down is not None else None
    dup = torch.empty_like(up[0]) if need_up and up is not None else None
    dcore = torch.empty_like(core[0]) if need_core and core is not None else None
    module().adapted_linear_backward(
        M, N, in_features, rank,
        _ptr(g, "g"), ELEMENT_TYPES[g.dtype], g.stride(0),
        _ptr(x), 0 if x is None else x.stride(0), _ptr(h),
        _matrix(weight), _branch(branch), _matrix(down), _matrix(up), _core(core, rank),
        scale, dropout, 0 if seed is None else int(seed),
        _ptr(dx), _ptr(ddown), _ptr(dup), _ptr(dcore), torch.get_num_threads(),
    )  # fmt: skip
    return dx, ddown, dup, dcore


def experts_linear(
    x: Tensor, weight: Matrix, offsets: Tensor, out_features: int, rank: int, down: Matrix | None, up: Matrix | None,
    core: Core | None, bias: Tensor | None, scale: float, dropout: float, seed: Tensor | None, few: int,
    branch: Branch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    P, K = x.shape
    y, h = x.new_empty(P, out_features), x.new_empty(P, rank, dtype=torch.float32)
    module().experts_linear(
        few, P, out_features, K, rank, offsets.numel() - 1,
        _ptr(x, "x"), ELEMENT_TYPES[x.dtype], x.stride(0), _ptr(offsets, "offsets"),
        _matrix(weight), _branch(branch), _matrix(down), _matrix(up), _core_of_experts(core, rank),
        _ptr(bias, "bias"), _dtype(bias),
        scale, dropout, 0 if seed is None else int(seed),
        y.data_ptr(), h.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, h


def experts_linear_backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Matrix, offsets: Tensor, in_features: int, rank: int,
    down: Matrix | None, up: Matrix | None, core: Core | None, scale: float, dropout: float, seed: Tensor | None,
    form: str, need_x: bool, need_down: bool, need_up: bool, need_core: bool, branch: Branch | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    # `form` is accepted so that all launchers share a signature; one form of the backward serves any number of rows.
    P, N = g.shape
    dx = g.new_empty(P, in_features) if need_x else None
    ddown = torch.empty_like(down[0]) if need_down and down is not None else None
    dup = torch.empty_like(up[0]) if need_up and up is not None else None
    dcore = torch.empty_like(core[0]) if need_core and core is not None else None
    module().experts_linear_backward(
        P, N, in_features, rank, offsets.numel() - 1,
        _ptr(g, "g"), ELEMENT_TYPES[g.dtype], g.stride(0),
        _ptr(x), 0 if x is None else x.stride(0), _ptr(h), _ptr(offsets, "offsets"),
        _matrix(weight), _branch(branch), _matrix(down), _matrix(up), _core_of_experts(core, rank),
        scale, dropout, 0 if seed is None else int(seed),
        _ptr(dx), _ptr(ddown), _ptr(dup), _ptr(dcore), torch.get_num_threads(),
    )  # fmt: skip
    return dx, ddown, dup, dcore


def _core_of_experts(core: Core | None, rank: int) -> tuple[int, ...]:
    """The core of the first expert; the cores of the others follow it in memory."""
    return _core(None if core is None else Core(core.values[0], core.index), rank)


def svd_linear(
    x: Tensor, u: Matrix, core: Core, vt: Matrix, bias: Tensor | None, out_features: int, rank: int, form: str
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    y, h = x.new_empty(M, out_features), x.new_empty(M, rank)
    module().svd_linear(
        FORMS[form], M, out_features, K, rank,
        _ptr(x, "x"), ELEMENT_TYPES[x.dtype], x.stride(0),
        _matrix(u), _core(core, rank), _matrix(vt), _ptr(bias, "bias"), _dtype(bias),
        y.data_ptr(), h.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, h


def svd_linear_backward(
    g: Tensor, h: Tensor | None, u: Matrix, core: Core, vt: Matrix, in_features: int, rank: int, need_x: bool,
    need_core: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    M, N = g.shape
    dx = g.new_empty(M, in_features) if need_x else None
    dcore = torch.empty_like(core[0]) if need_core else None
    b = g.new_empty(M, rank, dtype=torch.float32)  # Uᵀ g
    module().svd_linear_backward(
        M, N, in_features, rank,
        _ptr(g, "g"), ELEMENT_TYPES[g.dtype], g.stride(0), _ptr(h),
        _matrix(u), _core(core, rank), _matrix(vt),
        b.data_ptr(), _ptr(dx), _ptr(dcore), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dcore


def routed_linear(
    x: Tensor, weight: Matrix, out_features: int, bias: Tensor | None, arena: Tensor, table: Tensor, slots: Tensor,
    form: str, offsets: Tensor | None = None, few: int = 0, branch: Branch | None = None, strengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    M, K = x.shape
    y = x.new_empty(M, out_features)
    module().routed_linear(
        FORMS[form], few, M, out_features, K, 1 if offsets is None else offsets.numel() - 1, _ptr(offsets),
        _ptr(x, "x"), ELEMENT_TYPES[x.dtype], x.stride(0), _matrix(weight), _branch(branch),
        _ptr(bias, "bias"), _dtype(bias),
        _ptr(arena, "arena"), _ptr(table, "table"), slots[:1].numel(), _ptr(slots, "slots"),
        _ptr(strengths, "strengths"), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def routed_update_cuda(
    x: Tensor, arena: Tensor, table: Tensor, slots: Tensor, y: Tensor, capacity: int, strengths: Tensor | None = None
) -> Tensor:
    """y[t] += s U C (D x[t]) with the updates of the token's slots; no rank in the table may exceed the capacity."""
    (M, K), N = x.shape, y.shape[1]
    h = torch.empty(slots.numel(), capacity, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        module().routed_update_cuda(
            M, N, K, _ptr(x, "x"), ELEMENT_TYPES[x.dtype], x.stride(0), _ptr(arena, "arena"),
            _ptr(table, "table"), len(table), slots[:1].numel(), _ptr(slots, "slots"),
            _ptr(strengths, "strengths"), h.data_ptr(), capacity,
            y.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return y


_WIDE_TYPES = {**ELEMENT_TYPES, torch.float64: 4}


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float
) -> Tensor:
    loss = chosen.new_empty((), dtype=torch.promote_types(chosen.dtype, torch.float32))
    module().bradley_terry_loss(
        chosen.numel(), _ptr(chosen, "chosen"), _ptr(rejected, "rejected"), _WIDE_TYPES[chosen.dtype],
        _ptr(margin, "margin"), _ptr(labels, "labels"), center, loss.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return loss


def bradley_terry_loss_backward(
    g: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float
) -> tuple[Tensor, Tensor]:
    dchosen, drejected = chosen.new_empty(chosen.shape), chosen.new_empty(chosen.shape)
    module().bradley_terry_loss_backward(
        chosen.numel(), _ptr(g, "g"), _ptr(chosen, "chosen"), _ptr(rejected, "rejected"),
        _WIDE_TYPES[chosen.dtype], _ptr(margin, "margin"), _ptr(labels, "labels"), center,
        dchosen.data_ptr(), drejected.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dchosen, drejected


def inverse_cholesky_cuda(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ [B, q, q] of float64 G = L Lᵀ, q <= 512, and flags [B] of failures; the host does not wait."""
    gram = gram.contiguous()
    inverse, failed = torch.empty_like(gram), torch.empty(len(gram), dtype=torch.int32, device=gram.device)
    with torch.cuda.device(gram.device):
        module().inverse_cholesky_cuda(
            gram.data_ptr(), len(gram), gram.shape[-1], inverse.data_ptr(), failed.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return inverse, failed != 0


def eigenvectors_cuda(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of float64 G [B, q, q], q <= 512, as rows, largest eigenvalue first, and flags [B] of failures."""
    gram = gram.contiguous()
    vectors, failed = torch.empty_like(gram), torch.empty(len(gram), dtype=torch.int32, device=gram.device)
    work, values = gram.new_empty(2 * gram.numel()), gram.new_empty(gram.shape[:2])
    with torch.cuda.device(gram.device):
        module().eigenvectors_cuda(
            gram.data_ptr(), len(gram), gram.shape[-1], work.data_ptr(), values.data_ptr(), vectors.data_ptr(),
            failed.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return vectors, failed != 0
