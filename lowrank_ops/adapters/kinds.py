"""The kinds of adapter. A kind is a frozen dataclass: it is a configuration and holds no tensor.

Names: ``down`` D [R, K], ``up`` U [N, R] and the core C [R, R] between them. The literature's W + A Bᵀ has A = ``up`` and
Bᵀ = ``down``; PEFT has ``lora_B.weight`` = ``up`` and ``lora_A.weight`` = ``down``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Inits that subtract s · U D from the base, so that base and update together equal W.
BASE_CHANGING = ("pissa", "milora", "loftq", "olora", "corda", "loraga")
# Inits that read the moments of a layer's inputs.
CALIBRATED = ("eora", "eva", "corda", "loraga")
INITS = ("kaiming", "gaussian", "orthogonal", "nystrom", "eora", "eva", *BASE_CHANGING)
CORDA_METHODS = ("ipm", "kpm")
FORMS = ("additive", "replace")
PATTERNS = ("banded", "random")
FACTORS = ("nf4", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class LoRA:
    """y = W x + s · U (D x), s = alpha / rank, or alpha / √rank for rsLoRA; D and U are trained.

    With ``dora=True`` the lengths of the rows are trained apart from their directions, y = g ⊙ (W x + s · U (D x)),
    g = m / ‖W + s · U D‖ by rows; m starts as ‖W + s · U D‖, and the denominator gets no gradient.

    Args:
        rank: R, at least 1 and at most min(N, K).
        alpha: numerator of s.
        rslora: scale by 1/√rank (arXiv 2312.03732), so that high ranks learn as fast as low ones.
        dropout: probability to drop an element of the adapter's input in training, 0 <= dropout < 1.
        init: how D, U and the base start. With W = U* S V*ᵀ:
            ``"kaiming"``: D uniform in ±1/√K, U = 0. ``"gaussian"``: D normal of standard deviation 1/rank, U = 0.
            ``"orthogonal"``: both random in orthogonal subspaces, so that U D = 0 with neither zero; even rank.
            ``"nystrom"``: D = σ Ω W with Ω [R, N] normal, U = 0; σ gives D the norm that kaiming gives it.
            ``"eora"``: s · U D minimises ‖(W − W₄ − s · U D) H^½‖_F, where the base W₄ is W in 4 bits and H = E[x xᵀ] over
                a calibration: the update starts as the part of what rounding loses that the layer's outputs feel most.
            ``"pissa"``: U = U*√(S/s), D = √(S/s) V*ᵀ of the R largest singular values, base = W − s · U D.
            ``"milora"``: the same with the R smallest.
            ``"olora"``: U = the first R columns of Q, D = the first R rows of R' in W = Q R', base = W − s · U D.
            ``"loftq"``: base = q(W), where q rounds to 4 bits; s · U D = the R largest of the quantisation error.
            ``"eva"``: D = the R main directions of the layer's inputs around their mean, U = 0.
            ``"corda"``: U = U*√(S/s), D = √(S/s) V*ᵀ C⁻¹ with W C = U* S V*ᵀ and C = E[x xᵀ], base = W − s · U D.
            ``"loraga"``: D = c V*ᵀ[:R], U = c U*[:, R:2R] with dL/dW = U* S V*ᵀ and c = N^¼ / 4, base = W − s · U D;
            2 R at most min(N, K). The last three need ``adapt(..., calibration=moments)``.
            iterations: T for pissa and loftq over 4 bits: T times in turn base = q(W − s · U D) and s · U D = the R
                largest of W − base (pissa starts and loftq ends with the second step). QPiSSA uses 5.
        dora: train a length m [N] of the rows too. In training dropout then needs a second product with W, since what is
            dropped for the update is, as in PEFT, also dropped where W's rows are scaled.
        lora_bias: train a bias b [N] of U too, y = W x + s · (U (D x) + b), from 0; not with ``dora``.
        rho: for eva: ranks move to the layers whose inputs have more directions that matter, up to round(rank · rho) in one
            layer; a layer may get none. Their sum and s stay. 1 keeps every rank.
        corda_method: for corda: ``"ipm"`` trains what the inputs use most, the R largest S; ``"kpm"`` keeps it and trains
            what they use least, the R smallest.

    Raises:
        ValueError, TypeError: a value is out of range.

    Source: LoRA, arXiv 2106.09685; over NF4 weights QLoRA, arXiv 2305.14314. PiSSA and QPiSSA, arXiv 2404.02948; MiLoRA,
    arXiv 2406.09044; OLoRA, arXiv 2406.01775; LoftQ, arXiv 2310.08659; Nyström initialisation, Li et al., ICLR 2025; EoRA,
    arXiv 2410.21271; EVA, arXiv 2410.07170; CorDA, arXiv 2406.05223; LoRA-GA, arXiv 2407.05000; DoRA, arXiv 2402.09353,
    equation 5 with the gradient of section 4.3.
    """

    rank: int = 16
    alpha: float = 32
    rslora: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    iterations: int = 1
    dora: bool = False
    lora_bias: bool = False
    rho: float = 2.0
    corda_method: str = "ipm"

    def __post_init__(self) -> None:
        _check_int("rank", self.rank)
        _check_number("alpha", self.alpha)
        _check_number("dropout", self.dropout)
        for name in ("rslora", "dora", "lora_bias"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        _check_choice("init", self.init, INITS)
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init='orthogonal' needs an even rank, got {self.rank}")
        if self.init in ("eora", *BASE_CHANGING) and self.alpha <= 0:
            raise ValueError(
                f"init={self.init!r} divides by s = alpha / rank, so alpha must be above 0, got {self.alpha}"
            )
        _check_int("iterations", self.iterations)
        if self.iterations > 1 and self.init not in ("pissa", "loftq"):
            raise ValueError(
                f"iterations above 1 need init='pissa' or 'loftq', got {self.iterations} with {self.init!r}"
            )
        _check_number("rho", self.rho)
        if not 1 <= self.rho < math.inf:
            raise ValueError(f"rho must be finite and at least 1, got {self.rho}")
        _check_choice("corda_method", self.corda_method, CORDA_METHODS)
        if self.lora_bias and self.dora:
            raise ValueError("lora_bias must be False with dora, as in PEFT")

    @property
    def scale(self) -> float:
        """s, the factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def num_parameters(self, out_features: int, in_features: int) -> int:
        """R · (N + K), and N more with dora or lora_bias, without making a tensor."""
        self.check(out_features, in_features)
        return self.rank * (out_features + in_features) + (self.dora or self.lora_bias) * out_features

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ValueError if a layer of this shape cannot take the kind."""
        _check_rank(self.rank, out_features, in_features)
        if self.init == "loraga" and 2 * self.rank > min(out_features, in_features):
            raise ValueError(
                f"init='loraga' takes 2 · rank directions of the gradient, so 2 · rank must be at most "
                f"{min(out_features, in_features)} for a layer {out_features} x {in_features}, got rank {self.rank}"
            )

    def factors(
        self, out_features: int, in_features: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw D [R, K] and U [N, R] for an init that does not depend on W, float32, from the device's generator."""
        self.check(out_features, in_features)
        options: Any = {"device": device, "dtype": torch.float32}
        down = torch.empty(self.rank, in_features, **options)
        up = torch.zeros(out_features, self.rank, **options)
        if self.init == "gaussian":
            down.normal_(std=1 / self.rank)
        elif self.init == "orthogonal":
            # Disjoint rows of one orthogonal matrix make U D = 0; a factor of one tenth keeps the first steps small.
            basis = torch.linalg.qr(torch.randn(self.rank, self.rank, **options))[0]
            half = self.rank // 2
            down.copy_((torch.randn(in_features, half, **options) @ basis[:half]).T / 10)
            up.copy_(torch.randn(out_features, half, **options) @ basis[half:] / 10)
        else:
            bound = 1 / math.sqrt(in_features)
            down.uniform_(-bound, bound)
        return down, up


