"""Fit laws to runs: three approaches, the bootstrap, and the uncertainty of the result."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .huber import Problem, minimise
from .laws import Array, Chinchilla, FineTuning, Frontier, Law, Runs, Value, listed

BUDGETS = 1500  # budgets of the envelope, evenly spaced in ln C


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law and its uncertainty.

    Args:
        law: the best one.
        approach: ``"parametric"``, ``"isoflop"`` or ``"envelope"``.
        runs: the runs it was fitted to.
        objective: the sum of Huber losses, or of squared deviations of ln N_opt for the other approaches.
        replicates: the same law with an array for each constant, one entry for each bootstrap sample; or None.
        starts: how many starts there were and how many reached the minimum; None for the other approaches.
        points: C and N_opt through which the other approaches draw their line, [2, m].
        notes: remarks on what was left out or could not be determined.
    """

    law: Law
    approach: str
    runs: Runs
    objective: float
    replicates: Any = None
    starts: tuple[int, int] | None = None
    points: Array | None = None
    notes: tuple[str, ...] = ()

    def interval(self, of: Callable[[Any], Value], level: float = 0.95) -> tuple[float, float]:
        """The bootstrap's percentile interval of any function of a law: ``fit.interval(lambda law: law.a)``.

        Raises:
            ValueError: level is not in (0, 1), or the fit has no replicates.
        """
        if self.replicates is None:
            raise ValueError("the fit has no replicates; fit with bootstrap=1000")
        return percentiles(self.replicates, of, level)


