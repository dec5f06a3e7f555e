"""Running sums over tokens: Σ x xᵀ, Σ x, their number, and Σ δ xᵀ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..formats import Moment, QuantizedWeight
from ..formats.moments import fingerprint

# Rows that one product sums, in float32.
ROWS = 1024


class Sums:
    """Σ x xᵀ [K, K], Σ x [K] and the number of rows x [K]; of E experts each over its own rows.

    Numerics: the products of 1024 rows at a time are summed in float32 and added in float32 to what was summed before, so
    that after B such products |error| ≤ (1024 + B) · 2⁻²⁴ · Σ |x xᵀ|, element by element, to first order. Σ x is
    summed in float64.
    """

    def __init__(self, width: int, experts: int, device: torch.device) -> None:
        stack = (experts,) if experts else ()
        self.second = torch.zeros(*stack, width, width, dtype=torch.float32, device=device)
        self.mean = torch.zeros(*stack, width, dtype=torch.float64, device=device)
        self.count = torch.zeros(stack, dtype=torch.int64, device="cpu")

    def add(self, x: Tensor, offsets: Tensor | None = None) -> None:
        """Add the rows x [P, K]; of experts, the rows offsets[e] … offsets[e + 1] − 1 to expert e."""
        if offsets is None:
            self._add(x, self.second, self.mean)
            self.count += len(x)
            return
        bounds = offsets.tolist()
        for e, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if end > begin:
                self._add(x[begin:end], self.second[e], self.mean[e])
                self.count[e] += end - begin

    def _add(self, x: Tensor, second: Tensor, mean: Tensor) -> None:
        with exact():
            for rows in x.detach().split(ROWS):
                rows = rows.to(second.device, torch.float32)
                second.addmm_(rows.T, rows)
                mean += rows.sum(0, dtype=torch.float64)

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """E[x xᵀ] and E[x] in float32 on the CPU, zero without rows, and the count; the sums are given up."""
        second, self.second = self.second, self.second[:0]
        count = self.count.clamp(min=1)
        second /= count.to(second.device)[..., None, None]
        mean = (self.mean / count.to(second.device).unsqueeze(-1)).float()
        return second.cpu(), mean.cpu(), self.count

    def copy(self) -> Sums:
        made = object.__new__(Sums)
        made.second, made.mean, made.count = self.second.clone(), self.mean.clone(), self.count.clone()
        return made


class GradientSum:
    """Σ δ xᵀ, the gradient of W [N, K], or of a stack [E, N, K], in float32."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)

    def add(self, delta: Tensor, x: Tensor, offsets: Tensor | None = None) -> None:
        """Add δᵀ x of the rows δ [P, N] and x [P, K]."""
        if offsets is None:
            self._add(delta, x, self.total)
            return
        bounds = offsets.tolist()
        for e, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            self._add(delta[begin:end], x[begin:end], self.total[e])

    def _add(self, delta: Tensor, x: Tensor, total: Tensor) -> None:
        with exact():
            for d, rows in zip(delta.detach().split(ROWS), x.detach().split(ROWS), strict=True):
                total.addmm_(d.to(total.device, torch.float32).T, rows.to(total.device, torch.float32))


@contextmanager
def exact() -> Iterator[None]:
    """Products of float32 are computed in float32, whatever precision is set; autocast leaves products in place alone."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def moment(
    parts: tuple[Tensor, Tensor, Tensor], weight: QuantizedWeight | Tensor, gradient: Tensor | None = None
) -> Moment:
    """A moment from what :meth:`Sums.means` gives."""
    return Moment(*parts, shape=tuple(weight.shape), fingerprint=fingerprint(weight), gradient=gradient)
