"""Combine updates into one, and convert any update to a plain LoRA: exactly, or to a given rank with the error reported."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .. import cores
from ..cores import Core
from ..formats import QuantizedWeight
from ..functional import LowRankUpdate
from ..svd.store import largest
from .linear import AdaptedLayer, check_unsplit, check_whole
from .merging import check_method, generator_for, merge_cores, merge_entries
from .names import call_named
from .update_files import read_layers


class Conversion(NamedTuple):
    """A converted update, and ‖ΔW − ΔW'‖ / ‖ΔW‖ in the Frobenius norm, 0 if exact up to rounding."""

    update: LowRankUpdate
    error: float


@overload
def combine(
    updates: Sequence[tuple[LowRankUpdate | AdaptedLayer, float]],
    rank: int | None = None,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
) -> LowRankUpdate: ...


@overload
def combine(
    updates: Sequence[tuple[str | os.PathLike[str], float]],
    rank: int | None = None,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
) -> dict[str, LowRankUpdate]: ...


def combine(
    updates: Sequence[tuple[Any, float]],
    rank: int | None = None,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
) -> LowRankUpdate | dict[str, LowRankUpdate]:
    """ΔW = Σ w_i · ΔW_i, or another mixture of several updates, over the original weight.

    ==============  ===========================================================================================
    ``sum``         Σ w_i ΔW_i, exact
    ``svd``         the nearest of rank R to Σ w_i ΔW_i
    ``magnitude``   Σ w_i T(ΔW_i); T keeps the density · count entries of the largest magnitude
    ``dare``        Σ w_i M_i ΔW_i / density; each entry of M_i is 1 with probability density, else 0
    ``ties``        Σ w_i a_i T(ΔW_i) / max(1, Σ a_i); a_i is 1 where T(ΔW_i) has the sign of Σ T(ΔW_i), else 0
    ``dare_ties``   as ``ties``, with M_i ΔW_i / density in place of T(ΔW_i)
    ==============  ===========================================================================================

    Updates with cores between the same factors (LoRA-XS, SVF, SVFT over one weight) become one of the same size: the method
    is applied to the entries of the cores, with C = S (Z − I) for ``sum`` Z = I + Σ w_i (Z_i − I). The sum of others becomes
    a LoRA, D = [D₁; D₂; …] and U = [w₁s₁U₁C₁, w₂s₂U₂C₂, …]. The other methods work on the entries of ΔW_i, one matrix at a
    time, and the result is the nearest LoRA of a rank to what they give. With a changed base (PiSSA, MiLoRA, LoftQ) ΔW_i is
    s · (U D − U₀ D₀), of rank 2R; in the replace form it is what training added to U diag(S) Vᵀ. The sum of a single update
    of weight 1 over an unchanged base is returned unchanged.

    Args:
        updates: pairs (an update, a layer with one, or a directory or file of an adapter, its weight); updates and layers
            all of the same shape [N, K], or [E, N, K] for experts; directories and files alone, not mixed with these.
        rank: at most this rank. None: exact for ``sum``, the largest rank of the updates for ``svd``, and the sum of their
            ranks, at most min(N, K), for the others.
        method: one of the above.
        density: the part of the entries that is kept, above 0 and at most 1; only for methods that drop some.
        seed: of M_i, at least 0.

    Returns:
        The update; of directories the updates by the layers' names. An adapter that lacks a layer changes nothing there.

    Raises:
        ValueError: there is no update; a layer has no adapter or only its part of a sharded one; shapes differ; a
            weight is not finite; the rank, the density or the seed is out of range; the method is unknown. An adapter's
            file is damaged; its updates cannot be told without the model: frozen factors that it does not hold, experts,
            a DoRA, trained parameters beside the updates.
        FileNotFoundError: there is no such adapter.
        TypeError: an entry is not a pair of one of these and a number.

    Numerics: factors in float32 (QR and small SVD in float64); dropout is not applied. Nothing carries gradients.

    Source: exact merging of low-rank factors as in PEFT's "cat", and with shared factors as in SVFT, arXiv 2405.19597;
    TIES, arXiv 2306.01708, and DARE, arXiv 2311.03099. PEFT's methods with "_svd" in their names give the same;
    mergekit's TIES multiplies by the weights before it elects signs.
    """
    check_method(method, density, seed)
    if updates and all(isinstance(pair, tuple) and pair and isinstance(pair[0], str | os.PathLike) for pair in updates):
        layers = read_layers([source for source, _ in _checked_weights(updates)], [weight for _, weight in updates])
        return {
            name: call_named(name, combine_updates, parts, rank, method, density, generator_for(seed, name))
            for name, parts in layers.items()
        }
    return combine_updates(updates, rank, method, density, generator_for(seed))