@dataclass(frozen=True)
class LoRAXS:
    """y = W x + s · U S C (Vᵀ x) with U S Vᵀ the R largest of W's SVD, frozen; only C [R, R] is trained, from 0.

    ``down`` = Vᵀ and ``up`` = U S, as in the paper. The authors' code trains C' in U C' S Vᵀ: C' = S C S⁻¹, the same
    updates at a different learning rate.

    Args:
        rank: R, at most min(N, K).
        alpha: numerator of s = alpha / rank; None means alpha = rank, s = 1.
        factors: how to store U S and Vᵀ: "nf4", "bfloat16", "float16", "float32"; None: NF4 where W has 4
            bits, otherwise the dtype of W.

    Source: arXiv 2405.17604.
    """

    rank: int = 64
    alpha: float | None = None
    factors: str | None = None

    def __post_init__(self) -> None:
        _check_int("rank", self.rank)
        if self.alpha is not None:
            _check_number("alpha", self.alpha)
            if not math.isfinite(self.alpha):
                raise ValueError(f"alpha must be finite, got {self.alpha}")
        _check_choice("factors", self.factors, (*FACTORS, None))

    form = "additive"

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def num_parameters(self, out_features: int, in_features: int) -> int:
        """R²; makes no tensor."""
        self.check(out_features, in_features)
        return self.rank**2

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ValueError if a layer of this shape cannot take the kind."""
        _check_rank(self.rank, out_features, in_features)

    def size(self, out_features: int, in_features: int) -> int:
        """R."""
        return self.rank


@dataclass(frozen=True)
class SVF:
    """y = W x + U M (Vᵀ x) with U S Vᵀ the SVD of W, frozen; only M = S (Z − I), diagonal, is trained, from 0.

    This equals W' = U diag(S) Z Vᵀ with Z diagonal, written as an update of W. ∂L/∂z_i = s_i ∂L/∂m_i, so a learning
    rate for Z does not suit M.

    Args:
        rank: R, the number of largest singular values to adapt; None for all, R = min(N, K).
        form: ``"additive"``: as above; W stays exact. ``"replace"``: y = U (S + M) (Vᵀ x), without W; with R below
            min(N, K) or NF4 factors the layer does not start as W.
        factors: how to store U and Vᵀ: "nf4", "bfloat16", "float16", "float32"; None: NF4 where W has 4
            bits, otherwise the dtype of W.

    Source: Transformer², arXiv 2501.06252.
    """

    rank: int | None = None
    form: str = "additive"
    factors: str | None = None

    def __post_init__(self) -> None:
        _check_spectral(self)

    scale = 1.0

    def num_parameters(self, out_features: int, in_features: int) -> int:
        """R; makes no tensor."""
        return self.size(out_features, in_features)

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ValueError if a layer of this shape cannot take the kind."""
        _check_rank(self.rank or 1, out_features, in_features)

    def size(self, out_features: int, in_features: int) -> int:
        """R."""
        self.check(out_features, in_features)
        return self.rank or min(out_features, in_features)


