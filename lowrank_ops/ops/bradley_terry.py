"""The loss of Bradley and Terry and its backward as registered ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _cpu, _plan
from ._operands import contiguous, h_dtype
from ._register import differentiate_twice, register, register_autograd

_PAIRS = "Tensor chosen, Tensor rejected, Tensor? margin, Tensor? labels, float center"


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float
) -> Tensor:
    chosen, rejected = chosen.contiguous(), rejected.contiguous()
    margin, labels = contiguous(margin), contiguous(labels)
    by = _plan.plan_preference(chosen.device.type, _plan.forced()).implementation
    if by == "reference":
        return reference.bradley_terry_loss(chosen, rejected, margin, labels, center)
    run = _cpu.bradley_terry_loss if by == "cpp" else _plan.launchers("preference").forward
    return run(chosen, rejected, margin, labels, center)


def bradley_terry_loss_backward(
    g: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float
) -> tuple[Tensor, Tensor]:
    chosen, rejected = chosen.contiguous(), rejected.contiguous()
    margin, labels = contiguous(margin), contiguous(labels)
    by = _plan.plan_preference(chosen.device.type, _plan.forced()).implementation
    if by == "reference":
        return reference.bradley_terry_loss_backward(g, chosen, rejected, margin, labels, center)
    run = _cpu.bradley_terry_loss_backward if by == "cpp" else _plan.launchers("preference").backward
    return run(g, chosen, rejected, margin, labels, center)


def _bradley_terry_loss_fake(chosen: Tensor, *arguments: Any) -> Tensor:
    return chosen.new_empty((), dtype=h_dtype(chosen))


def _bradley_terry_loss_backward_fake(g: Tensor, chosen: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return chosen.new_empty(chosen.shape), chosen.new_empty(chosen.shape)


def _save_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.center = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_pairs(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    made = torch.ops.lowrank_ops.bradley_terry_loss_backward.default(g, *ctx.saved_tensors, ctx.center)
    grads = (grad if need else None for grad, need in zip(made, ctx.needs_input_grad[1:3], strict=True))
    return *grads, None, None, None


register("bradley_terry_loss", f"({_PAIRS}) -> Tensor", bradley_terry_loss, _bradley_terry_loss_fake)
register(
    "bradley_terry_loss_backward",
    f"(Tensor g, {_PAIRS}) -> (Tensor dchosen, Tensor drejected)",
    bradley_terry_loss_backward,
    _bradley_terry_loss_backward_fake,
)
register_autograd("bradley_terry_loss", _save_pairs, _differentiate_pairs)
register_autograd("bradley_terry_loss_backward", lambda ctx, inputs, output: None, differentiate_twice)
