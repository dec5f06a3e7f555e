"""Combine updates into one, and convert any update to a plain LoRA: exactly, or to a given rank with the error reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cores
from ..cores import Core
from ..formats import QuantizedWeight
from ..functional import LowRankUpdate
from .linear import AdaptedLayer, check_unsplit, check_whole


class Conversion(NamedTuple):
    """A converted update, and ‖ΔW − ΔW'‖ / ‖ΔW‖ in the Frobenius norm, 0 if exact up to rounding."""

    update: LowRankUpdate
    error: float


def combine(updates: Sequence[tuple[LowRankUpdate | AdaptedLayer, float]], rank: int | None = None) -> LowRankUpdate:
    """ΔW = Σ w_i · ΔW_i, over the original weight.

    Updates with cores between the same factors (LoRA-XS, SVF, SVFT over one weight) become one of the same size, with the
    sum of the cores: with C = S (Z − I) that is Z = I + Σ w_i (Z_i − I). Others become a LoRA, D = [D₁; D₂; …] and
    U = [w₁s₁U₁C₁, w₂s₂U₂C₂, …]. With a changed base (PiSSA, MiLoRA, LoftQ) ΔW_i is s · (U D − U₀ D₀), of rank 2R; in
    the replace form it is what training added to U diag(S) Vᵀ. A single update of weight 1 over an unchanged base is
    returned unchanged.

    Args:
        updates: pairs (an update or a layer with one, its weight), all of the same shape [N, K], or
            [E, N, K] for experts.
        rank: at most this rank, by the SVD of ΔW, which is never built: QR of both factors, SVD of the small matrix
            between. None: exact.

    Raises:
        ValueError: there is no update; a layer has no adapter or only its part of a sharded one; shapes differ; a
            weight is not finite; the rank is out of range.
        TypeError: an entry is not a pair of an update or a layer and a number.

    Numerics: factors in float32 (QR and small SVD in float64); dropout is not applied. Nothing carries gradients.

    Source: exact merging of low-rank factors as in PEFT's "cat", and with shared factors as in SVFT, arXiv 2405.19597.
    """
    parts = _parts(updates)
    _check(parts, rank)
    first = parts[0][0]
    with torch.no_grad():
        if rank is None and len(parts) == 1 and parts[0][1] == 1:
            return first
        if rank is None and all(_same_factors(first, update) for update, _ in parts) and first.core is not None:
            terms = [(u.core, weight * u.scale / first.scale) for u, weight in parts if u.core is not None]
            if len(terms) == len(parts):
                return LowRankUpdate(first.down, first.up, _add(terms), first.scale)
        return _stack(parts, rank).update


def convert(source: LowRankUpdate | AdaptedLayer, to: str = "lora", rank: int | None = None) -> Conversion:
    """ΔW = s · U C D as a plain LoRA, U' = s · U C and D' = D, or its best approximation of a lower rank.

    Args:
        source: an update, or a layer with one. A LoRA with a changed base (PiSSA, MiLoRA, LoftQ) becomes a LoRA of the
            original weight, s · (U D − U₀ D₀), of rank 2R.
        to: ``"lora"``.
        rank: of the result; None: exact.

    Returns:
        update, with scale 1, and error.

    Raises:
        ValueError: another ``to``; a rank out of range; a layer without an adapter or with a part of a sharded one.
        TypeError: source is neither an update nor a layer.

    Numerics: as :func:`combine`.
    """
    if to != "lora":
        raise ValueError(f"to must be 'lora', got {to!r}")
    if not isinstance(source, LowRankUpdate | AdaptedLayer):
        raise TypeError(f"source must be a LowRankUpdate or a lowrank_ops.Linear, got {type(source).__name__}")
    parts = _parts([(source, 1.0)])
    _check(parts, rank)
    with torch.no_grad():
        return _stack(parts, rank)


def _parts(updates: Sequence[tuple[LowRankUpdate | AdaptedLayer, float]]) -> list[tuple[LowRankUpdate, float]]:
    """Check updates and weights; make each update relative to the original weight."""
    parts = []
    for pair in updates:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], LowRankUpdate | AdaptedLayer)):
            raise TypeError(f"updates must be pairs (LowRankUpdate or lowrank_ops.Linear, weight), got {pair!r}")
        source, weight = pair
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"the weight of an update must be a finite number, got {weight!r}")
        if isinstance(source, AdaptedLayer):
            check_unsplit(source)
            check_whole(source)
            if (update := source.update) is None:
                raise ValueError(f"a layer must have an adapter to be combined or converted, got {source!r}")
        else:
            update = source
        if update.base is None:
            parts.append((update, weight))
        else:
            parts += [(replace(update, base=None), weight), *_parts([(update.base, -weight)])]
    return parts


