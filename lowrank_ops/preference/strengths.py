"""Strengths of items from a table of wins: the maximum likelihood of a random-utility model, by Newton's method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Distribution of each item's noise; the difference of two noises gives the probability to win.
NOISES = ("gumbel", "gaussian")


def log_win_probability(gap: Tensor, noise: str) -> tuple[Tensor, Tensor, Tensor]:
    """log F(gap) and its first and second derivatives. F is σ for "gumbel" noise and Φ for "gaussian".

    Raises:
        ValueError: noise is unknown.
    """
    if noise == "gumbel":
        return torch.nn.functional.logsigmoid(gap), torch.sigmoid(-gap), -torch.sigmoid(gap) * torch.sigmoid(-gap)
    if noise == "gaussian":
        log = torch.special.log_ndtr(gap)
        slope = torch.exp(-0.5 * gap * gap - 0.5 * math.log(2 * math.pi) - log)
        return log, slope, -slope * (gap + slope)
    raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")


def win_probability(gap: Tensor, noise: str = "gumbel") -> Tensor:
    """P(first preferred) = F(gap) of a random-utility model: σ(gap) for "gumbel" noise, Φ(gap) for "gaussian".

    Args:
        gap: the first strength minus the second, any float dtype and shape.
        noise: of each item's utility; its scale is the unit of strengths (Gumbel of scale 1; Gaussian of variance ½).

    Raises:
        ValueError: noise is unknown.
        TypeError: gap is not a tensor of floats.
    """
    if not isinstance(gap, Tensor) or not gap.is_floating_point():
        raise TypeError(f"gap must be a Tensor of floats, got {getattr(gap, 'dtype', type(gap).__name__)}")
    return log_win_probability(gap, noise)[0].exp()


@dataclass(frozen=True, eq=False)
class Strengths:
    """The result of :func:`lowrank_ops.preference.fit_bradley_terry`.

    Attributes:
        strengths: float64 [n], mean 0.
        standard_errors: float64 [n], of the strengths with their mean fixed at 0.
        covariance: float64 [n, n], of the strengths; rows sum to 0.
        log_likelihood: of the table (without the prior).
        iterations: Newton steps.
        noise: the noise of the fit.
    """

    strengths: Tensor
    standard_errors: Tensor
    covariance: Tensor
    log_likelihood: float
    iterations: int
    noise: str

    def probability(self, i: int, j: int) -> float:
        """The fitted probability that item i beats item j."""
        gap = self.strengths[i] - self.strengths[j]
        return float(log_win_probability(gap, self.noise)[0].exp())

    def gap(self, i: int, j: int) -> tuple[float, float]:
        """strength[i] − strength[j], and the standard error of this difference."""
        c = self.covariance
        variance = float(c[i, i] + c[j, j] - 2 * c[i, j])
        return float(self.strengths[i] - self.strengths[j]), math.sqrt(max(0.0, variance))


def fit_bradley_terry(
    wins: Any, prior: float | None = None, *, noise: str = "gumbel", max_iterations: int = 100
) -> Strengths:
    """s = argmax Σ_ij wins[i, j] log F(s_i − s_j) − Σ_i s_i² / (2 prior²), with mean s = 0: strengths of items.

    Args:
        wins: [n, n], how often i beat j; a tie is ½ for both. Any array of finite numbers of at least 0, diagonal 0.
        prior: standard deviation of a Gaussian prior of every strength; None uses no prior: maximum likelihood.
        noise: "gumbel" for Bradley–Terry, F = σ; "gaussian" for Thurstone's case V, F = Φ.
        max_iterations: Newton steps.

    Returns:
        :class:`Strengths`. The standard errors come from the inverse of the observed information of strengths whose
            mean is fixed at 0.

    Raises:
        TypeError, ValueError: wins is not such a table. Without a prior: the wins are not strongly connected (some
            items never lost to the others), so that no finite maximum exists; the message names the items.
        RuntimeError: no convergence, which rounding may cause at gaps larger than usual tables have.

    Numerics: float64. The negative log-likelihood is strictly convex in the gaps for either noise (both densities are
    log-concave), so Newton's steps with a line search converge from any start; n up to a few thousand.

    Source: Bradley and Terry (1952); existence: Ford (1957); Thurstone (1927).
    """
    table = _table(wins)
    log_win_probability(torch.zeros((), dtype=torch.float64), noise)
    if prior is not None and not (isinstance(prior, int | float) and math.isfinite(prior) and prior > 0):
        raise ValueError(f"prior must be None or a standard deviation above 0, got {prior!r}")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations must be an integer of at least 1, got {max_iterations!r}")
    if prior is None:
        _check_connected(table)
    n = len(table)
    precision = 0.0 if prior is None else 1 / prior**2
    seen = table > 0

    def objective(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gaps = s[:, None] - s
        return torch.where(seen, gaps, 0.0), s, 0.5 * precision * (s * s).sum()

    def value(s: Tensor) -> Tensor:
        gaps, _, penalty = objective(s)
        return penalty - (table * log_win_probability(gaps, noise)[0]).sum()

    def curvature(s: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian."""
        gaps, _, _ = objective(s)
        _, first, second = log_win_probability(gaps, noise)
        pull, weight = table * first, -(table * second)
        weight = weight + weight.T
        return precision * s - pull.sum(1) + pull.sum(0), torch.diag(weight.sum(1) + precision) - weight

    # Adding a constant to all strengths changes nothing: make that direction stiff, which leaves the others unchanged.
    ones = torch.full((n, n), 1 / n, dtype=torch.float64)
    s = torch.zeros(n, dtype=torch.float64)
    for iteration in range(1, max_iterations + 1):
        gradient, hessian = curvature(s)
        step = -torch.linalg.solve(hessian + hessian.trace() / n * ones, gradient)
        step -= step.mean()
        last = bool(step.abs().max() <= 1e-9 * (1 + s.abs().max()))
        before, slope, length = value(s), float(gradient @ step), 1.0
        # The slack allows for the rounding of a sum of this size.
        while not last and not value(s + length * step) <= before + 1e-4 * length * slope + 1e-14 * before.abs():
            length /= 2
            if length < 1e-9:
                raise RuntimeError(f"the fit stopped improving after {iteration} steps, short of its optimum")
        s = s + length * step
        if last:
            break
    else:
        raise RuntimeError(f"the fit has not converged in {max_iterations} steps")
    _, hessian = curvature(s)
    stiff = hessian.trace() / n
    covariance = torch.linalg.inv(hessian + stiff * ones) - ones / (stiff + precision)
    log_likelihood = (table * log_win_probability(objective(s)[0], noise)[0]).sum()
    errors = covariance.diagonal().clamp(min=0).sqrt()
    return Strengths(s - s.mean(), errors, covariance, float(log_likelihood), iteration, noise)


