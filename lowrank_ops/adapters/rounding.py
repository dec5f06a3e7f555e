"""How W becomes the base that a layer keeps: rounded to 4 bits by what is known of the layer's inputs, with a frozen
low-rank branch for a part of what is lost."""

from __future__ import annotations

import heapq
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import WEIGHTS, Curvature, Moment, QuantizedWeight, check_quantize, curvature
from ..functional import LowRankUpdate
from ..svd.store import stack_key, weight_key
from ..svd.weighted import weighted_low_rank, weighted_norm

Matrix = Tensor | QuantizedWeight


@dataclass(frozen=True)
class Loss:
    """What 4 bits lose of a layer's outputs over the calibration's tokens, as shares of ‖W H^½‖_F.

    Attributes:
        rounding: ‖(W − W₄) H^½‖_F of W rounded alone.
        left: the same of W − W₄ − U_b D_b; equal to ``rounding`` without a branch.
        gains: by how much each rank of the branch lowers the square, largest first.
    """

    rounding: float
    left: float
    gains: tuple[float, ...] = ()


class Base(NamedTuple):
    """What a layer keeps in place of W: a matrix and the branch beside it, and what is lost if it was measured."""

    weight: Matrix
    branch: LowRankUpdate | None = None
    loss: Loss | None = None

    def dense(self) -> Tensor:
        """W + U_b D_b in float32."""
        weight = self.weight
        dense = weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()
        return dense if self.branch is None else dense + self.branch.delta()

    def key(self) -> str:
        """What identifies the numbers: the :func:`weight_key` of W, or of W and the factors of the branch together."""
        own = weight_key(self.weight if isinstance(self.weight, QuantizedWeight) else self.weight.detach())
        if self.branch is None:
            return own
        factors = [f for f in (self.branch.down, self.branch.up) if isinstance(f, Tensor)]
        return stack_key([own, *map(weight_key, factors)])


@dataclass(frozen=True, eq=False)
class RoundingPlan:
    """A format with its options, the moments of a layer's inputs, and the rank of the branch.

    Args:
        format: ``"nf4"``, ``"fp4"`` or ``"mxfp4"``.
        options: further arguments of the format's ``quantize``.
        moment: of the layer, of a matrix or a stack; None rounds to nearest.
        rank: of the branch; 0 for none. It needs a moment.
        turns: how often W less the branch is rounded again and the branch fitted again. The best of all turns is kept.
    """

    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    moment: Moment | None = None
    rank: int = 0
    turns: int = 0

    def keep(self, weight: Tensor) -> Base:
        """Round W [N, K] or [E, N, K]; the branch minimises ‖(W − W₄ − U_b D_b) H^½‖_F.

        Numerics: the branch is fitted as :func:`weighted_low_rank` does, then rounded to bfloat16, or float16 if W is that.
        """
        kind: Any = WEIGHTS[self.format]
        if self.moment is None:
            return Base(kind.quantize(weight, **self.options))
        if weight.dim() == 3:
            return join_bases([r.keep(w) for r, w in zip(self.of_experts(len(weight)), weight, strict=True)])
        return self._keep(weight, self.moment.second)

    def of_experts(self, count: int) -> list[RoundingPlan]:
        """The rounding of each matrix of a stack."""
        if self.moment is None:
            return [self] * count
        moment = self.moment.shrunk()
        return [replace(self, moment=moment[e]) for e in range(count)]

    def _keep(self, weight: Tensor, second: Tensor) -> Base:
        kind: Any = WEIGHTS[self.format]
        H, w = second.to(weight.device), weight.float()
        if not H.diagonal().any():  # nothing that is lost shows
            return Base(
                kind.quantize(weight, **self.options), self._no_branch(weight), Loss(0.0, 0.0, (0.0,) * self.rank)
            )
        ready = _ready(second, weight.device)
        whole = float(weighted_norm(w, H)) or 1.0
        best: Base | None = None
        target = weight
        for _ in range(1 + (self.turns if self.rank else 0)):
            rounded: QuantizedWeight = kind.quantize(target, second_moment=ready, **self.options)
            rounded.dtype = weight.dtype
            lost = w - rounded.dequantize(torch.float32)
            before = float(weighted_norm(lost, H)) / whole
            if not self.rank:
                return Base(rounded, None, Loss(math.sqrt(before), math.sqrt(before)))
            down, up = weighted_low_rank(lost, H, self.rank)
            branch = LowRankUpdate(down.to(_dtype_beside(weight)), up.to(_dtype_beside(weight)))
            rest = lost - branch.delta()
            left = math.sqrt(float(weighted_norm(rest, H)) / whole)
            if best is not None and best.loss is not None and left >= best.loss.left:
                break
            alone = math.sqrt(before) if best is None or best.loss is None else best.loss.rounding
            best = Base(rounded, branch, Loss(alone, left, _gains(lost, branch, H, whole)))
            target = w - branch.delta()
        assert best is not None
        return best

    def _no_branch(self, weight: Tensor) -> LowRankUpdate | None:
        N, K = weight.shape
        options: Any = {"dtype": _dtype_beside(weight), "device": weight.device}
        R = self.rank
        return LowRankUpdate(torch.zeros(R, K, **options), torch.zeros(N, R, **options)) if R else None


