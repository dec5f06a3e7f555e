"""Fit sums of power laws in log space: a robust objective, its derivatives, and its minimum from many starts at once.

    f(θ) = Σ_i w_i Huber_δ(r_i)      r_i = ln Σ_j exp((X_j θ_j)_i) − y_i

Each term of the sum is linear in its own part of θ. Tensors are float64; a leading dimension S runs over starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_TOGETHER = 256  # starts in a pass, so that their residuals and Jacobians fit into the cache


class Problem(NamedTuple):
    """The data of a fit.

    Args:
        designs: one X_j [n, k_j] for each term; its first column is 1.
        target: y [n].
        delta: δ, where a residual's cost turns from square to linear.
    """

    designs: Sequence[Tensor]
    target: Tensor
    delta: float

    def slices(self) -> list[slice]:
        """The slice of θ that belongs to each term."""
        ends = [0]
        for X in self.designs:
            ends.append(ends[-1] + X.shape[1])
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


class Derivatives(NamedTuple):
    """f [S], its gradient [S, k], its Hessian H [S, k, k] or None, and G = Jᵀ diag(w min(1, δ/|r|)) J, semidefinite."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor | None
    gauss_newton: Tensor


def objective(problem: Problem, theta: Tensor, weights: Tensor | None = None) -> Tensor:
    """f(θ) [S], for θ [S, k] and weights [S, n] (default 1)."""
    return _cost(torch.logsumexp(_terms(problem, theta), 0) - problem.target, problem.delta, weights)


def derivatives(problem: Problem, theta: Tensor, weights: Tensor | None = None, *, newton: bool = True) -> Derivatives:
    """Compute f and its analytic derivatives; H only if ``newton`` is set.

        ∂r/∂θ_j = p_j X_j    ∂²r/∂θ_j∂θ_k = [j = k] X_jᵀ diag(p_j) X_j − (∂r/∂θ_j)ᵀ (∂r/∂θ_k)    p = softmax of the terms

    The Hessian takes Huber's second derivative as 1 where |r| <= δ and 0 elsewhere.
    """
    delta = problem.delta
    terms = _terms(problem, theta)
    highest = terms.amax(0)
    shares = (terms - highest).exp_()
    total = shares.sum(0)
    shares /= total  # [terms, S, n]
    residual = total.log_() + highest - problem.target
    slope = residual.clamp(-delta, delta)
    bound = delta / residual.abs().clamp(min=delta)
    if weights is not None:
        slope, bound = slope * weights, bound * weights
    curvature = None
    if newton:
        inner = (residual.abs() <= delta).to(theta.dtype)
        curvature = (inner if weights is None else inner * weights) - slope
    S, k = theta.shape
    gradient = torch.empty_like(theta)
    gauss_newton, hessian = theta.new_empty(S, k, k), theta.new_empty(S, k, k) if newton else None
    parts = list(zip(problem.designs, shares, problem.slices(), strict=True))
    for i, (X, p, part) in enumerate(parts):
        gradient[:, part] = (slope * p) @ X
        for Y, q, other in parts[: i + 1]:
            outer = (X.unsqueeze(2) * Y.unsqueeze(1)).flatten(1)
            shape, both = (S, X.shape[1], Y.shape[1]), p * q
            _fill(gauss_newton, part, other, ((both * bound) @ outer).view(shape))
            if hessian is not None and curvature is not None:
                own = slope * p if part == other else 0
                _fill(hessian, part, other, ((both * curvature + own) @ outer).view(shape))
    return Derivatives(_cost(residual, delta, weights), gradient, hessian, gauss_newton)


def _fill(matrix: Tensor, rows: slice, columns: slice, block: Tensor) -> None:
    matrix[:, rows, columns] = block
    matrix[:, columns, rows] = block.transpose(1, 2)


