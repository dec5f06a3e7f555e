"""DoRA: y = m / ‖W + s · U D‖ ⊙ (W x + s · U (D x)), without making the matrix in the norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..formats import QuantizedWeight
from ..functional import LowRankUpdate
from ..svd.decompose import transposed_times

# A float32 product of K numbers errs by about this much of the product of the lengths.
_ROUNDING = 2.0**-20
# The relative error that a length may have; rows that could have a larger one are computed from W's own numbers.
_TOLERANCE = 2.0**-17
_ROWS = 64  # decoded at a time


def squared_rows(weight: QuantizedWeight | Tensor, branch: LowRankUpdate | None = None) -> Tensor:
    """‖W + U_b D_b‖² by rows, float64 [N]."""
    dense = weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.detach()
    if branch is not None:
        dense = dense.float() + branch.delta()
    return torch.cat([rows.double().square().sum(1) for rows in dense.split(256)])


def row_norms(
    weight: QuantizedWeight | Tensor,
    update: LowRankUpdate,
    squares: Tensor | None = None,
    branch: LowRankUpdate | None = None,
) -> Tensor:
    """‖W + s · U D‖ by rows, float32 [N]: the root of ‖W‖² + 2 s · Σ_r U[n, r] (W Dᵀ)[n, r] + s² · (U D Dᵀ Uᵀ)[n, n].

    Args:
        weight: W [N, K].
        update: s · U D with dense factors.
        squares: :func:`squared_rows` of W, if known.
        branch: U_b D_b, which then counts as a part of W.

    Numerics: W Dᵀ is a product of W in float32 with R tokens; everything else is in float64. Its error of
    about 2⁻²⁰ ‖W_n‖ ‖D_r‖ makes a relative one of e = 2⁻²⁰ s ‖W_n‖ Σ_r |U[n, r]| ‖D_r‖ / ‖W_n + s U_n D‖², which is large
    where the two parts cancel. Rows with e above 2⁻¹⁷ are decoded, 64 at a time, and added up in float64; while torch
    compiles they are not, since their number depends on the data. Nothing carries gradients.
    """
    assert isinstance(update.down, Tensor) and isinstance(update.up, Tensor)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        down, up, s = update.down.detach(), update.up.detach().double(), float(update.scale)
        squares = squared_rows(weight, branch) if squares is None else squares
        through = functional.adapted_linear(down.float().contiguous(), weight, branch=branch).double()
        gram = down.double() @ down.double().T
        mixed = squares + 2 * s * (up * through.T).sum(1) + s * s * ((up @ gram) * up).sum(1)
        if not torch.compiler.is_compiling():
            bound = abs(s) * squares.sqrt() * (up.abs() @ gram.diagonal().clamp(min=0).sqrt())
            cancelled = (_ROUNDING * bound > _TOLERANCE * mixed).nonzero().flatten()
            for rows in cancelled.split(_ROWS) if len(cancelled) else ():
                exact = _decoded(weight, rows).double() + s * (up[rows] @ down.double())
                if branch is not None:
                    assert isinstance(branch.up, Tensor) and isinstance(branch.down, Tensor)
                    exact += branch.up[rows].double() @ branch.down.double()
                mixed[rows] = exact.square().sum(1)
        return mixed.clamp(min=0).sqrt().float()


def _decoded(weight: QuantizedWeight | Tensor, rows: Tensor) -> Tensor:
    """Rows of W."""
    if isinstance(weight, Tensor):
        return weight[rows]
    unit = torch.zeros(len(rows), weight.shape[0], dtype=torch.float32, device=rows.device)
    return transposed_times(weight, unit.scatter_(1, rows.unsqueeze(1), 1.0))


def scale_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g = m / ‖W + s · U D‖ [N]; 1 where the row is 0, whatever m is."""
    known = norms > 0
    return torch.where(known, magnitude / torch.where(known, norms, 1.0), 1.0)


