"""The scaling laws, published laws, rules for counting parameters, and the runs that laws are fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..adapters.experts import ExpertsLinear
from ..adapters.linear import Linear
from ..adapters.names import check_model

Array = NDArray[np.float64]
Value = Any  # a float or an array of floats

COUNTING = ("all", "non-embedding", "trained")
PF_DAY = 1e15 * 86400  # FLOPs


class Optimum(NamedTuple):
    """The best use of a budget; the loss is None if the law predicts none."""

    parameters: Value
    tokens: Value
    loss: Value | None


# ---- laws ----


def _check(law: Any, above: Sequence[str], at_least: Sequence[str] = ()) -> None:
    for name in (*above, *at_least):
        value = _numbers(name, getattr(law, name))
        if not np.all(np.isfinite(value)) or np.any(value < 0) or (name in above and np.any(value == 0)):
            bound = "above 0" if name in above else "of at least 0"
            raise ValueError(f"{name} must be a finite number {bound}, got {getattr(law, name)!r}")
    if law.counting not in COUNTING:
        raise ValueError(f"counting must be one of {', '.join(COUNTING)}, got {law.counting!r}")


def _numbers(name: str, value: Any) -> Array:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be a number or an array of numbers, got {value!r}") from error


def _positive(**values: ArrayLike | None) -> None:
    for name, value in values.items():
        array = _numbers(name, value)
        if value is None or not np.all(np.isfinite(array)) or np.any(array <= 0):
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")


@dataclass(frozen=True)
class Kaplan:
    """L(N) = (N_c / N)^α_N    L(D) = (D_c / D)^α_D    L(C_min) = (C_c / C_min)^α_C

    Args:
        alpha_n, N_c: with N the parameters without embeddings.
        alpha_d, D_c: with D in tokens.
        alpha_c, C_c: C_c in PF-days; :meth:`predict` takes FLOPs, like everything here.

    Source: Kaplan et al., arXiv 2001.08361, equations 1.1 to 1.3, and its appendix for the use of a budget.
    """

    alpha_n: Value = 0.076
    N_c: Value = 8.8e13
    alpha_d: Value = 0.095
    D_c: Value = 5.4e13
    alpha_c: Value = 0.050
    C_c: Value = 3.1e8
    counting: str = "non-embedding"

    def __post_init__(self) -> None:
        _check(self, ("alpha_n", "N_c", "alpha_d", "D_c", "alpha_c", "C_c"))

    def predict(
        self,
        *,
        parameters: ArrayLike | None = None,
        tokens: ArrayLike | None = None,
        compute: ArrayLike | None = None,
    ) -> Value:
        """The loss if one quantity limits it and the others do not.

        Args:
            parameters, tokens, compute: exactly one of them; compute in FLOPs, spent at the best batch size.

        Raises:
            ValueError: none or several are given, or a value is not finite and above 0.
        """
        given = {k: v for k, v in dict(parameters=parameters, tokens=tokens, compute=compute).items() if v is not None}
        if len(given) != 1:
            raise ValueError(f"one of parameters, tokens and compute is needed, got {', '.join(given) or 'none'}")
        _positive(**given)
        ((name, value),) = given.items()
        value = np.asarray(value, dtype=np.float64)[()]
        if name == "parameters":
            return (self.N_c / value) ** self.alpha_n
        if name == "tokens":
            return (self.D_c / value) ** self.alpha_d
        return (self.C_c * PF_DAY / value) ** self.alpha_c

    def optimal(self, compute: ArrayLike) -> Optimum:
        """N = 1.3e9 C^0.73, D = 2e10 C^0.27 with C in PF-days: the best N and D for a budget of C_min FLOPs.

        Training at the critical batch size, as D assumes, costs 2 C_min, so that 6 N D is about 2 C_min.
        """
        _positive(compute=compute)
        days = np.asarray(compute, dtype=np.float64)[()] / PF_DAY
        return Optimum(1.3e9 * days**0.73, 2e10 * days**0.27, self.predict(compute=compute))


@dataclass(frozen=True)
class Frontier:
    """N_opt = G (C/6)^a    D_opt = (C/6)^(1−a) / G

    The result of approaches 1 and 2 of the Chinchilla paper: the best sizes, without their loss.
    """

    a: Value
    G: Value
    counting: str = "all"

    def __post_init__(self) -> None:
        _check(self, ("a", "G"))

    @property
    def b(self) -> Value:
        return 1 - self.a

    def optimal(self, compute: ArrayLike) -> Optimum:
        """The best N and D for a budget of FLOPs; ValueError unless it is finite and above 0."""
        _positive(compute=compute)
        product = np.asarray(compute, dtype=np.float64)[()] / 6
        parameters = self.G * product**self.a
        return Optimum(parameters, product / parameters, None)

    def optimal_tokens(self, parameters: ArrayLike) -> Value:
        """D = (N/G)^(1/a) / N: the tokens for which a model of this size makes the best use of its training compute."""
        _positive(parameters=parameters)
        N = np.asarray(parameters, dtype=np.float64)[()]
        return (N / self.G) ** (1 / self.a) / N


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N^α + B / D^β, with the constants printed in the paper as default.

    Args:
        E: the irreducible loss, >= 0.
        A, B, alpha, beta: above 0.
        counting: which parameters N counts.

    Source: Hoffmann et al., arXiv 2203.15556, approach 3 (equations 2 to 4, 10).
    """

    E: Value = 1.69
    A: Value = 406.4
    B: Value = 410.7
    alpha: Value = 0.34
    beta: Value = 0.28
    counting: str = "all"

    def __post_init__(self) -> None:
        _check(self, ("A", "B", "alpha", "beta"), ("E",))

    @property
    def a(self) -> Value:
        """β / (α + β), the exponent of N_opt in C."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> Value:
        """α / (α + β), the exponent of D_opt in C."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> Value:  # noqa: N802
        """(αA / βB)^(1 / (α + β))."""
        ratio = np.log(self.alpha) + np.log(self.A) - np.log(self.beta) - np.log(self.B)
        return np.exp(ratio / (self.alpha + self.beta))

    def predict(self, parameters: ArrayLike, tokens: ArrayLike) -> Value:
        """L(N, D); ValueError unless both are finite and above 0."""
        _positive(parameters=parameters, tokens=tokens)
        N, D = (np.asarray(value, dtype=np.float64)[()] for value in (parameters, tokens))
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def frontier(self) -> Frontier:
        """The best sizes by this law."""
        return Frontier(self.a, self.G, self.counting)

    def optimal(self, compute: ArrayLike) -> Optimum:
        """N_opt = G (C/6)^a and D_opt = (C/6)^b / G minimise L(N, D) under 6 N D = C; ValueError for a bad C."""
        best = self.frontier().optimal(compute)
        return best._replace(loss=self.predict(best.parameters, best.tokens))

    def optimal_tokens(self, parameters: ArrayLike) -> Value:
        """The tokens for which a model of this size makes the best use of its training compute."""
        return self.frontier().optimal_tokens(parameters)