def minimise(
    problem: Problem,
    starts: Tensor,
    weights: Tensor | None = None,
    *,
    newton: bool,
    steps: int,
    tolerance: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """Minimise from every start by damped steps, each taken only if it lowers f.

        (G + λ (G + 1e-3 diag G + ε max(diag G) I)) Δ = −∇f        with newton: H for the first G

    λ falls by a factor of 5 after a step that lowered f and grows by 4 after one that did not. ε holds parts of θ on
    which f does not depend yet. Without H the steps cross the flat, bent valleys of this f; with H they converge to the
    minimum.

    Args:
        starts: θ [S, k].
        weights: [S, n] >= 0, separate weights for every start; default 1.
        steps: limit of steps for each start.
        tolerance: a start ends when the next step would lower f by less than this fraction of f.

    Returns:
        θ [S, k] and f [S]. The caller must judge from f which of them are true minima.
    """
    centred, centres = _centre(problem)
    found = torch.empty_like(starts)
    value = starts.new_empty(len(starts))
    for begin in range(0, len(starts), _TOGETHER):
        part = slice(begin, begin + _TOGETHER)
        mine = None if weights is None else weights[part]
        theta = _shift(problem, starts[part], centres, 1)
        theta, value[part] = _descend(centred, theta, mine, newton, steps, tolerance)
        found[part] = _shift(problem, theta, centres, -1)
    return found, value


def _descend(
    problem: Problem, theta: Tensor, weights: Tensor | None, newton: bool, steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    theta = theta.clone()
    value = objective(problem, theta, weights)
    damping = torch.ones_like(value)
    live = torch.arange(len(theta))
    floor = 1e-2 if newton else 1e-6
    identity = torch.eye(theta.shape[1], dtype=theta.dtype)
    for _ in range(steps):
        here, mine = theta[live], None if weights is None else weights[live]
        now, gradient, hessian, bound = derivatives(problem, here, mine, newton=newton)
        diagonal = bound.diagonal(dim1=1, dim2=2)
        scale = 1e-3 * diagonal + floor * diagonal.amax(1, keepdim=True) + 1e-300
        factor = damping[live]
        damped = (bound if hessian is None else hessian) + factor.view(-1, 1, 1) * (bound + torch.diag_embed(scale))
        root, info = torch.linalg.cholesky_ex(damped)
        solved = info == 0
        root[~solved] = identity
        step = -torch.cholesky_solve(gradient.unsqueeze(2), root).squeeze(2)
        there = objective(problem, here + step, mine)
        better = solved & (there < now)  # false for NaN
        theta[live] = torch.where(better.unsqueeze(1), here + step, here)
        value[live] = torch.where(better, there, now)
        damping[live] = torch.where(better, factor * 0.2, factor * 4).clamp(1e-9, 1e12)
        promised = -(gradient * step).sum(1)
        live = live[~((solved & (promised <= tolerance * now)) | (factor > 1e11))]
        if not len(live):
            break
    return theta, value


def _terms(problem: Problem, theta: Tensor) -> Tensor:
    """The logarithms of the terms [terms, S, n]."""
    return torch.stack([theta[:, p] @ X.T for X, p in zip(problem.designs, problem.slices(), strict=True)])


def _cost(residual: Tensor, delta: float, weights: Tensor | None) -> Tensor:
    size = residual.abs()
    square = size.clamp(max=delta)
    cost = square * (size - square / 2)
    return (cost if weights is None else cost * weights).sum(1)


def _centre(problem: Problem) -> tuple[Problem, list[Tensor]]:
    """Subtract the columns' means, which a term's first coefficient absorbs; this improves the condition."""
    centres = [X[:, 1:].mean(0) for X in problem.designs]
    designs = [torch.cat([X[:, :1], X[:, 1:] - c], 1) for X, c in zip(problem.designs, centres, strict=True)]
    return problem._replace(designs=designs), centres


def _shift(problem: Problem, theta: Tensor, centres: Sequence[Tensor], sign: int) -> Tensor:
    theta = theta.clone()
    for part, centre in zip(problem.slices(), centres, strict=True):
        theta[:, part.start] += sign * (theta[:, part.start + 1 : part.stop] @ centre)
    return theta