# The last second moment that was made ready: layers that share an input come one after the other.
_LAST: list[tuple[weakref.ref[Tensor], torch.device, Curvature]] = []


def _ready(second: Tensor, device: torch.device) -> Curvature:
    for known, where, made in _LAST:
        if known() is second and where == device:
            return made
    made = curvature(second.to(device))
    _LAST[:] = [(weakref.ref(second), device, made)]
    return made


def _dtype_beside(weight: Tensor) -> torch.dtype:
    return torch.float16 if weight.dtype == torch.float16 else torch.bfloat16


def rounding_of(quantize: str | RoundingPlan | None) -> RoundingPlan | None:
    """The rounding that a name of a format means; None keeps W dense."""
    if isinstance(quantize, RoundingPlan):
        return quantize
    check_quantize(quantize)
    return None if quantize is None else RoundingPlan(quantize)


def keep_base(weight: Matrix, quantize: str | RoundingPlan | None, branch: LowRankUpdate | None = None) -> Base:
    """The base that a layer keeps: W in 4 bits with its branch, or a dense W rounded; for None W itself, contiguous."""
    if isinstance(weight, QuantizedWeight):
        return Base(weight, branch)
    rounding = rounding_of(quantize)
    return Base(weight.contiguous()) if rounding is None else rounding.keep(weight)


def keep_weight(weight: Matrix, quantize: str | RoundingPlan | None) -> Matrix:
    """The weight of :func:`keep_base` alone."""
    return keep_base(weight, quantize).weight


def join_bases(bases: list[Base]) -> Base:
    """Join the bases of the matrices of a stack."""
    weights = [base.weight for base in bases]
    first = weights[0]
    weight = type(first).stack(weights) if isinstance(first, QuantizedWeight) else torch.stack(weights)  # type: ignore[arg-type]
    branches = [base.branch for base in bases if base.branch is not None]
    branch = None
    if branches:
        down, up = ([getattr(b, name) for b in branches] for name in ("down", "up"))
        branch = LowRankUpdate(torch.stack(down), torch.stack(up))
    losses = [base.loss for base in bases if base.loss is not None]
    return Base(weight, branch, _join_losses(losses) if losses else None)


def split_branch(branch: LowRankUpdate | None, count: int) -> list[LowRankUpdate | None]:
    """The branch of each matrix of a stack."""
    if branch is None:
        return [None] * count
    down, up = branch.down, branch.up
    return [LowRankUpdate(down[e], up[e]) for e in range(count)]


def _join_losses(losses: list[Loss]) -> Loss:
    """The mean of the squares over experts."""

    def root(name: str) -> float:
        return math.sqrt(sum(getattr(loss, name) ** 2 for loss in losses) / len(losses))

    gains = tuple(sum(of_rank) / len(losses) for of_rank in zip(*(loss.gains for loss in losses), strict=True))
    return Loss(root("rounding"), root("left"), gains)


def _gains(lost: Tensor, branch: LowRankUpdate, H: Tensor, whole: float) -> tuple[float, ...]:
    """‖E H^½‖² − ‖(E − u d) H^½‖² of each rank alone, whose parts are orthogonal up to rounding."""
    down, up = (f.float() for f in (branch.down, branch.up) if isinstance(f, Tensor))
    through = down @ H  # dᵀ H
    cross = (up * (lost @ through.mT)).sum(0, dtype=torch.float64)
    own = up.square().sum(0, dtype=torch.float64) * (through * down).sum(1, dtype=torch.float64)
    return tuple(((2 * cross - own) / whole).clamp(min=0).tolist())


# ---- a budget of bytes


class Share(NamedTuple):
    """One layer in :func:`share_out`: what each rank gains, and what each costs in bytes."""

    gains: tuple[float, ...]
    cost: int


def share_out(shares: Mapping[str, Share], budget: int) -> dict[str, int]:
    """The rank of each layer: ranks are taken by falling gain per byte as long as the next one fits the budget.

    A layer's ranks are taken in their order; a layer may get none.
    """
    ranks = dict.fromkeys(shares, 0)
    heap = [(-share.gains[0] / share.cost, name) for name, share in shares.items() if share.gains]
    heapq.heapify(heap)
    while heap:
        gain, name = heapq.heappop(heap)
        share = shares[name]
        if gain >= 0 or share.cost > budget:
            continue  # smaller layers may still fit
        budget -= share.cost
        ranks[name] += 1
        if ranks[name] < len(share.gains):
            heapq.heappush(heap, (-share.gains[ranks[name]] / share.cost, name))
    return ranks