@dataclass(frozen=True)
class FineTuning:
    """L(P, D) = E + A / (P^α D^β), or a score = ceiling − L(P, D)

    P and D multiply: more of one gains less if the other is small. With α near 0, as fine-tuning shows for the
    adapter's size, the law depends on D alone. A sum A / P^α + B / D^β would keep a part that no amount of data lowers.

    Args:
        E: >= 0. A: above 0. alpha, beta: above 0.
        ceiling: the best possible score for a law of scores; None for losses.
        counting: which parameters P counts.

    Source: Zhang et al., ICLR 2024, arXiv 2402.17193, where this law fitted better than the sum.
    """

    E: Value
    A: Value
    alpha: Value
    beta: Value
    ceiling: float | None = None
    counting: str = "trained"

    def __post_init__(self) -> None:
        _check(self, ("A", "alpha", "beta"), ("E",))

    def predict(self, parameters: ArrayLike, tokens: ArrayLike) -> Value:
        """The loss, or the score; ValueError unless both are finite and above 0."""
        _positive(parameters=parameters, tokens=tokens)
        P, D = (np.asarray(value, dtype=np.float64)[()] for value in (parameters, tokens))
        error = self.E + self.A / (P**self.alpha * D**self.beta)
        return error if self.ceiling is None else self.ceiling - error


Budgeted = Chinchilla | Frontier | Kaplan  # laws that tell the best use of a budget
Law = Budgeted | FineTuning

