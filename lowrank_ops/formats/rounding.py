"""Rounding that looks at data: a weight in 4 bits whose error matters least for the inputs of its layer.

docs/quantization.md has the method with its formulas; :mod:`lowrank_ops.reference` has each step in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.operands import Format, Matrix
from ..ops import rounding

ORDERS = ("diagonal", "columns")
SCALES = ("absmax", "search")
# Columns whose second moment is below this part of the mean are rounded to nearest.
_DEAD = 1e-7
# Relative to the largest number of H: more than float32 leaves of a sum of products.
_ASYMMETRY = 1e-4
_MOST_DAMPING = 1.0
_PASSES = 2


@dataclass(frozen=True)
class Rounding:
    """How a weight was rounded; the attribute ``rounding`` of a weight that ``quantize(second_moment=)`` made.

    Attributes:
        damping: the part of the mean of H's diagonal that was added to the diagonal; larger than what was asked for if
            H was not positive definite with that.
        searched, fed_back, final: tr(E H̃ Eᵀ) after each step, as a part of what plain rounding gives; H̃ is H with
            damping. The steps: scales searched, errors fed back, codes and scales chosen again.
    """

    damping: float
    searched: float
    fed_back: float
    final: float


@dataclass(frozen=True)
class Curvature:
    """A second moment made ready for rounding, for layers that share an input; :func:`curvature` makes it.

    Attributes:
        moment: H̃ [K, K], float32: H divided by a power of two near the mean of its diagonal, damped; dead columns have
            no products with others.
        factor: R [K, K], float32, upper triangular: R Rᵀ = H̃[order][:, order].
        order: int64 [K], the order in which the columns are rounded.
        damping: what was added to the diagonal, as a part of its mean.
    """

    moment: Tensor
    factor: Tensor
    order: Tensor
    damping: float


def check_options(scales: Any, order: Any, damping: Any) -> None:
    """Raise ValueError for an unknown choice of scales or order, or a damping outside (0, 1]."""
    if scales not in (None, *SCALES):
        raise ValueError(f"scales must be {' or '.join(map(repr, SCALES))}, got {scales!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be {' or '.join(map(repr, ORDERS))}, got {order!r}")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping <= _MOST_DAMPING:
        raise ValueError(f"damping must be a number above 0 and at most {_MOST_DAMPING:g}, got {damping!r}")


def check_moment(second_moment: Any, weight: Tensor) -> None:
    """Raise unless this is None or a second moment [K, K], or [E, K, K], of the inputs of this weight."""
    if second_moment is None:
        return
    if isinstance(second_moment, Curvature):
        second_moment, stacked = second_moment.moment, False
    else:
        stacked = weight.dim() == 3 and isinstance(second_moment, Tensor) and second_moment.dim() == 3
    if not isinstance(second_moment, Tensor):
        raise TypeError(f"second_moment must be a Tensor [K, K], got {type(second_moment).__name__}")
    if second_moment.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"second_moment must be float32 or float64, got {second_moment.dtype}")
    if second_moment.layout is not torch.strided:
        raise ValueError(f"second_moment must be a dense tensor, got layout {second_moment.layout}")
    K = weight.shape[-1]
    need = (weight.shape[0], K, K) if stacked else (K, K)
    if tuple(second_moment.shape) != need:
        raise ValueError(
            f"second_moment of a weight {list(weight.shape)} must be {list(need)}, got {list(second_moment.shape)}"
        )
    if second_moment.device != weight.device:
        raise ValueError(f"second_moment is on {second_moment.device} and weight on {weight.device}; move one of them")


def curvature(
    second_moment: Tensor, order: str = "diagonal", damping: float = 0.1, name: str = "second_moment"
) -> Curvature:
    """H̃ = H + damping · mean(diag H) · I and its factor R, R Rᵀ = H̃ with rows and columns in the order of rounding.

    Args:
        second_moment: H = E[x xᵀ] [K, K], float32 or float64.
        order: "diagonal" takes columns by falling H_kk (the first of equal ones first), "columns" as they are.
        damping: above 0, at most 1. While H̃ is not positive definite it is doubled.
        name: of H in messages.

    Raises:
        ValueError: H is not finite, not symmetric, has a negative number on its diagonal or only zeros there, or is not
            positive definite even with a damping of 1.

    Numerics: the factor is computed in float64 and rounded to float32. A positive factor of H that is a power of two
    does not change a bit of the result.
    """
    check_options(None, order, damping)
    H = second_moment.detach()
    diagonal = H.diagonal()
    if not torch.isfinite(H).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    if diagonal.min() < 0:
        raise ValueError(f"{name} must have no negative number on its diagonal, got {float(diagonal.min()):g}")
    mean = float(diagonal.double().mean())
    if mean == 0:
        raise ValueError(f"{name} must not be zero: no input was seen")
    asymmetry = float((H - H.T).abs().max())
    if asymmetry > _ASYMMETRY * float(H.abs().max()):
        raise ValueError(f"{name} must be symmetric, but differs from its transpose by up to {asymmetry:g}")
    H = H.double() * 2.0 ** -math.frexp(mean)[1]
    H = (H + H.T).mul_(0.5)
    diagonal = H.diagonal().clone()
    mean = float(diagonal.mean())
    dead = (diagonal < _DEAD * mean).nonzero().flatten()
    H[dead] = 0
    H[:, dead] = 0
    if order == "diagonal":
        sequence = diagonal.argsort(descending=True, stable=True)
    else:
        sequence = torch.arange(len(diagonal), device=H.device)
    backwards = sequence.flip(0)
    while True:
        H.diagonal().copy_(diagonal + damping * mean)
        # R is the Cholesky factor with rows and columns the other way round.
        lower, failed = torch.linalg.cholesky_ex(H[backwards.unsqueeze(1), backwards])
        if not failed:
            return Curvature(H.float(), lower.float().flip(0, 1).contiguous(), sequence, damping)
        if damping == _MOST_DAMPING:
            raise ValueError(f"{name} must be positive semidefinite: it is not, even with a damping of {damping:g}")
        damping = min(2 * damping, _MOST_DAMPING)


def curvatures(second_moment: Any, weight: Tensor, order: str, damping: float) -> Iterator[Curvature | None]:
    """The curvature of each expert of a stack, or of one weight; None without a second moment."""
    experts = weight.shape[0] if weight.dim() == 3 else 1
    if second_moment is not None and not isinstance(second_moment, Curvature) and second_moment.dim() == 2:
        second_moment = curvature(second_moment, order, damping)
    for expert in range(experts):
        if isinstance(second_moment, Tensor):
            yield curvature(second_moment[expert], order, damping, f"second_moment[{expert}]")
        else:
            yield second_moment


def rounded(
    w: Tensor, format: Format, block_size: int, double_quant: bool, curvature: Curvature | None, search: bool
) -> tuple[Matrix, Rounding | None]:
    """W [N, K] in 4 bits, and how it was rounded.

    The scales come first and are double-quantised at once, so that the codes are chosen for the scales that are stored.
    """
    w = w.detach().float().contiguous()
    if not all(torch.isfinite(t) for t in torch.aminmax(w)):
        raise ValueError("weight must be finite, got NaN or infinity in it")
    packed, scales = getattr(torch.ops.lowrank_ops, f"{format.name}_quantize").default(w, block_size)
    matrix = Matrix(packed, with_second_level(format, scales, double_quant), block_size, format)
    plain = before = _errors(w, matrix, curvature)
    if search:
        importance = w.new_ones(w.shape[1]) if curvature is None else curvature.moment.diagonal()
        scales = with_second_level(format, rounding.search_scales(format, w, importance, block_size), double_quant)
        searched = rounding.round_nearest(w, matrix._replace(scales=scales))
        errors = _errors(w, searched, curvature)
        # The search takes the errors of different columns for independent, and double quantisation moves the scales.
        if errors.sum() <= before.sum():
            matrix, before = searched, errors
    if curvature is None:
        return matrix, None
    matrix, steps = rounding.round_weighted(
        w, matrix, before, curvature.moment, curvature.factor, curvature.order, search, _PASSES
    )
    parts = (steps.sum(dim=1) / plain.sum()).nan_to_num().tolist()
    return matrix, Rounding(curvature.damping, *parts)


def _errors(w: Tensor, matrix: Matrix, curvature: Curvature | None) -> Tensor:
    """E H̃ Eᵀ of every row of a rounded W, H̃ = I without a second moment."""
    if curvature is not None:
        return rounding.weighted_errors(w, matrix, curvature.factor, curvature.order)
    format, data, (scales, *second) = matrix.format, matrix.data, matrix.scales
    assert format is not None
    absmax2, offset = second or (None, None)
    op = getattr(torch.ops.lowrank_ops, f"{format.name}_dequantize").default
    decoded: Tensor = op(data, scales, absmax2, offset, *w.shape, matrix.block_size, torch.float32)
    return (w - decoded).square().sum(dim=1, dtype=torch.float64)


def with_second_level(format: Format, scales: Tensor, double_quant: bool) -> tuple[Tensor, ...]:
    """(scales,), or with double quantisation (absmax, absmax2, offset): 8-bit indices and their second level."""
    if format.exponents or not double_quant:
        return (scales,)
    offset = scales.mean()
    return *torch.ops.lowrank_ops.absmax_quantize.default(scales, offset), offset
