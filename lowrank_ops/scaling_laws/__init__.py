"""Scaling laws: how loss falls with parameters, data and compute, how to split a budget, and how sure one can be.

    L = E + A / N^α + B / D^β      C = 6 N D      N parameters, D tokens, C training FLOPs

Laws are frozen dataclasses of plain numbers, computed with in NumPy's float64; an array in place of a number makes a
law of many laws, which is how bootstrap replicates are kept. :func:`fit` finds a law's constants from runs.

What counts as a parameter is part of a law (``counting``): Chinchilla's N has the embeddings, Kaplan's has not, and a
fine-tuning law counts what is trained. :func:`count_parameters` counts a model by each rule.
"""

from .fitting import BUDGETS, Fit, chinchilla_starts, fine_tuning_starts, fit, percentiles
from .laws import COUNTING, PF_DAY, PUBLISHED, Chinchilla, FineTuning, Frontier, Kaplan, Optimum, Runs, count_parameters

__all__ = [
    "BUDGETS",
    "COUNTING",
    "PF_DAY",
    "PUBLISHED",
    "Chinchilla",
    "FineTuning",
    "Fit",
    "Frontier",
    "Kaplan",
    "Optimum",
    "Runs",
    "chinchilla_starts",
    "count_parameters",
    "fine_tuning_starts",
    "fit",
    "percentiles",
]
