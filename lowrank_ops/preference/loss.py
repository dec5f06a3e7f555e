"""The Bradley–Terry loss of pairs of rewards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..formats import FLOAT_DTYPES
from ..ops._plan import forced


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float | None = None,
    labels: Tensor | None = None,
    center: float = 0.0,
) -> Tensor:
    """loss = mean over pairs of −y log σ(d) − (1 − y) log σ(−d) + center · (c + r)², d = c − r − margin; in one op.

    With the defaults it is −mean log σ(c − r − margin), the loss of TRL's RewardTrainer; ``center`` is the trainer's
    ``center_rewards_coefficient``.

    Args:
        chosen, rejected: rewards c and r, of the same shape with n >= 1 elements; float32, bfloat16 or float16; on a
            CPU also float64.
        margin: how far c should exceed r: a tensor of n elements, or one number.
        labels: y in [0, 1], n elements: the probability that ``chosen`` is better; ½ is a tie, and 0 means the two are
            swapped. None means 1.
        center: weight of the penalty (c + r)², >= 0.

    Returns:
        a scalar, float32 (float64 for float64). Gradients flow to chosen and rejected.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit; there is no pair; margin or labels require a
            gradient or, on a CPU, hold an invalid number. On a GPU, where the check would make the host wait, invalid
            labels and margins make the loss NaN.

    Numerics: softplus(−|d|) + |d| · (the label's share of the less likely side), in float32 after widening c and r, so
    that no gap overflows; a reward that is not finite makes the loss not finite. The order of the sum depends on n
    alone.

    Source: Bradley and Terry (1952); margin: arXiv 2307.09288; centring: arXiv 2312.09244.
    """
    for name, rewards in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(rewards, Tensor):
            raise TypeError(f"{name} must be a Tensor of rewards, got {type(rewards).__name__}")
        _check_dense(name, rewards)
    if chosen.shape != rejected.shape or chosen.device != rejected.device:
        raise ValueError(
            f"chosen and rejected must have one shape and device, got {list(chosen.shape)} on {chosen.device} and "
            f"{list(rejected.shape)} on {rejected.device}"
        )
    if not chosen.numel():
        raise ValueError(f"chosen and rejected must hold at least one pair, got {list(chosen.shape)}")
    dtype = torch.promote_types(chosen.dtype, rejected.dtype)
    wide = chosen.device.type == "cpu" and forced() != "triton" or forced() == "reference"
    if dtype not in (*FLOAT_DTYPES, torch.float64)[: None if wide else -1]:
        raise TypeError(
            f"chosen and rejected must be float32, bfloat16 or float16{', or float64' if wide else ''}, got {dtype}"
        )
    if not (isinstance(center, int | float) and math.isfinite(center) and center >= 0):
        raise ValueError(f"center must be a number of at least 0, got {center!r}")
    chosen, rejected = _flat(chosen, dtype), _flat(rejected, dtype)
    if isinstance(margin, int | float):
        margin = torch.full_like(chosen, margin, dtype=torch.promote_types(dtype, torch.float32))
    margin, labels = _data("margin", margin, chosen), _data("labels", labels, chosen)
    loss: Tensor = torch.ops.lowrank_ops.bradley_terry_loss.default(chosen, rejected, margin, labels, float(center))
    # The kernel returns NaN for invalid input, so a finite loss shows that the input was valid.
    if loss.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(loss.item()):
        _refuse("margin", margin, "be finite")
        _refuse("labels", labels, "be in [0, 1]")
    return loss


def _check_dense(name: str, values: Tensor) -> None:
    if values.layout is not torch.strided or values.is_nested or values.is_quantized:
        what = "a nested tensor" if values.is_nested else f"layout {values.layout} of {values.dtype}"
        raise TypeError(f"{name} must be a dense tensor of plain numbers, got {what}")


def _data(name: str, values: Any, rewards: Tensor) -> Tensor | None:
    if values is None:
        return None
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a Tensor of {rewards.numel()} numbers or None, got {type(values).__name__}")
    _check_dense(name, values)
    if values.numel() != rewards.numel():
        raise ValueError(f"{name} must hold {rewards.numel()} numbers, one for each pair, got {list(values.shape)}")
    if values.device != rewards.device:
        raise ValueError(f"{name} is on {values.device} and chosen on {rewards.device}; move one of them")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient here, but has requires_grad=True; detach it")
    return _flat(values, torch.promote_types(rewards.dtype, torch.float32))


def _flat(values: Tensor, dtype: torch.dtype) -> Tensor:
    # Skip no-op conversions: each costs as much as the kernel.
    values = values if values.dtype == dtype else values.to(dtype)
    return values if values.dim() == 1 else values.reshape(-1)


def _refuse(name: str, values: Tensor | None, must: str) -> None:
    if values is None:
        return
    bad = ~torch.isfinite(values) if name == "margin" else ~((values >= 0) & (values <= 1))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} must {must}, got {values[at].item()} for pair {at}")
