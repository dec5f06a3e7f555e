"""The loss of preferences in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, labels: Tensor | None = None, center: float = 0.0
) -> Tensor:
    """loss = mean(−y log σ(d) − (1 − y) log σ(−d) + center (c + r)²), d = c − r − margin.

    Args:
        chosen, rejected: c and r [n], n >= 1.
        margin: [n]; None means 0.
        labels: y [n] in [0, 1], the probability that c is better, ½ for a tie; None means 1. NaN outside [0, 1].

    Returns:
        a scalar in the dtype of the rewards, float32 for 16-bit ones.

    Source: Bradley and Terry (1952); margin: arXiv 2307.09288, equation 2; centring: arXiv 2312.09244, equation 2.
    """
    d, both, y = _pairs(chosen, rejected, margin, labels)
    # The first addend is 0 unless the gap is not finite; then it makes the loss NaN.
    softplus = 0.0 * d.abs() - torch.nn.functional.logsigmoid(d.abs())
    return (softplus + torch.where(d > 0, 1 - y, y) * d.abs() + center * both * both).mean()


def bradley_terry_loss_backward(
    g: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    labels: Tensor | None = None,
    center: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """dc = g/n · (2 center (c + r) + (1 − y) σ(d) − y σ(−d)), dr = g/n · (2 center (c + r) − (1 − y) σ(d) + y σ(−d)).

    Args and Returns as in :func:`bradley_terry_loss`; g is a scalar. Gradients have the dtype of the rewards.
    """
    d, both, y = _pairs(chosen, rejected, margin, labels)
    slope = (1 - y) * torch.sigmoid(d) - y * torch.sigmoid(-d) + 0.0 * d
    g, pull = g.to(d.dtype) / d.numel(), 2 * center * both
    return (g * (pull + slope)).to(chosen.dtype), (g * (pull - slope)).to(chosen.dtype)


def _pairs(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d, c + r, y in float32, or float64 where the rewards are."""
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    c, r = chosen.to(dtype), rejected.to(dtype)
    d = c - r if margin is None else c - r - margin.to(dtype)
    y = torch.ones_like(d) if labels is None else labels.to(dtype)
    return d, c + r, torch.where((y >= 0) & (y <= 1), y, torch.nan)