@dataclass(frozen=True)
class SVFT:
    """y = W x + U M (Vᵀ x) with U S Vᵀ the SVD of W, frozen; only M, sparse on a fixed pattern, is trained, from 0.

    Args:
        pattern: ``"banded"``: |i − j| <= bandwidth. ``"random"``: in every row the diagonal and other distinct columns,
            drawn once; the pattern is saved with the adapter, not drawn again.
        bandwidth: half-width d >= 0 of the band. A random pattern with a bandwidth has as many entries in each row as
            the band, and so the same number of parameters.
        entries: entries in each row of a random pattern, in place of a bandwidth.
        seed: seed of a random pattern.
        rank, form, factors: as in :class:`SVF`.

    Source: arXiv 2405.19597, equation 1. Its "plain" is bandwidth 0. The released code starts M at random, this at 0.
    """

    pattern: str = "banded"
    bandwidth: int | None = None
    entries: int | None = None
    seed: int = 0
    rank: int | None = None
    form: str = "additive"
    factors: str | None = None

    def __post_init__(self) -> None:
        _check_choice("pattern", self.pattern, PATTERNS)
        if self.bandwidth is not None:
            _check_int("bandwidth", self.bandwidth, least=0)
        if self.entries is not None:
            _check_int("entries", self.entries)
        if self.pattern == "banded" and (self.bandwidth is None or self.entries is not None):
            raise ValueError(
                f"pattern='banded' needs bandwidth and no entries, got bandwidth={self.bandwidth}, entries={self.entries}"
            )
        if self.pattern == "random" and (self.bandwidth is None) == (self.entries is None):
            raise ValueError(
                f"pattern='random' needs entries or bandwidth, got entries={self.entries}, bandwidth={self.bandwidth}"
            )
        _check_int("seed", self.seed, least=0)
        _check_spectral(self)

    scale = 1.0

    def num_parameters(self, out_features: int, in_features: int) -> int:
        """R(2d+1) − d(d+1), or R · entries; makes no tensor."""
        R = self.size(out_features, in_features)
        if self.entries is not None:
            return R * self.entries
        d = self.bandwidth or 0
        return R * (2 * d + 1) - d * (d + 1)

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ValueError if a layer of this shape cannot take the kind."""
        _check_rank(self.rank or 1, out_features, in_features)
        R = self.rank or min(out_features, in_features)
        if self.bandwidth is not None and self.bandwidth >= R:
            raise ValueError(
                f"bandwidth must be below R = {R} for a layer {out_features} x {in_features}, got {self.bandwidth}"
            )
        if self.entries is not None and self.entries > R:
            raise ValueError(
                f"entries must be at most R = {R} for a layer {out_features} x {in_features}, got {self.entries}"
            )

    def size(self, out_features: int, in_features: int) -> int:
        """R."""
        self.check(out_features, in_features)
        return self.rank or min(out_features, in_features)

    def pairs(self, R: int) -> tuple[Tensor, Tensor]:
        """(rows, cols) of a random pattern, int64, row by row: in each row the diagonal and other distinct columns."""
        return _random_pairs(R, self.entries, self.bandwidth or 0, self.seed)


Spectral = LoRAXS | SVF | SVFT
Adapter = LoRA | LoRAXS | SVF | SVFT


def described(kind: Adapter | None) -> str:
    """A kind in short: its rank, its alpha and the options that are not the default, such as ``LoRA(8, alpha=16)``."""
    if kind is None:
        return "no adapter"
    words: list[str] = []
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name)
        text = f"{value:g}" if isinstance(value, float) else repr(value)
        if field.name == "rank" and value is not None and not words:
            words.append(text)
        elif value != field.default or (field.name == "alpha" and value is not None):
            words.append(f"{field.name}={text}")
    return f"{type(kind).__name__}({', '.join(words)})"


def same_meaning(first: Adapter, second: Adapter) -> bool:
    """Whether the trained tensors of one kind mean the same update of the same base in a layer of the other."""

    def meaning(kind: Adapter) -> dict[str, object]:
        options = dataclasses.asdict(kind) | {"scale": kind.scale}
        unread = ["alpha", "rslora", "dropout", "factors", "rho"]
        if options.get("init") not in BASE_CHANGING:
            unread += ["init", "iterations"]
        if options.get("init") != "corda":
            unread += ["corda_method"]
        return {name: value for name, value in options.items() if name not in unread}

    return type(first) is type(second) and meaning(first) == meaning(second)


@functools.lru_cache(maxsize=16)  # a model has few shapes and many layers
def _random_pairs(R: int, entries: int | None, d: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    rows, cols = [], []
    for i in range(R):
        count = entries or min(i + d, R - 1) - max(i - d, 0) + 1
        others = torch.randperm(R - 1, generator=generator, device="cpu")[: count - 1]
        columns = torch.cat([torch.tensor([i], device="cpu"), others + (others >= i)]).sort().values
        rows.append(torch.full_like(columns, i))
        cols.append(columns)
    return torch.cat(rows), torch.cat(cols)


def _check_spectral(kind: SVF | SVFT) -> None:
    if kind.rank is not None:
        _check_int("rank", kind.rank)
    _check_choice("form", kind.form, FORMS)
    _check_choice("factors", kind.factors, (*FACTORS, None))


def _check_int(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _check_rank(rank: int, out_features: int, in_features: int) -> None:
    if rank > min(out_features, in_features):
        raise ValueError(
            f"rank must be at most min(out_features, in_features) = {min(out_features, in_features)} "
            f"for a layer {out_features} x {in_features}, got {rank}"
        )