def percentiles(replicates: Any, of: Callable[[Any], Value], level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of a function's values over the replicates; ValueError unless level is in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    low, high = np.quantile(of(replicates), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def chinchilla_starts() -> Tensor:
    """The 4,500 starts [4500, 5] of (ln A, α, ln B, β, ln E) of the paper's approach 3."""
    exponents, factors = (0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
    grid = itertools.product(factors, exponents, factors, exponents, (-1.0, -0.5, 0.0, 0.5, 1.0))
    return torch.tensor(list(grid), dtype=torch.float64)


def fine_tuning_starts(runs: Runs) -> Tensor:
    """Starts [S, 4] of (ln A, α, β, ln E) around the middle of the data, so that units do not matter."""
    P, D, L = (np.log(v) for v in (runs.parameters, runs.tokens, runs.loss))
    exponents = (0.0, 0.1, 0.3, 0.6, 1.0)
    grid = itertools.product((-3.0, -1.0, 0.0), exponents, exponents, (0.02, 0.2, 0.7, 2.0, 5.0))
    starts = [(np.median(L) + f + a * P.mean() + b * D.mean(), a, b, L.min() - e) for f, a, b, e in grid]
    return torch.tensor(starts, dtype=torch.float64)


def fit(
    runs: Runs,
    approach: str = "parametric",
    *,
    law: type[Chinchilla] | type[FineTuning] = Chinchilla,
    delta: float = 1e-3,
    starts: Tensor | None = None,
    budgets: Sequence[float] | None = None,
    tolerance: float = 0.1,
    bootstrap: int = 0,
    seed: int = 0,
    ceiling: float | None = None,
) -> Fit:
    """Fit a law's constants to runs by one of the three approaches of the Chinchilla paper.

    - ``"parametric"``: min Σ Huber_δ(ln L(N, D) − ln L), from all starts at once with analytic derivatives; Newton's
      method then takes the starts that come near the best one to the minimum. The only approach for FineTuning.
    - ``"isoflop"``: fit a parabola of L in ln N in each budget, and a line of the minima's ln N over ln C.
    - ``"envelope"``: at 1500 budgets, evenly spaced in ln C, take the size whose training curve (ln L interpolated in
      ln C) is lowest, if the next smaller and the next larger size were also trained through that budget; fit a line as
      above.

    Args:
        law: the law to fit; the other approaches return a :class:`Frontier`.
        delta: δ of the parametric fit.
        starts: [S, 5] (ln A, α, ln B, β, ln E), or [S, 4] (ln A, α, β, ln E) for FineTuning; default: a grid.
        budgets: FLOPs of the IsoFLOP budgets; a run belongs to the nearest budget within ``tolerance``. None: runs
            whose FLOPs are within ``tolerance`` of the smallest of a group form one budget.
        bootstrap: number of resamples for the intervals, of runs (within their budget) or of curves (for the envelope).
        seed: seed of the resamples.
        ceiling: for FineTuning: the best possible score; ``runs.loss`` then holds scores.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range; too few runs, sizes, token counts or budgets to determine the
            constants; tokens follow from the parameters; or the best law does not fall with parameters and tokens.

    Source: Hoffmann et al., arXiv 2203.15556, section 3; the starts from Besiroglu et al., arXiv 2404.10102.
    """
    if approach not in ("parametric", "isoflop", "envelope"):
        raise ValueError(f"approach must be parametric, isoflop or envelope, got {approach!r}")
    if law not in (Chinchilla, FineTuning) or (law is FineTuning and approach != "parametric"):
        raise ValueError(
            f"law must be Chinchilla, or FineTuning with the parametric approach, got {law!r} for {approach}"
        )
    if not isinstance(runs, Runs):
        raise TypeError(f"runs must be Runs, got {type(runs).__name__}")
    numbers: dict[str, Any] = {"delta": delta, "tolerance": tolerance, "ceiling": 0 if ceiling is None else ceiling}
    for name, value in numbers.items():
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not (isinstance(seed, Integral) and seed >= 0):
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    if not (isinstance(bootstrap, int) and bootstrap >= 0) or not (math.isfinite(delta) and delta > 0):
        raise ValueError(f"bootstrap must be an integer of at least 0 and delta above 0, got {bootstrap} and {delta}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
    random = np.random.default_rng(seed)
    if approach == "isoflop":
        return _isoflop(runs, budgets, tolerance, bootstrap, random)
    if approach == "envelope":
        return _envelope(runs, bootstrap, random)
    return _parametric(runs, law, delta, starts, bootstrap, random, ceiling)


def _parametric(
    runs: Runs,
    law: type[Chinchilla] | type[FineTuning],
    delta: float,
    starts: Tensor | None,
    bootstrap: int,
    random: np.random.Generator,
    ceiling: float | None,
) -> Fit:
    target = runs.loss
    if ceiling is not None:
        wrong = [f"row {row}: {v:g}" for row, v in zip(runs.numbers, runs.loss, strict=True) if v >= ceiling]
        if law is not FineTuning or wrong:
            raise ValueError(f"ceiling needs law=FineTuning and scores below {ceiling:g}; {listed(wrong)}")
        target = ceiling - runs.loss
    size = 5 if law is Chinchilla else 4
    _check_enough(runs, size)
    N, D, y = (torch.from_numpy(np.log(values)) for values in (runs.parameters, runs.tokens, target))
    one = torch.ones_like(N)
    designs = (
        [torch.stack([one, -N], 1), torch.stack([one, -D], 1)] if law is Chinchilla else [torch.stack([one, -N, -D], 1)]
    )
    problem = Problem([*designs, one.unsqueeze(1)], y, delta)
    if starts is None:
        starts = chinchilla_starts() if law is Chinchilla else fine_tuning_starts(replace(runs, loss=target))
    if not isinstance(starts, Tensor):
        raise TypeError(f"starts must be a Tensor [S, {size}] or None, got {type(starts).__name__}")
    if starts.ndim != 2 or starts.shape[1] != size or not len(starts) or not starts.isfinite().all():
        raise ValueError(f"starts must be finite and of shape [S, {size}], got {tuple(starts.shape)}")
    theta, value = minimise(problem, starts.double(), newton=False, steps=100, tolerance=1e-6)
    theta = theta[value <= 2 * value.min() + 1e-300]
    theta, value = minimise(problem, theta, newton=True, steps=300)
    order = value.argsort()
    theta, value = theta[order], value[order]
    reached = int((value <= value[0] * (1 + 1e-6) + 1e-300).sum())
    constants = _constants(theta[:1], law)
    if constants is None:
        exponents = ", ".join(f"{v:.3g}" for v in _exponents(theta[0], law))
        raise ValueError(
            f"the best law for these {len(runs)} runs does not fall with both parameters and tokens, or hardly "
            f"(exponents {exponents}); they determine no scaling law"
        )
    best: dict[str, Any] = {name: float(array[0]) for name, array in constants.items()}
    extra: dict[str, Any] = {"counting": runs.counting} | ({"ceiling": ceiling} if law is FineTuning else {})
    notes = []
    if best["E"] < 1e-3 * target.min():
        notes.append("E came out as 0: the runs show no floor of the loss")
    replicates = None
    if bootstrap:
        n = len(runs)
        counts, redrawn = _resample(runs, bootstrap, size, random)
        # Start from more than the best law, because a resample's minimum may lie elsewhere.
        from_ = torch.cat([_scale_exponents(problem, theta[:1], factor) for factor in (1.0, 0.7, 1.4)])
        weights = torch.from_numpy(counts).double()
        again, cost = minimise(
            problem,
            from_.repeat(bootstrap, 1),
            weights.repeat_interleave(len(from_), 0),
            newton=True,
            steps=150,
            tolerance=1e-9,
        )
        least = cost.view(bootstrap, -1).argmin(1)
        again = again.view(bootstrap, -1, size)[torch.arange(bootstrap), least]
        fine = torch.tensor([_constants(row.unsqueeze(0), law) is not None for row in again])
        if redrawn:
            notes.append(f"{redrawn} resamples of {n} runs determined no law and were drawn again")
        if not fine.all():
            notes.append(
                f"{int((~fine).sum())} of {bootstrap} resamples gave a law that does not fall; the intervals leave them out"
            )
        if not fine.any():
            raise ValueError(
                f"none of {bootstrap} resamples of these {n} runs gives a law that falls; there are too few runs"
            )
        replicates = law(**(_constants(again[fine], law) or {}), **extra)
    return Fit(
        law(**best, **extra),
        "parametric",
        runs,
        float(value[0]),
        replicates,
        (len(starts), reached),
        None,
        tuple(notes),
    )


def _scale_exponents(problem: Problem, theta: Tensor, factor: float) -> Tensor:
    """Multiply the exponents of θ [1, k] by a factor; keep every term unchanged in the middle of the data."""
    theta = theta.clone()
    for X, part in zip(problem.designs, problem.slices(), strict=True):
        slopes = theta[:, part.start + 1 : part.stop]
        theta[:, part.start] += (1 - factor) * (slopes @ X[:, 1:].mean(0))
        slopes *= factor
    return theta


def _exponents(theta: Tensor, law: type) -> list[float]:
    return theta[[1, 3] if law is Chinchilla else [1, 2]].tolist()


def _constants(theta: Tensor, law: type) -> dict[str, Any] | None:
    """Turn θ [S, k] into the law's constants, [S] each; None if one of them is impossible."""
    names = ("A", "alpha", "B", "beta", "E") if law is Chinchilla else ("A", "alpha", "beta", "E")
    values = dict(zip(names, theta.T.numpy(), strict=True))
    if any(np.any(np.abs(values[name]) > 700) for name in ("A", "B") if name in values):
        return None
    constants = {name: v if name in ("alpha", "beta") else np.exp(np.minimum(v, 700)) for name, v in values.items()}
    if any(not np.all(np.isfinite(v)) or (name != "E" and np.any(v <= 0)) for name, v in constants.items()):
        return None
    if law is Chinchilla:  # a law that hardly falls has a best division of the budget that no float holds
        alpha, beta = constants["alpha"], constants["beta"]
        log_g = (np.log(alpha * constants["A"]) - np.log(beta * constants["B"])) / (alpha + beta)
        if not np.all(np.abs(log_g) < 700):
            return None
    return constants


def _check_enough(runs: Runs, size: int) -> None:
    n = len(runs)
    if n <= size:
        raise ValueError(f"a law of {size} constants needs more than {size} runs, got {n}")
    if np.ptp(runs.loss) == 0:
        raise ValueError(f"the {n} runs have one loss, {runs.loss[0]:g}; a law needs losses that differ")
    for name in ("parameters", "tokens"):
        different, last = 0, 0.0
        for value in np.unique(getattr(runs, name)):
            if value > 1.01 * last:
                different, last = different + 1, value
        if different < 3:
            raise ValueError(
                f"at least 3 values of {name} that differ by a hundredth are needed for an exponent, got {different}"
            )
    if abs(np.corrcoef(np.log(runs.parameters), np.log(runs.tokens))[0, 1]) > 0.9999:
        raise ValueError(
            "tokens follow from parameters (a straight line in log-log); their effects cannot be separated"
        )


def _resample(runs: Runs, number: int, size: int, random: np.random.Generator) -> tuple[NDArray[np.int64], int]:
    """Count each run in each resample [number, n], and the draws that were repeated because they determine no law."""
    n, redrawn = len(runs), 0
    counts = np.empty((number, n), dtype=np.int64)
    for row in counts:
        for _ in range(1000):
            row[:] = np.bincount(random.integers(n, size=n), minlength=n)
            try:
                _check_enough(runs.select(row > 0), size)
                break
            except ValueError:
                redrawn += 1
        else:
            raise ValueError(
                f"resamples of these {n} runs determine no law; there are too few different runs for an interval"
            )
    return counts, redrawn


# ---- frontiers ----


def _frontier(
    runs: Runs, approach: str, points: Array, draw: Callable[[], Array], bootstrap: int, notes: Sequence[str]
) -> Fit:
    """Fit ln N = ln G + a ln(C/6) to points [2, m] of C and N, and to resamples of them."""
    a, G, objective = _line(points)
    if a <= 0:
        raise ValueError(f"the best size does not grow with compute (exponent {a:.3g}); the runs determine no frontier")
    lines = []
    for _ in range(bootstrap):
        try:
            line = _line(draw())
        except ValueError:
            continue
        if line[0] > 0:
            lines.append(line[:2])
    if len(lines) < bootstrap:
        notes = [*notes, f"{bootstrap - len(lines)} of {bootstrap} resamples determined no frontier and are left out"]
    if bootstrap and not lines:
        raise ValueError(f"none of {bootstrap} resamples determines a frontier; there are too few runs")
    replicates = None
    if lines:
        slopes, factors = np.array(lines).T
        replicates = Frontier(slopes, factors, runs.counting)
    return Fit(Frontier(a, G, runs.counting), approach, runs, objective, replicates, None, points, tuple(notes))


def _line(points: Array) -> tuple[float, float, float]:
    """Fit a line; return a, G and the sum of squares."""
    x, y = np.log(points[0] / 6), np.log(points[1])
    x0 = x.mean()
    a = ((x - x0) * (y - y.mean())).sum() / ((x - x0) ** 2).sum()
    intercept = y.mean() - a * x0
    return float(a), float(np.exp(intercept)), float(((intercept + a * x - y) ** 2).sum())


def _isoflop(
    runs: Runs, budgets: Sequence[float] | None, tolerance: float, bootstrap: int, random: np.random.Generator
) -> Fit:
    groups, strays = _budgets(runs, budgets, tolerance)
    notes = [f"within {tolerance:.0%} of no budget: rows {listed(sorted(strays), 20)}"] if strays else []
    for budget, members in groups:
        try:
            _vertex(runs, members)
        except ValueError as error:
            rows = listed(sorted(runs.numbers[i] for i in members), 20)
            notes.append(f"budget {budget:.3g} left out: {error} (rows {rows})")

    def minima(chosen: Sequence[tuple[float, NDArray[np.int64]]]) -> Array:
        """C and N of the budgets that have a minimum, [2, m]; the same rule applies to runs and resamples."""
        found = []
        for budget, members in chosen:
            with contextlib.suppress(ValueError):
                found.append((budget, _vertex(runs, members)))
        if len(found) < 2:
            raise ValueError(
                f"at least 2 budgets with a minimum are needed, got {len(found)} of {len(groups)}; {listed(notes)}"
            )
        return np.array(found).T

    def draw() -> Array:
        return minima([(budget, random.choice(members, len(members))) for budget, members in groups if len(members)])

    return _frontier(runs, "isoflop", minima(groups), draw, bootstrap, notes)


def _budgets(
    runs: Runs, budgets: Sequence[float] | None, tolerance: float
) -> tuple[list[tuple[float, NDArray[np.int64]]], list[int]]:
    """Each budget's FLOPs and members, and the rows that belong to none."""
    compute = runs.compute
    if budgets is None:
        groups, left = [], np.argsort(compute, kind="stable")
        while len(left):
            inside = compute[left] <= compute[left[0]] * (1 + tolerance)
            groups.append((float(np.exp(np.log(compute[left[inside]]).mean())), left[inside]))
            left = left[~inside]
        return groups, []
    centres = np.unique(np.asarray(budgets, dtype=np.float64))
    if not len(centres) or not np.all(np.isfinite(centres)) or centres[0] <= 0:
        raise ValueError(f"budgets must be finite and above 0, got {list(budgets)}")
    distance = np.abs(np.log(compute)[:, None] - np.log(centres))
    nearest = np.where(distance.min(1) <= math.log1p(tolerance), distance.argmin(1), -1)
    members = [(float(c), np.flatnonzero(nearest == k)) for k, c in enumerate(centres)]
    return members, [runs.numbers[i] for i in np.flatnonzero(nearest < 0).tolist()]


def _vertex(runs: Runs, members: NDArray[np.int64]) -> float:
    """N at the minimum of the parabola of the loss in ln N; ValueError if it lies outside the runs' sizes."""
    x, y = np.log(runs.parameters[members]), runs.loss[members]
    if len(np.unique(x)) < 3:
        raise ValueError(f"fewer than 3 sizes, {len(np.unique(x))}")
    square, slope, _ = np.polyfit(x - x.mean(), y, 2)
    if square <= 0:
        raise ValueError("its parabola has no minimum")
    lowest = x.mean() - slope / (2 * square)
    if not x.min() <= lowest <= x.max():
        raise ValueError("the minimum of its parabola is outside the sizes that were trained")
    return float(np.exp(lowest))


def _envelope(runs: Runs, bootstrap: int, random: np.random.Generator) -> Fit:
    keys = [str(name) for name in runs.names] if runs.names is not None else [repr(v) for v in runs.parameters.tolist()]
    where: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        where.setdefault(key, []).append(i)
    alone, curves = [], []
    for key, members in where.items():
        if len(np.unique(runs.parameters[members])) > 1:
            raise ValueError(
                f"the curve {key!r} has several sizes (rows {listed(sorted(runs.numbers[i] for i in members), 20)})"
            )
        if len(np.unique(runs.tokens[members])) != len(members):
            raise ValueError(
                f"the curve {key!r} has one token count twice (rows {listed(sorted(runs.numbers[i] for i in members), 20)})"
            )
        if len(members) < 2:
            alone.append(runs.numbers[members[0]])
        else:
            curves.append(np.array(members)[np.argsort(runs.tokens[members])])
    notes = [f"a single point makes no curve: rows {listed(sorted(alone), 20)}"] if alone else []
    sizes = np.array([runs.parameters[curve[0]] for curve in curves])
    if len(np.unique(sizes)) < 3:
        raise ValueError(
            f"training curves of at least 3 sizes are needed, got {len(np.unique(sizes))}; {listed(notes)}"
        )
    compute = np.geomspace(runs.compute.min(), runs.compute.max(), BUDGETS)
    losses = np.array(
        [np.interp(np.log(compute), np.log(runs.compute[c]), np.log(runs.loss[c]), np.inf, np.inf) for c in curves]
    )

    def points(chosen: NDArray[np.int64]) -> Array:
        """C and N of the envelope of chosen curves, [2, m]."""
        levels, of = np.unique(sizes[chosen], return_inverse=True)
        if len(levels) < 3:
            raise ValueError("curves of fewer than 3 sizes")
        best = np.full((len(levels), BUDGETS), np.inf)
        np.minimum.at(best, of, losses[chosen])
        trained = np.isfinite(best)
        lowest = best.argmin(0)
        inner = np.clip(lowest, 1, len(levels) - 2)
        at = np.arange(BUDGETS)
        bracketed = (inner == lowest) & trained[lowest, at] & trained[inner - 1, at] & trained[inner + 1, at]
        if len(np.unique(lowest[bracketed])) < 3:
            raise ValueError(
                "fewer than 3 sizes are the best at a budget through which the next smaller and the next larger size were "
                "also trained; whole training curves are needed, of sizes that take turns"
            )
        return np.array([compute[bracketed], levels[lowest[bracketed]]])

    found = points(np.arange(len(curves)))
    notes.append(
        f"{BUDGETS - found.shape[1]} of {BUDGETS} budgets are not used: no smaller or no larger size was trained there"
    )

    def draw() -> Array:
        return points(random.integers(len(curves), size=len(curves)))

    return _frontier(runs, "envelope", found, draw, bootstrap, notes)
