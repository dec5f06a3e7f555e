"""Checks of the operands of :mod:`lowrank_ops.functional`: each raises, or gives the operand as its op takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cores
from .cores import Core
from .formats import FLOAT_DTYPES, QuantizedWeight
from .kernels import operands
from .kernels.operands import Matrix
from .ops import _plan


def take_x(x: Tensor) -> tuple[Tensor, tuple[torch.dtype, ...]]:
    """Cast x for the op, and tell which dtypes the operands may have."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor [..., K], got {type(x).__name__}")
    check_dense("x", x)
    x = cast_input(x)
    dtypes = allowed_dtypes()
    check_dtype("x", x, dtypes)
    return x.resolve_neg(), dtypes


def cast_input(x: Tensor) -> Tensor:
    """Cast x to autocast's dtype if autocast is on."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype in FLOAT_DTYPES:
        return x.to(torch.get_autocast_dtype(device))
    return x


def allowed_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that operands may have: the reference also computes in float64, the kernels do not."""
    return (*FLOAT_DTYPES, torch.float64) if _plan.forced() == "reference" else FLOAT_DTYPES


def check_x(x: Tensor, K: int, of: str) -> None:
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., K={K}] for {of}, got {list(x.shape)}")


def flatten_rows(x: Tensor) -> Tensor:
    """View x as [M, K]; a view that changes nothing would cost as much as all the checks, so it is skipped."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def unflatten_rows(x: Tensor, y: Tensor) -> Tensor:
    """Give y [M, N] the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def materialize(tensor: Tensor) -> Tensor:
    """Copy the tensor unless it is contiguous without lazy negation (``is_neg``): kernels read memory as it is."""
    return tensor.contiguous().resolve_neg()


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    check_dense(name, tensor)


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        what = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"{name} must be a dense tensor, got {what}")


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them")


def check_matrix(name: str, matrix: Any, shape: str) -> None:
    """Raise unless this is a matrix, or a stack of matrices where the shape begins with E."""
    stack = shape[1] == "E"
    if isinstance(matrix, QuantizedWeight):
        if bool(matrix.experts) != stack:
            raise ValueError(f"{name} must be {shape}, got {list(matrix.shape)}")
        return
    if not isinstance(matrix, Tensor):
        raise TypeError(
            f"{name} must be a Tensor {shape} or a 4-bit weight such as NF4Weight, got {type(matrix).__name__}"
        )
    check_dense(name, matrix)
    if matrix.dim() != 2 + stack or not matrix.numel():
        raise ValueError(f"{name} must be a non-empty {shape}, got {list(matrix.shape)}")


def check_core(core: Any, rank: int, experts: int = 0) -> None:
    if not isinstance(core, Core):
        raise TypeError(f"core must be one of lowrank_ops.cores, got {type(core).__name__}")
    if core.size != rank:
        raise ValueError(f"core must be {rank} x {rank} for factors of rank {rank}, got {core.size} x {core.size}")
    if core.experts != experts:
        need = f"a leading {experts}, one for each expert" if experts else "no leading dimension"
        raise ValueError(f"the values of core must have {need}, got {list(core.values.shape)}")


def take_matrix(
    name: str, matrix: Tensor | QuantizedWeight | None, x: Tensor, dtypes: tuple[torch.dtype, ...], frozen: bool = False
) -> Matrix | None:
    if matrix is None:
        return None
    if isinstance(matrix, QuantizedWeight):
        operand = matrix.operand()
        check_device(name, operand[0], x)
        return operand
    check_dtype(name, matrix, dtypes)
    check_device(name, matrix, x)
    if frozen and not matrix.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {list(matrix.stride())}; call {name}.contiguous() once"
        )
    if frozen and matrix.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} is frozen here and gets no gradient, but has requires_grad=True; detach it")
    return Matrix(materialize(matrix))


def take_core(name: str, core: Core | None, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> operands.Core | None:
    if core is None:
        return None
    check_dtype(name, core.values, dtypes)
    check_device(name, core.values, x)
    if isinstance(core, cores.Sparse):
        check_device(f"{name}.index", core.index, x)
    return operands.Core(materialize(core.values), core.index)


def take_bias(bias: Any, shape: tuple[int, ...], x: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a Tensor [N] or None, got {type(bias).__name__}")
    check_dtype("bias", bias, dtypes)
    if bias.shape != shape:
        raise ValueError(f"bias must be {list(shape)}, got {list(bias.shape)}")
    check_device("bias", bias, x)
    if len(shape) == 2 and bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("the bias of experts is frozen and gets no gradient, but has requires_grad=True; detach it")
    return materialize(bias)


def check_offsets(offsets: Any, experts: int, x: Tensor) -> None:
    """Raise unless offsets is int32 [E + 1] on the device of x; the op looks at its values."""
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be an int32 Tensor, got {getattr(offsets, 'dtype', type(offsets).__name__)}")
    check_dense("offsets", offsets)
    if offsets.shape != (experts + 1,):
        raise ValueError(f"offsets must be [{experts + 1}] for {experts} experts, got {list(offsets.shape)}")
    check_device("offsets", offsets, x)


def check_slots(slots: Any, rows: int, count: int, device: torch.device, strengths: Tensor | None = None) -> None:
    """Raise unless slots is integers [rows] in [-1, count) on the device; with finite strengths [rows, S] the same."""
    if not isinstance(slots, Tensor) or slots.is_floating_point() or slots.is_complex() or slots.dtype == torch.bool:
        raise TypeError(f"slots must be a Tensor of integers, got {getattr(slots, 'dtype', type(slots).__name__)}")
    check_dense("slots", slots)
    if strengths is None and slots.shape != (rows,):
        raise ValueError(f"slots must be [{rows}], one for every row of x, got {list(slots.shape)}")
    if slots.device != device:
        raise ValueError(f"slots is on {slots.device} and x on {device}; move one of them")
    if strengths is not None:
        if not isinstance(strengths, Tensor) or not strengths.is_floating_point():
            got = getattr(strengths, "dtype", type(strengths).__name__)
            raise TypeError(f"strengths must be a Tensor of floats, got {got}")
        check_dense("strengths", strengths)
        if slots.dim() != 2 or len(slots) != rows or not slots.shape[1]:
            raise ValueError(f"slots must be [{rows}, S], S slots for every row of x, got {list(slots.shape)}")
        if strengths.shape != slots.shape or strengths.device != device:
            raise ValueError(
                f"strengths must be {list(slots.shape)} on {device}, got {list(strengths.shape)} on {strengths.device}"
            )
        if not bool(torch.isfinite(strengths).all()):
            raise ValueError("strengths must be finite, got NaN or infinity in it")
    if rows and not (-1 <= int(slots.min()) and int(slots.max()) < count):
        raise ValueError(f"slots must be in [-1, {count}), got {int(slots.min())} to {int(slots.max())}")
