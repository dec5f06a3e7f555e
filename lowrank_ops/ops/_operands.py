"""Matrices and cores as arguments: in a schema, in groups, and as the reference takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._cpu import Core, Matrix


def matrix_schema(name: str, optional: str = "") -> str:
    scales = ", ".join(f"Tensor? {name}_{scale}" for scale in ("absmax", "absmax2", "offset"))
    return f"Tensor{optional} {name}, {scales}, int {name}_block"


def rows(x: Tensor) -> Tensor:
    """The kernels take any row stride, but unit stride within a row."""
    return x if x.stride(-1) == 1 else x.contiguous()


def h_dtype(x: Tensor) -> torch.dtype:
    """h is kept in float32, so that the update is rounded once (in float64 where the reference computes in it)."""
    return torch.promote_types(x.dtype, torch.float32)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# The arguments of the ops that have groups: a matrix "m", a core "c", and "." all else.
LAYOUTS = {
    "adapted_linear": ".m..mmc....",
    "adapted_linear_backward": "...m..mmc.......",
    "svd_linear": ".mcm...",
    "svd_linear_backward": "..mcm....",
    "routed_linear": ".m......",
}


def grouped(layout: str, arguments: Sequence[Any]) -> list[Any]:
    """Arguments in groups from those of the schema; a default at the end may be left out."""
    grouped: list[Any] = []
    take = iter(arguments)
    for letter, value in zip(layout, take, strict=False):
        if letter == "m":
            absmax, absmax2, offset, block = next(take), next(take), next(take), next(take)
            if value is not None:
                scales = () if absmax is None else (absmax,) if absmax2 is None else (absmax, absmax2, offset)
                value = value if block else value.contiguous(), scales, block
        elif letter == "c":
            index = next(take)
            value = None if value is None else (value.contiguous(), index)
        grouped.append(value)
    return grouped


def flat(layout: str, grouped: Sequence[Any]) -> list[Any]:
    """The inverse of _grouped."""
    flat: list[Any] = []
    for letter, value in zip(layout, grouped, strict=True):
        if letter == "m":
            data, scales, block = value or (None, (), 0)
            flat += [data, *scales, *[None] * (3 - len(scales)), block]
        elif letter == "c":
            flat += value or (None, None)
        else:
            flat.append(value)
    return flat


def dense(matrix: Matrix | None, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """The matrix [rows, columns] as the reference takes it."""
    if matrix is None or not matrix[2]:
        return None if matrix is None else matrix[0]
    data, scales, block = matrix
    absmax, absmax2, offset = scales if len(scales) == 3 else (scales[0], None, None)
    return reference.nf4_dequantize(data, absmax, absmax2, offset, rows, columns, block, dtype)


def core_matrix(core: Core | None, rank: int) -> Tensor | None:
    return None if core is None else reference.core_matrix(*core, rank)


def or_empty(g: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(g.new_empty(0) if grad is None else grad for grad in grads)


def zeros(needed: bool, like: tuple[Tensor, Any] | tuple[Tensor, Any, Any] | None) -> Tensor | None:
    return torch.zeros_like(like[0]) if needed and like is not None else None


def empty(needed: bool, like: tuple[Tensor, Any] | tuple[Tensor, Any, Any] | None, g: Tensor) -> Tensor:
    if not needed or like is None:
        return g.new_empty(0)
    return torch.empty_like(like[0], memory_format=torch.contiguous_format)


def bias_gradient(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(dtype)
