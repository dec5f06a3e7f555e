"""Scaling laws: how loss falls with parameters, data and compute, how to divide a budget, with intervals.

    L = E + A / N^α + B / D^β      C = 6 N D      N parameters, D tokens, C training FLOPs

Laws are frozen dataclasses of plain numbers and compute in NumPy's float64. With arrays in place of numbers a law
stands for many laws, which is how bootstrap replicates are stored. :func:`fit` finds a law's constants from runs.

A law says what counts as a parameter (``counting``): Chinchilla's N includes embeddings, Kaplan's does not, and a
fine-tuning law counts trained parameters. :func:`count_parameters` counts a model by each rule.
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
