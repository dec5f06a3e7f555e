"""The kinds of adapter. A kind is a frozen dataclass: it is the configuration, it holds no tensor.

Names: ``down`` D [R, K] and ``up`` U [N, R]. The literature's W + A Bᵀ has A = ``up`` and Bᵀ = ``down``; PEFT has
``lora_B.weight`` = ``up`` and ``lora_A.weight`` = ``down``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INITS = ("kaiming", "gaussian", "orthogonal")


@dataclass(frozen=True)
class LoRA:
    """y = W x + s · U (D x), s = alpha / rank, or alpha / √rank for rsLoRA; D and U are trained.

    Args:
        rank: R, at least 1 and at most min(N, K).
        alpha: numerator of s.
        rslora: scale by 1/√rank (arXiv 2312.03732), so that high ranks learn as fast as low ones.
        dropout: probability to drop an element of the adapter's input in training, 0 <= dropout < 1.
        init: how D and U start; each leaves the layer's output as it was.
            ``"kaiming"``: D uniform in ±1/√K, U = 0. ``"gaussian"``: D normal of standard deviation 1/rank, U = 0.
            ``"orthogonal"``: both random in orthogonal subspaces, so that U D = 0 with neither zero; even rank.

    Raises:
        ValueError, TypeError: a value out of its range.

    Source: LoRA, arXiv 2106.09685; over NF4 weights QLoRA, arXiv 2305.14314.
    """

    rank: int = 16
    alpha: float = 32
    rslora: bool = False
    dropout: float = 0.0
    init: str = "kaiming"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool):
            raise TypeError(f"rank must be an int, got {self.rank!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not isinstance(self.rslora, bool):
            raise TypeError(f"rslora must be True or False, got {self.rslora!r}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init='orthogonal' needs an even rank, got {self.rank}")

    @property
    def scale(self) -> float:
        """s, what the update is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def num_parameters(self, out_features: int, in_features: int) -> int:
        """R · (N + K), without making a tensor."""
        self.check(out_features, in_features)
        return self.rank * (out_features + in_features)

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ValueError where a layer of this shape cannot take the kind."""
        if self.rank > min(out_features, in_features):
            raise ValueError(
                f"rank must be at most min(out_features, in_features) = {min(out_features, in_features)} "
                f"for a layer {out_features} x {in_features}, got {self.rank}"
            )

    def factors(
        self, out_features: int, in_features: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fresh D [R, K] and U [N, R], float32, from torch's generator of the device."""
        self.check(out_features, in_features)
        down = torch.empty(self.rank, in_features, device=device)
        up = torch.zeros(out_features, self.rank, device=device)
        if self.init == "kaiming":
            bound = 1 / math.sqrt(in_features)
            down.uniform_(-bound, bound)
        elif self.init == "gaussian":
            down.normal_(std=1 / self.rank)
        else:
            # Disjoint rows of one orthogonal matrix make U D = 0; the tenth keeps the first steps small.
            basis = torch.linalg.qr(torch.randn(self.rank, self.rank, device=device))[0]
            half = self.rank // 2
            down.copy_((torch.randn(in_features, half, device=device) @ basis[:half]).T / 10)
            up.copy_(torch.randn(out_features, half, device=device) @ basis[half:] / 10)
        return down, up