def scaled_linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    update: LowRankUpdate,
    scale: Tensor | None,
    bias: Tensor | None,
    branch: LowRankUpdate | None = None,
) -> Tensor:
    """y = g ⊙ (W x + s · U (D x)) + bias; with dropout, x' = drop(x), W (x − x') + g ⊙ (W x' + s · U (D x')) + bias.

    Args:
        scale: g [N] float32; None means an update that is not scaled.
        branch: U_b D_b, which counts as a part of W.

    Numerics: W x + s · U (D x) is rounded to the dtype of x as the op does; scaling and bias are in float32, rounded once.
    """
    if scale is None:
        return functional.adapted_linear(x, weight, update, bias, branch=branch)
    if not update.dropout:
        y, added = functional.adapted_linear(x, weight, update, branch=branch), bias
    else:
        kept = torch.nn.functional.dropout(x, update.dropout)
        y = functional.adapted_linear(kept, weight, replace(update, dropout=0.0), branch=branch)
        added = functional.adapted_linear(x - kept, weight, None, bias, branch=branch)
    scaled = y * scale
    return (scaled if added is None else scaled + added).to(y.dtype)


class RowNorms:
    """The :func:`row_norms` of a layer; what does not change between two calls is kept, and not copied with the layer."""

    def __init__(self) -> None:
        self._weight: list[tuple[Any, int, int]] = []
        self._squares: Tensor | None = None
        self._kept: tuple[list[tuple[Any, int, int]], Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RowNorms, ()

    def measure(self, weight: QuantizedWeight | Tensor, branch: LowRankUpdate | None = None) -> None:
        """Compute ‖W + U_b D_b‖² by rows now."""
        self._weight, self._squares, self._kept = _state(weight, *_factors(branch)), squared_rows(weight, branch), None

    def forget(self) -> None:
        """Drop what is kept of the factors."""
        self._kept = None

    def of(
        self,
        weight: QuantizedWeight | Tensor,
        update: LowRankUpdate,
        keep: bool,
        branch: LowRankUpdate | None = None,
    ) -> Tensor:
        """The norms.

        Args:
            keep: whether they are kept until a factor or W is replaced or written; training writes at every step.
        """
        if torch.compiler.is_compiling():  # a compiled graph cannot ask whether W was written
            return row_norms(weight, update, self._squares, branch)
        if not _is_same(self._weight, _state(weight, *_factors(branch))):
            self.measure(weight, branch)
        state = _state(update.down, update.up)
        # Tensors of inference mode do not tell that they were written.
        keep = keep and not any(tensor.is_inference() for tensor, *_ in state)
        if keep and self._kept is not None and _is_same(self._kept[0], state):
            return self._kept[1]
        norms = row_norms(weight, update, self._squares, branch)
        self._kept = (state, norms) if keep else None
        return norms


def is_at_hand(weight: QuantizedWeight | Tensor) -> bool:
    """Whether the numbers of W can be read now: they are in memory, and not sharded over processes."""
    if isinstance(weight, QuantizedWeight):
        return weight.keeper is None and weight.device.type != "meta"
    return not weight.is_meta and not hasattr(weight, "full_tensor")  # a DTensor


def _factors(update: LowRankUpdate | None) -> tuple[QuantizedWeight | Tensor, ...]:
    return () if update is None else (update.down, update.up)


def _state(*matrices: QuantizedWeight | Tensor) -> list[tuple[Any, int, int]]:
    """What changes when matrices are replaced, written or moved."""
    held = [m for m in matrices if isinstance(m, QuantizedWeight)]
    tensors = [t for m in matrices for t in (m.buffers() if isinstance(m, QuantizedWeight) else [m])]
    return [(m, 0, 0) for m in held] + [(t, t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _is_same(before: list[tuple[Any, int, int]], now: list[tuple[Any, int, int]]) -> bool:
    return len(before) == len(now) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, now, strict=True))