def _stack(parts: Sequence[tuple[LowRankUpdate, float]], rank: int | None) -> Conversion:
    """Sum the updates as a LoRA, or as its best approximation of a rank."""
    down = torch.cat([_dense(update.down) for update, _ in parts], -2)
    up = torch.cat([weight * update.scale * _left(update) for update, weight in parts], -1)
    return Conversion(LowRankUpdate(down, up), 0.0) if rank is None else _truncate(down, up, rank)


def _check(updates: Sequence[tuple[LowRankUpdate, float]], rank: int | None) -> None:
    if not updates:
        raise ValueError("updates must not be empty")
    shapes = {update.shape for update, _ in updates}
    if len(shapes) > 1:
        raise ValueError(f"updates must be of one shape [N, K], got {sorted(shapes)}")
    smallest = min(shapes.pop()[-2:])
    if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= smallest):
        raise ValueError(f"rank must be in 1 … {smallest} for updates of this shape, got {rank!r}")


def _dense(factor: Tensor | QuantizedWeight) -> Tensor:
    return factor.dequantize(torch.float32) if isinstance(factor, QuantizedWeight) else factor.detach().float()


def _left(update: LowRankUpdate) -> Tensor:
    """U C [N, R]."""
    up = _dense(update.up)
    return up if update.core is None else up @ update.core.dense().float()


def _same_factors(a: LowRankUpdate, b: LowRankUpdate) -> bool:
    return all(_equal(x, y) for x, y in ((a.down, b.down), (a.up, b.up)))


def _equal(a: Tensor | QuantizedWeight, b: Tensor | QuantizedWeight) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or a.shape != b.shape or a.device != b.device:
        return False
    if isinstance(a, QuantizedWeight) and isinstance(b, QuantizedWeight):
        mine, theirs = list(a.buffers()), list(b.buffers())
        return len(mine) == len(theirs) and all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return a.dtype == b.dtype and torch.equal(a, b)


def _add(terms: Sequence[tuple[Core, float]]) -> Core:
    """Σ w_i · C_i on the union of the patterns."""
    first = terms[0][0]
    if all(type(c) is type(first) and c.values.shape == first.values.shape for c, _ in terms):
        indices = [c.index for c, _ in terms]
        if all(i is None for i in indices) or all(
            i is not None and first.index is not None and torch.equal(i, first.index) for i in indices
        ):
            return cores.with_values(first, torch.stack([w * c.values.detach() for c, w in terms]).sum(0))
    if any(isinstance(c, cores.Dense) for c, _ in terms):
        return cores.Dense(torch.stack([w * c.dense().detach() for c, w in terms]).sum(0))
    # Unite sparse patterns in one sparse core; entries at the same place are added in the order of the terms.
    R = first.size
    entries = [(*cores.pattern(c), w * c.values.detach()) for c, w in terms]
    flat = torch.cat([rows * R + cols for rows, cols, _ in entries])
    pairs, where = flat.unique(return_inverse=True)
    values = entries[0][2].new_zeros(*first.values.shape[:-1], len(pairs))
    for part, (_, _, more) in zip(where.split([e[2].shape[-1] for e in entries]), entries, strict=True):
        values[..., part] += more
    return cores.Sparse(pairs // R, pairs % R, values, R)


def _truncate(down: Tensor, up: Tensor, rank: int) -> Conversion:
    """The best U' D' of a rank for U D, from QR of both and the SVD of the matrix between them."""
    left, left_rest = torch.linalg.qr(up.double())
    right, right_rest = torch.linalg.qr(down.double().mT)
    u, s, vt = torch.linalg.svd(left_rest @ right_rest.mT)
    kept = min(rank, s.shape[-1])
    root = s[..., :kept].sqrt()
    error = s[..., kept:].norm() / s.norm() if s.norm() > 0 else 0.0
    return Conversion(
        LowRankUpdate(
            (root.unsqueeze(-1) * (vt[..., :kept, :] @ right.mT)).float().contiguous(),
            ((left @ u[..., :kept]) * root.unsqueeze(-2)).float().contiguous(),
        ),
        float(error),
    )
