"""The loss of Bradley and Terry and its backward as registered ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from . import _cpu, _plan
from ._operands import contiguous, wide_dtype
from ._register import register, register_autograd

_PAIRS = (
    "Tensor chosen[n]:floating, Tensor rejected[n]:chosen, Tensor? margin[n]:wide, Tensor? labels[n]:wide, float center"
)


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float
) -> Tensor:
    """The mean over the pairs, a scalar."""
    operands = (chosen.contiguous(), rejected.contiguous(), contiguous(margin), contiguous(labels), center)
    by = _plan.plan_single(chosen.device.type, _plan.forced()).implementation
    if by == "reference":
        return reference.bradley_terry_loss(*operands)
    run = _cpu.bradley_terry_loss if by == "cpp" else _plan.launchers("preference").forward
    return run(*operands)


def bradley_terry_loss_backward(
    g: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float
) -> tuple[Tensor, Tensor]:
    """(dc, dr)."""
    operands = (g, chosen.contiguous(), rejected.contiguous(), contiguous(margin), contiguous(labels), center)
    by = _plan.plan_single(chosen.device.type, _plan.forced()).implementation
    if by == "reference":
        return reference.bradley_terry_loss_backward(*operands)
    run = _cpu.bradley_terry_loss_backward if by == "cpp" else _plan.launchers("preference").backward
    return run(*operands)


def _fake(chosen: Tensor, **_: Any) -> Tensor:
    return chosen.new_empty((), dtype=wide_dtype(chosen))


def _backward_fake(chosen: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return chosen.new_empty(chosen.shape), chosen.new_empty(chosen.shape)


register("bradley_terry_loss", f"({_PAIRS}) -> Tensor", bradley_terry_loss, _fake)
register(
    "bradley_terry_loss_backward",
    f"(Tensor g:wide, {_PAIRS}) -> (Tensor dchosen, Tensor drejected)",
    bradley_terry_loss_backward,
    _backward_fake,
)
register_autograd("bradley_terry_loss")
