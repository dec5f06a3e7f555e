"""The plots of ``lowrank-ops scaling``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import scaling_laws as laws
from ...scaling_laws import Chinchilla, FineTuning, Fit
from ...scaling_laws.laws import Array, Budgeted, Law

LEVEL = 0.95  # level of the intervals


def short(value: float) -> str:
    """70000000000 as 70 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g} {letter}" if value < 1e15 else f"{value:.3g}"
    return f"{value:.3g}"


def _canvas(panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.6 * panels, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.set_xscale("log")
        one.grid(alpha=0.3)
    return drawn, axes


def _band(
    axes: Any, x: Array, of: Callable[[Any, Any], Any], law: Law, replicates: Any, colour: str, label: str
) -> None:
    """Draw a curve of the law over x, and its interval if there is one."""
    if replicates is not None:
        ends = np.array([laws.percentiles(replicates, functools.partial(_at, of, at), LEVEL) for at in x]).T
        axes.fill_between(x, *ends, color=colour, alpha=0.2, linewidth=0, label=f"{LEVEL:.0%} interval")
    axes.plot(x, of(law, x), color=colour, label=label)


def _at(of: Callable[[Any, Any], Any], x: float, law: Any) -> Any:
    return of(law, x)


def _fine_tuned(tokens: float, law: FineTuning, parameters: Any) -> Any:
    return law.predict(parameters, tokens)


def figure_fit(fit: Fit) -> Any:
    """Plot the runs and the law: loss against compute and the frontier, or for fine-tuning loss against tokens.

    Returns:
        a matplotlib Figure, drawn without a display.
    """
    runs, law = fit.runs, fit.law
    if isinstance(law, FineTuning):
        return _figure_fine_tuning(fit, law)
    drawn, (left, right) = _canvas(2)
    wide = np.geomspace(runs.compute.min() / 2, runs.compute.max() * 10, 60)
    from matplotlib.colors import LogNorm

    colours = {"c": runs.parameters, "cmap": "viridis", "norm": LogNorm()}
    shown = left.scatter(runs.compute, runs.loss, s=14, **colours, zorder=2)
    drawn.colorbar(shown, ax=left, label=f"parameters ({runs.counting})")
    if isinstance(law, Chinchilla):
        _band(left, wide, lambda law, C: law.optimal(C).loss, law, fit.replicates, "tab:red", "frontier of the law")
        left.legend(fontsize=9)
    left.set_xlabel("training FLOPs, 6 N D")
    left.set_ylabel("loss")
    right.set_yscale("log")
    right.scatter(runs.compute, runs.parameters, s=8, color="lightgray", label="runs", zorder=1)
    if fit.points is not None:
        right.scatter(*fit.points, s=16, color="black", label=f"best sizes ({fit.approach})", zorder=3)
    _band(right, wide, lambda law, C: law.optimal(C).parameters, law, fit.replicates, "tab:red", "N_opt of the law")
    right.set_xlabel("training FLOPs, 6 N D")
    right.set_ylabel(f"parameters ({runs.counting})")
    right.legend(fontsize=9)
    return drawn


def _figure_fine_tuning(fit: Fit, law: FineTuning) -> Any:
    runs = fit.runs
    drawn, (left, right) = _canvas(2)
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    sizes = np.unique(runs.parameters)
    chosen = sizes if len(sizes) <= 6 else sizes[np.linspace(0, len(sizes) - 1, 6).round().astype(int)]
    norm = LogNorm(sizes[0], sizes[-1])
    shown = left.scatter(runs.tokens, runs.loss, s=16, c=runs.parameters, cmap="viridis", norm=norm, zorder=3)
    wide = np.geomspace(runs.tokens.min() / 1.5, runs.tokens.max() * 10, 60)
    for size in chosen:
        left.plot(wide, law.predict(size, wide), color=colormaps["viridis"](norm(size)), linewidth=1)
    drawn.colorbar(shown, ax=left, label="trained parameters")
    what = "loss" if law.ceiling is None else "score"
    left.set_xlabel("tokens trained on")
    left.set_ylabel(what)
    right.set_xlabel("trained parameters")
    right.set_ylabel(what)
    wide = np.geomspace(sizes[0] / 3, sizes[-1] * 3, 60)
    most = runs.tokens.max()
    for tokens, colour in ((most, "tab:blue"), (10 * most, "tab:red")):
        at = functools.partial(_fine_tuned, tokens)
        _band(right, wide, at, law, fit.replicates, colour, f"{short(tokens)} tokens")
    there = runs.tokens == most
    right.scatter(runs.parameters[there], runs.loss[there], color="tab:blue", s=16, zorder=3)
    right.legend(fontsize=9)
    return drawn


def figure_plan(name: str, law: Budgeted, replicates: Any, budgets: Sequence[float]) -> Any:
    """Plot the frontier of a law around the budgets, with its intervals and the published laws."""
    losses = law.optimal(budgets[0]).loss is not None
    drawn, axes = _canvas(2 if losses else 1)
    wide = np.geomspace(min(budgets) / 30, max(budgets) * 30, 60)
    left = axes[0]
    left.set_yscale("log")
    for other, style in zip(laws.PUBLISHED, ("--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))), strict=True):
        if other != name:
            left.plot(
                wide,
                laws.PUBLISHED[other].optimal(wide).parameters,
                linestyle=style,
                color="gray",
                linewidth=1,
                label=other,
            )
    _band(left, wide, lambda law, C: law.optimal(C).parameters, law, replicates, "tab:red", Path(name).name)
    left.set_ylabel(f"best parameters ({law.counting})")
    if losses:
        _band(axes[1], wide, lambda law, C: law.optimal(C).loss, law, replicates, "tab:red", Path(name).name)
        axes[1].set_ylabel("loss at the best split")
    clear = {"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.8}
    for budget in budgets:
        best = law.optimal(budget)
        for one, y in zip(axes, (best.parameters, best.loss), strict=False):
            one.scatter([budget], [y], color="tab:red", zorder=3)
            text = short(float(y)) if one is left else f"{y:.3f}"
            one.annotate(
                text, (budget, y), (6, -12 if one is left else 6), textcoords="offset points", fontsize=9, bbox=clear
            )
    for one in axes:
        one.set_xlabel("training FLOPs")
        one.legend(fontsize=9)
    return drawn