def combine_updates(
    updates: Sequence[tuple[LowRankUpdate | AdaptedLayer, float]],
    rank: int | None,
    method: str,
    density: float | None,
    generator: torch.Generator,
) -> LowRankUpdate:
    """As :func:`combine`, with a checked method and its source of random numbers."""
    grouped = [_parts([(source, 1.0)]) for source, _ in _checked_pairs(updates)]  # ΔW_i as a sum of products
    weights = [weight for _, weight in updates]
    parts = [(update, own * weight) for group, weight in zip(grouped, weights, strict=True) for update, own in group]
    _check(parts, rank)
    first = parts[0][0]
    with torch.no_grad():
        if method == "sum" and rank is None and len(parts) == 1 and parts[0][1] == 1:
            return first
        if method != "svd" and rank is None and len(parts) == len(updates):
            shared = [u.core for u, _ in parts if u.core is not None and _same_factors(first, u)]
            if len(shared) == len(parts):
                scales = [u.scale / first.scale for u, _ in parts]
                core = _merge(shared, scales, weights, method, density, generator)
                return LowRankUpdate(first.down, first.up, core, first.scale)
        if method == "svd" and rank is None:
            rank = max(sum(update.rank for update, _ in group) for group in grouped)
        if method in ("sum", "svd"):
            return _stack(parts, rank).update
        return _prune(grouped, weights, rank, method, density, generator)


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


def _checked_pairs(updates: Sequence[Any]) -> Sequence[tuple[LowRankUpdate | AdaptedLayer, float]]:
    if not updates:
        raise ValueError("updates must not be empty")
    for pair in updates:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], LowRankUpdate | AdaptedLayer)):
            raise TypeError(
                "updates must be pairs (LowRankUpdate or lowrank_ops.Linear, weight), or all (directory, weight), got "
                f"{pair!r}"
            )
    return _checked_weights(updates)


def _checked_weights(updates: Sequence[Any]) -> Sequence[Any]:
    for pair in updates:
        if len(pair) != 2:
            raise TypeError(f"updates must be pairs with a weight, got {pair!r}")
        if not isinstance(pair[1], int | float) or isinstance(pair[1], bool):
            raise TypeError(f"the weight of an update must be a number, got {pair[1]!r}")
        if not math.isfinite(pair[1]):
            raise ValueError(f"the weight of an update must be a finite number, got {pair[1]!r}")
    return updates


def _parts(updates: Sequence[tuple[LowRankUpdate | AdaptedLayer, float]]) -> list[tuple[LowRankUpdate, float]]:
    """Make each update relative to the original weight."""
    parts = []
    for source, weight in updates:
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


def _prune(
    grouped: Sequence[Sequence[tuple[LowRankUpdate, float]]],
    weights: Sequence[float],
    rank: int | None,
    method: str,
    density: float | None,
    generator: torch.Generator,
) -> LowRankUpdate:
    """The LoRA nearest to what a method makes of the entries of ΔW_i, one matrix at a time."""
    pairs = []
    for group in grouped:
        down = torch.cat([_dense(update.down) for update, _ in group], -2)
        pairs.append((torch.cat([own * update.scale * _left(update) for update, own in group], -1), down))
    *stack, N, K = grouped[0][0][0].shape
    rank = min(sum(down.shape[-2] for _, down in pairs), N, K) if rank is None else rank
    made = []
    for e in range(stack[0] if stack else 1):
        changes = [(up[e] @ down[e]) if stack else (up @ down) for up, down in pairs]
        U, S, Vt = largest(merge_entries(changes, weights, method, density, generator), rank)
        made.append((S.sqrt().unsqueeze(1) * Vt, U * S.sqrt()))
    downs, ups = (torch.stack(factors) if stack else factors[0] for factors in zip(*made, strict=True))
    return LowRankUpdate(downs, ups)


def _stack(parts: Sequence[tuple[LowRankUpdate, float]], rank: int | None) -> Conversion:
    """Sum the updates as a LoRA, or as its best approximation of a rank."""
    down = torch.cat([_dense(update.down) for update, _ in parts], -2)
    up = torch.cat([weight * update.scale * _left(update) for update, weight in parts], -1)
    return Conversion(LowRankUpdate(down, up), 0.0) if rank is None else _truncate(down, up, rank)


def _check(updates: Sequence[tuple[LowRankUpdate, float]], rank: int | None) -> None:
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


def _merge(
    terms: Sequence[Core],
    scales: Sequence[float],
    weights: Sequence[float],
    method: str,
    density: float | None,
    generator: torch.Generator,
) -> Core:
    """One core between the same factors, by the entries of scale_i · C_i on the union of the patterns."""

    def merged(values: Sequence[Tensor]) -> Tensor:
        scaled = [scale * entries for entries, scale in zip(values, scales, strict=True)]
        return merge_cores(scaled, weights, method, density, generator, bool(first.experts))

    first = terms[0]
    if all(type(c) is type(first) and c.values.shape == first.values.shape for c in terms):
        indices = [c.index for c in terms]
        if all(i is None for i in indices) or all(
            i is not None and first.index is not None and torch.equal(i, first.index) for i in indices
        ):
            return cores.with_values(first, merged([c.values.detach() for c in terms]))
    if any(isinstance(c, cores.Dense) for c in terms):
        return cores.Dense(merged([c.dense().detach() for c in terms]))
    # Unite sparse patterns in one sparse core.
    R = first.size
    places = [rows * R + cols for rows, cols in map(cores.pattern, terms)]
    pairs, where = torch.cat(places).unique(return_inverse=True)
    spread = []
    for core, part in zip(terms, where.split([len(flat) for flat in places]), strict=True):
        values = core.values.new_zeros(*core.values.shape[:-1], len(pairs))
        values[..., part] += core.values.detach()
        spread.append(values)
    return cores.Sparse(pairs // R, pairs % R, merged(spread), R)


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