# Approach 1's coefficients are not printed. These give the line in log-log with the smallest largest deviation, 3.7 %,
# from its table of optimal tokens (table 3, 400 M to 280 B parameters). At 67 B the table's own columns disagree by
# more.
PUBLISHED: dict[str, Budgeted] = {
    "chinchilla": Chinchilla(),
    "chinchilla-unrounded": Chinchilla(
        math.exp(0.526723), math.exp(6.00734), math.exp(6.01792), alpha=0.339171, beta=0.284908
    ),
    "chinchilla-approach-1": Frontier(a=0.498, G=0.2394),
    "epoch": Chinchilla(1.8172, 482.01, 2085.43, alpha=0.3478, beta=0.3658),
    "kaplan": Kaplan(),
}


def count_parameters(model: nn.Module, counting: str = "all") -> int:
    """Count the parameters of a model by a rule, tied ones once.

    Args:
        counting: ``"all"`` (Chinchilla); ``"non-embedding"``: without embeddings and weights tied to them, and
            without the output head if the model names it (Kaplan); ``"trained"``: parameters that get a gradient.

    A :class:`lowrank_ops.Linear` counts N K (a stack of experts E N K), in whatever format W is stored, its bias, and its
    trained parameters.

    Raises:
        ValueError: counting is unknown.
    """
    if counting not in COUNTING:
        raise ValueError(f"counting must be one of {', '.join(COUNTING)}, got {counting!r}")
    check_model(model)
    left_out: set[int] = set()
    if counting == "non-embedding":
        heads = [getattr(model, "get_output_embeddings", lambda: None)()]
        outside = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)] + heads
        left_out = {id(p) for module in outside if module is not None for p in [module, *module.parameters()]}
    counts: dict[int, int] = {}
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, Linear | ExpertsLinear):
            inside |= {id(p) for p in module.parameters()}
            if counting != "trained":
                bias = 0 if module.bias is None else module.bias.numel()
                counts[id(module)] = math.prod(module.shape) + bias
            counts |= {id(p): p.numel() for p in module.trained()}
    counts |= {id(p): p.numel() for p in model.parameters() if id(p) not in inside}
    if counting == "trained":
        kept = {id(p) for p in model.parameters() if p.requires_grad}
        counts = {key: number for key, number in counts.items() if key in kept}
    return sum(number for key, number in counts.items() if key not in left_out)


# ---- runs ----


@dataclass(frozen=True, eq=False)
class Runs:
    """Measurements: one entry for each run, or for each point of a training curve.

    Args:
        parameters, tokens, loss: [n], finite and above 0.
        names: [n], the curve of each point; None: points of one size form one curve.
        rows: [n], the number of each entry in its file, for messages; default 1 … n.
        counting: which parameters ``parameters`` counts.

    Raises:
        ValueError: lengths differ; there is no entry; or values are not finite and above 0, listed with their rows.
    """

    parameters: Array
    tokens: Array
    loss: Array
    names: Sequence[str] | None = None
    rows: Sequence[int] | None = None
    counting: str = "all"

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens", "loss"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float64).reshape(-1))
        n = len(self.parameters)
        if self.rows is None:
            object.__setattr__(self, "rows", range(1, n + 1))
        lengths = {
            k: len(v) for k in ("parameters", "tokens", "loss", "names", "rows") if (v := getattr(self, k)) is not None
        }
        if n == 0 or len(set(lengths.values())) > 1:
            raise ValueError(f"runs must be of one length above 0, got {lengths}")
        if self.counting not in COUNTING:
            raise ValueError(f"counting must be one of {', '.join(COUNTING)}, got {self.counting!r}")
        wrong = [
            f"row {row}: {name} is {value:g}"
            for name in ("parameters", "tokens", "loss")
            for row, value in zip(self.numbers, getattr(self, name), strict=True)
            if not (math.isfinite(value) and value > 0)
        ]
        if wrong:
            raise ValueError(f"values must be finite and above 0; {listed(wrong)}")

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def numbers(self) -> Sequence[int]:
        """The rows, which are never None after construction."""
        return self.rows if self.rows is not None else ()

    @property
    def compute(self) -> Array:
        """6 N D, in FLOPs."""
        return 6 * self.parameters * self.tokens

    def select(self, index: ArrayLike) -> Runs:
        """Select runs by position or by a mask."""
        chosen = np.arange(len(self))[np.asarray(index)].tolist()
        names = None if self.names is None else [self.names[i] for i in chosen]
        rows = [self.numbers[i] for i in chosen]
        return Runs(self.parameters[chosen], self.tokens[chosen], self.loss[chosen], names, rows, self.counting)


def listed(items: Sequence[Any], most: int = 10) -> str:
    """List the first few items and the number of others."""
    text = "; ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text}; and {len(items) - most} more"
