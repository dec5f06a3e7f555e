"""Starts that look at data: EVA, CorDA and LoRA-GA, from the moments of a layer's inputs and the gradient of its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..formats import Moment
from ..svd.decompose import full_svd
from ..svd.store import largest
from .kinds import LoRA

# What is added to C before it is inverted, as a share of the mean of its diagonal.
_DAMPING = 0.01
# γ of LoRA-GA: the square of how much smaller than a unit the first products are.
_GAMMA = 16


def principal_inputs(moment: Moment, rank: int) -> tuple[Tensor, Tensor]:
    """The R main directions of a layer's inputs around their mean, and the share of the variance that each explains.

        Σ = E[x xᵀ] − E[x] E[x]ᵀ = V diag(λ) Vᵀ,  share_i = λ_i / Σ_j λ_j

    Args:
        moment: of one matrix, K inputs.
        rank: R, at most K.

    Returns:
        V_Rᵀ [R, K] with orthonormal rows and the R shares, float32; the shares are 0 if all inputs are equal.

    Numerics: Σ is formed in float64 from float32 moments, which costs 2⁻²⁴ · E[x]² of it; decomposed as by
    :func:`lowrank_ops.truncated_svd`.
    """
    mean = moment.mean.double()
    covariance = moment.second.double() - mean.outer(mean)
    total = covariance.diagonal().sum().clamp(min=0)
    _, values, directions = largest(covariance.float(), rank)
    return directions, (values.double() / total if total > 0 else torch.zeros_like(values).double()).float()


def share_ranks(kinds: Mapping[str, LoRA], moments: Mapping[str, Moment]) -> dict[str, LoRA | None]:
    """EVA's ranks: each of the Σ R ranks goes to the direction that explains the largest share of its layer's inputs.

    A layer gets at most ``round(rank · rho)`` of them, and at most min(N, K); one that gets none has no adapter. alpha
    follows the rank, so that s stays as it was. The shares of a stack are the means over its experts. Where shares are
    equal, as of layers with one input, the earlier layer comes first.

    Source: arXiv 2410.07170, section 3.

    Args:
        kinds: layer name -> its kind, with ``init="eva"``.
        moments: layer name -> its moments.
    """
    shares: list[tuple[float, str]] = []
    known: dict[int, Tensor] = {}  # by the tensor that layers share
    most = {name: min(round(kind.rank * kind.rho), *moments[name].shape[-2:]) for name, kind in kinds.items()}
    widest: dict[int, int] = {}
    for name in kinds:
        key = id(moments[name].second)
        widest[key] = max(widest.get(key, 0), most[name])
    for name in kinds:
        key = id(moments[name].second)
        if key not in known:
            moment = moments[name].shrunk()
            parts = [moment] if len(moment.shape) == 2 else [moment[e] for e in range(moment.shape[0])]
            known[key] = torch.stack([principal_inputs(part, widest[key])[1] for part in parts]).mean(0)
        shares += [(share, name) for share in known[key][: most[name]].tolist()]
    budget = sum(kind.rank for kind in kinds.values())
    ranks = dict.fromkeys(kinds, 0)
    for _, name in sorted(shares, key=lambda pair: -pair[0])[:budget]:  # a stable sort
        ranks[name] += 1
    return {name: _of_rank(kind, ranks[name]) for name, kind in kinds.items()}


def _of_rank(kind: LoRA, rank: int) -> LoRA | None:
    """The kind with another rank and the same s."""
    if not rank or rank == kind.rank:
        return kind if rank else None
    ratio = rank / kind.rank
    return replace(kind, rank=rank, alpha=kind.alpha * (math.sqrt(ratio) if kind.rslora else ratio))


def corda_factors(kind: LoRA, weight: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
    """D and U of CorDA: the part of W that matters most, or least, to the layer's inputs.

        W C = U* diag(S) V*ᵀ,  D = √(S/s) V*ᵀ C⁻¹,  U = U* √(S/s)

    over the R largest S (``corda_method="ipm"``, what the inputs use is trained) or the R smallest (``"kpm"``, what they
    use is kept). C is E[x xᵀ] divided by the mean of its diagonal, so that the unit of x does not matter, plus 0.01 on its
    diagonal.

    Numerics: C⁻¹ by Cholesky in float64. The R largest as by :func:`lowrank_ops.truncated_svd`; the R smallest by a full
    decomposition in float64, since those of W C spread over many orders of magnitude.

    Source: arXiv 2406.05223, equations 3 to 5.
    """
    R, w = kind.rank, weight.double()
    C = moment.second.to(weight.device).double()
    C = (C + C.T) / (2 * C.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    C.diagonal().add_(_DAMPING)
    if kind.corda_method == "ipm":
        U, S, Vt = (part.double() for part in largest((w @ C).float(), R))
    else:
        U, S, Vt = torch.linalg.svd(w @ C, full_matrices=False)
        U, S, Vt = U[:, -R:], S[-R:], Vt[-R:]
        U, Vt = _with_signs(U, Vt)
    root = (S / kind.scale).sqrt()
    down = torch.cholesky_solve((root.unsqueeze(1) * Vt).T, torch.linalg.cholesky(C)).T
    return down.float().contiguous(), (U * root).float().contiguous()


def _with_signs(U: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of every column of U above 0, as elsewhere."""
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return U * signs, Vt * signs.T


def check_gradient(gradient: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError unless this is a gradient of a weight of the shape."""
    if gradient is None:
        raise ValueError(
            "init='loraga' needs gradients, and the calibration has none: lowrank_ops.calibrate(model, batches, "
            "gradients=True)"
        )
    if tuple(gradient.shape) != tuple(shape) or not torch.isfinite(gradient).all():
        raise ValueError(f"the gradient must be finite numbers {list(shape)}, got {list(gradient.shape)}")
    if not gradient.any():
        raise ValueError("the gradient is 0, and init='loraga' has nothing to start from")


def loraga_factors(kind: LoRA, moment: Moment, device: torch.device) -> tuple[Tensor, Tensor]:
    """D and U of LoRA-GA, whose first step moves s · U D as a step on W would, as far as 2 R directions can.

        G = dL/dW = U* diag(S) V*ᵀ,  D = c V*ᵀ[:R],  U = c U*[:, R:2R],  c = N^¼ / √γ, γ = 16

    Numerics: G in float32, decomposed as by :func:`lowrank_ops.truncated_svd`.

    Source: arXiv 2407.05000, theorem 3.2 and algorithm 1.
    """
    assert moment.gradient is not None
    R, G = kind.rank, moment.gradient.to(device).float()
    # The smallest numbers of a gradient would leave float32 when they are squared.
    G = G / G.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    U, _, Vt = largest(G, 2 * R) if 2 * R < min(G.shape) else full_svd(G)
    length = G.shape[0] ** 0.25 / math.sqrt(_GAMMA)
    return (length * Vt[:R]).contiguous(), (length * U[:, R : 2 * R]).contiguous()
