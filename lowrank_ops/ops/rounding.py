"""Rounding by a second moment: compiled on a CPU, in plain PyTorch elsewhere. lowrank_ops.reference has the equations."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..kernels.operands import Format, Matrix
from . import _cpu, _plan


def search_scales(format: Format, w: Tensor, importance: Tensor, block_size: int) -> Tensor:
    run = _cpu if _compiled(w) else reference
    return run.search_scales(format, w, importance, block_size)


def round_nearest(w: Tensor, matrix: Matrix) -> Matrix:
    return (_cpu if _compiled(w) else reference).round_nearest(w, matrix)


def weighted_errors(w: Tensor, matrix: Matrix, factor: Tensor, order: Tensor) -> Tensor:
    """E H Eᵀ of every row of a rounded W, float64 [N]."""
    if _compiled(w):
        return _cpu.weighted_errors(w, matrix, factor, order)
    return reference.weighted_errors(w - reference.dequantize_matrix(matrix, w), factor, order)


def round_weighted(
    w: Tensor, matrix: Matrix, before: Tensor, moment: Tensor, factor: Tensor, order: Tensor, choose: bool, passes: int
) -> tuple[Matrix, Tensor]:
    run = _cpu if _compiled(w) else reference
    return run.round_weighted(w, matrix, before, moment, factor, order, choose, passes)


def _compiled(w: Tensor) -> bool:
    return _plan.choose_nf4(w.device) == "cpp"
