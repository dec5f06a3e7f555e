"""Low-rank parts of an error that are best for the layer's inputs, not for the error's own numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Up to this min(N, K), the problem is solved whole; above it only for its largest values, if they are few.
_WHOLE = 384
# The Krylov space has this many directions more than the rank in each of its blocks, and this many blocks.
_OVERSAMPLE, _BLOCKS = 8, 6


def weighted_low_rank(error: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The D and U of rank R that minimise ‖(E − U D) H^½‖_F: the squared error of outputs for inputs with E[x xᵀ] = H.

    With the R largest eigenvectors U* of G = E H Eᵀ the minimum is at U D = U* U*ᵀ E. H is never inverted, so it may be
    singular. If K < N, U* comes from the eigenvectors of the [K, K] problem Sᵀ Eᵀ E S with S Sᵀ = H: U* spans E S V.
    What remains is Σ σ_i² for i > R, with σ² of :func:`weighted_spectrum`.

    Args:
        error: E [N, K], W less what is kept of it; or a stack [B, N, K].
        second_moment: H [K, K] or [B, K, K], symmetric and not negative.
        rank: R, from 1 to min(N, K).

    Returns:
        D [R, K] and U [N, R], or with a leading B, float32, the i-th row of D and column of U of equal length. They are 0
        beyond the rank of E H^½.

    Raises:
        ValueError: a shape does not fit; the rank is out of range; a number is not finite.

    Numerics: min(N, K) up to 384, or a rank above an eighth of it: eigenvectors in float64. Otherwise the R largest come
    from a Krylov space of six blocks of R + 8 directions, products in float32 and the small problem in float64; what
    remains is then above the minimum by less than 0.1 % for spectra of rounding errors.

    Source: the closed form as in QERA, arXiv 2410.06040, and CLoQ, arXiv 2501.18475; the route by G needs no root of H.
    Block Krylov methods: Musco and Musco, arXiv 1504.05477.
    """
    _check(error, second_moment, rank)
    with torch.no_grad(), torch.autocast(error.device.type, enabled=False):
        values, left = _largest(error, second_moment, rank)
        down = left.mT @ error.double()
        lengths = down.norm(dim=-1)
        # Directions without weight are rounding alone.
        tiny = max(error.shape[-2:]) * torch.finfo(torch.float32).eps ** 2 * values[..., :1]
        kept = (values > tiny) & (lengths > 0)
        root = torch.where(kept, lengths, 1.0).sqrt()
        down = torch.where(kept.unsqueeze(-1), down / root.unsqueeze(-1), 0.0)
        up = torch.where(kept.unsqueeze(-2), left * root.unsqueeze(-2), 0.0)
        return down.float().contiguous(), up.float().contiguous()


def weighted_spectrum(error: Tensor, second_moment: Tensor, rank: int | None = None) -> Tensor:
    """σ² of E H^½, descending: by how much each further rank of :func:`weighted_low_rank` lowers the weighted error.

    Args:
        error, second_moment: as in :func:`weighted_low_rank`.
        rank: how many, from 1 to min(N, K); None for all.

    Returns:
        [R] or [B, R], float64. Their sum over all is ‖E H^½‖²_F.

    Raises:
        ValueError: as :func:`weighted_low_rank`.
    """
    rank = min(error.shape[-2:]) if rank is None else rank
    _check(error, second_moment, rank)
    with torch.no_grad(), torch.autocast(error.device.type, enabled=False):
        return _largest(error, second_moment, rank)[0]


def weighted_norm(error: Tensor, second_moment: Tensor) -> Tensor:
    """‖E H^½‖²_F = tr(E H Eᵀ), float64; [B] of a stack."""
    with torch.no_grad(), torch.autocast(error.device.type, enabled=False):
        e = error.float()
        # Where E H is nearly 0, its rounding can make the sum negative.
        return ((e @ second_moment.float()) * e).sum((-2, -1), dtype=torch.float64).clamp(min=0)


def _check(error: Tensor, second_moment: Tensor, rank: Any) -> None:
    if error.dim() not in (2, 3) or second_moment.shape != (*error.shape[:-2], error.shape[-1], error.shape[-1]):
        raise ValueError(
            f"second_moment must be [K, K] for an error [N, K], or [B, K, K] for a stack [B, N, K], got "
            f"{list(second_moment.shape)} for {list(error.shape)}"
        )
    smallest = min(error.shape[-2:])
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= smallest:
        raise ValueError(f"rank must be from 1 to min(N, K) = {smallest} for {list(error.shape)}, got {rank!r}")
    for name, tensor in (("error", error), ("second_moment", second_moment)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity in it")


def _largest(error: Tensor, H: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The R largest eigenvalues of G = E H Eᵀ and their eigenvectors [N, R], float64."""
    N, K = error.shape[-2:]
    if min(N, K) > _WHOLE and 8 * rank <= min(N, K):
        return _krylov(error, H, rank)
    e, h = error.double(), H.double()
    h = (h + h.mT) / 2
    if N <= K:
        values, vectors = torch.linalg.eigh(e @ h @ e.mT)
    else:
        scales, axes = torch.linalg.eigh(h)
        es = e @ (axes * scales.clamp(min=0).sqrt().unsqueeze(-2))
        values, vectors = torch.linalg.eigh(es.mT @ es)
        vectors = es @ vectors
        # E S V has orthogonal columns of length σ. Those without length are dropped by the caller.
        vectors = vectors / vectors.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return values.flip(-1)[..., :rank].clamp(min=0), vectors.flip(-1)[..., :rank]


def _krylov(error: Tensor, H: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same from the space of Q, G Q, G² Q, …, by Rayleigh and Ritz."""
    e, h = error.float(), H.float()
    # A scale for G keeps float32 from its ends.
    scale = e.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    weight = h.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp(min=torch.finfo(torch.float32).tiny)
    e, h = e / scale, h / weight
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(e.shape[-2], rank + _OVERSAMPLE, generator=generator, device="cpu", dtype=torch.float32)
    block = torch.linalg.qr(start.to(e.device).expand(*e.shape[:-2], -1, -1)).Q
    basis = block
    for _ in range(_BLOCKS - 1):
        block = e @ (h @ (e.mT @ block))
        for _ in range(2):  # once loses orthogonality to rounding
            block = block - basis @ (basis.mT @ block)
            block = torch.linalg.qr(block).Q
        basis = torch.cat([basis, block], -1)
    basis = torch.linalg.qr(basis.double()).Q
    through = (e.mT @ basis.float()).double()
    values, vectors = torch.linalg.eigh(through.mT @ (h @ through.float()).double())
    values = values.flip(-1)[..., :rank].clamp(min=0) * (scale.double().square() * weight.double()).squeeze(-1)
    return values, basis @ vectors.flip(-1)[..., :rank]