def _table(wins: Any) -> Tensor:
    try:
        table = torch.as_tensor(wins).detach().to_dense().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"wins must be a table [n, n] of numbers: {error}") from error
    if table.dim() != 2 or table.shape[0] != table.shape[1] or len(table) < 2:
        raise ValueError(f"wins must be [n, n] with n >= 2, got {list(table.shape)}")
    for what, bad in (("be finite and not negative", ~(torch.isfinite(table) & (table >= 0))),):
        if bad.any():
            i, j = bad.nonzero()[0].tolist()
            raise ValueError(f"wins must {what}, got wins[{i}, {j}] = {table[i, j].item()}")
    if table.diagonal().any():
        i = int(table.diagonal().nonzero()[0])
        raise ValueError(f"wins[{i}, {i}] = {table[i, i].item()}: an item cannot beat itself; the diagonal must be 0")
    return table


def _reach(beats: Tensor) -> Tensor:
    """Mark the items that a chain of wins reaches from item 0."""
    reached = torch.zeros(len(beats), dtype=torch.bool)
    reached[0] = True
    new = reached.clone()
    while new.any():
        new = beats[new].any(0) & ~reached
        reached |= new
    return reached


def _check_connected(table: Tensor) -> None:
    beats = table > 0
    for graph, lost in ((beats, False), (beats.T, True)):
        reached = _reach(graph)
        if reached.all():
            continue
        # No edge leaves `reached` in this graph: its items never beat the others, or never lost to them.
        over, under = (reached, ~reached) if lost else (~reached, reached)
        if not (beats[over][:, under].any()):
            raise ValueError(
                f"wins does not compare items {_list(over)} with items {_list(under)}, so their strengths have no common "
                "scale; add comparisons between them, or give a prior"
            )
        raise ValueError(
            f"wins is not strongly connected: items {_list(over)} never lost to items {_list(under)}, so their gap has "
            "no finite estimate; add comparisons, or give a prior"
        )


def _list(items: Tensor) -> str:
    listed = items.nonzero().flatten().tolist()
    return ", ".join(map(str, listed[:5])) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
