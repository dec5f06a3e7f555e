"""bradley_terry_loss and its backward, against the same formula in plain torch. N is the number of pairs, K is 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_ops.preference import bradley_terry_loss

from ..common import Provider
from ..report import Report

OPS = ("bradley_terry_loss", "bradley_terry_loss_backward")
DTYPE = torch.float32


def run(report: Report) -> None:
    for n, _ in report.settings.shapes((64, 1), (1 << 20, 1)):
        c, r, margin = (torch.randn(n, device=report.settings.device, dtype=DTYPE) for _ in range(3))
        for op in OPS:
            if op not in report.settings.ops:
                continue
            backward = op.endswith("backward")
            moved = (5 if backward else 3) * c.nbytes
            providers = {
                name: Provider([partial(_step, loss, c, r, margin, backward)], moved)
                for name, loss in (("ours", bradley_terry_loss), ("torch", _plain))
            }
            # The backward row times a whole step: the loss and both gradients.
            report.case(op, (n, 1), 0, DTYPE, providers)


def _plain(c: Tensor, r: Tensor, margin: Tensor, labels: None, center: float) -> Tensor:
    return -nn.functional.logsigmoid(c - r - margin).mean() + center * ((c + r) ** 2).mean()


def _step(loss: Callable[..., Tensor], c: Tensor, r: Tensor, margin: Tensor, backward: bool) -> object:
    c, r = c.detach().requires_grad_(backward), r.detach().requires_grad_(backward)
    value = loss(c, r, margin, None, 0.01)
    return torch.autograd.grad(value, (c, r)) if backward else value


SECTIONS = {110: run}
