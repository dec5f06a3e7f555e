"""How several changes of one weight become one: entry by entry, as task vectors are merged."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

METHODS = ("sum", "svd", "ties", "dare", "dare_ties", "magnitude")
_PRUNING = METHODS[2:]


def check_method(method: Any, density: Any, seed: Any) -> None:
    """Raise ValueError unless the method is known and has the density that it needs."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method not in _PRUNING:
        if density is not None:
            raise ValueError(f"density is for {', '.join(_PRUNING)}, and method is {method!r}, which keeps every entry")
    elif isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1 for method {method!r}, got {density!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be an int of at least 0, got {seed!r}")


def generator_for(seed: int, name: str = "") -> torch.Generator:
    """Random numbers of a layer, which do not depend on the other layers."""
    return torch.Generator().manual_seed(seed + zlib.crc32(name.encode()) if name else seed)


def merge_entries(
    changes: Sequence[Tensor], weights: Sequence[float], method: str, density: float | None, generator: torch.Generator
) -> Tensor:
    """One change of several, in their shape; :func:`.combine.combine` has the formulas."""
    if method in ("sum", "svd"):
        return torch.stack([weight * change for change, weight in zip(changes, weights, strict=True)]).sum(0)
    assert density is not None
    if method.startswith("dare"):
        kept = [_drop(change, density, generator) for change in changes]
    else:
        kept = [_trim(change, density) for change in changes]
    total = torch.zeros_like(kept[0])
    if not method.endswith("ties"):
        for change, weight in zip(kept, weights, strict=True):
            total += weight * change
        return total
    sign = torch.where(sum(kept, torch.zeros_like(total)) >= 0, 1.0, -1.0)
    count = torch.zeros_like(total)
    for change, weight in zip(kept, weights, strict=True):
        agrees = change.sign() == sign
        total += torch.where(agrees, weight * change, 0.0)
        count += agrees
    return total / count.clamp(min=1)


def merge_cores(
    entries: Sequence[Tensor],
    weights: Sequence[float],
    method: str,
    density: float | None,
    generator: torch.Generator,
    stacked: bool,
) -> Tensor:
    """:func:`merge_entries` of the entries of cores; stacked: of each expert by itself, the first dimension."""
    if not stacked:
        return merge_entries(entries, weights, method, density, generator)
    experts = zip(*(core.unbind() for core in entries), strict=True)
    return torch.stack([merge_entries(own, weights, method, density, generator) for own in experts])


def _trim(change: Tensor, density: float) -> Tensor:
    """The density · count entries of the largest magnitude; the others become 0."""
    flat = change.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)


def _drop(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability ``density``, divided by it; else 0."""
    keep = torch.bernoulli(torch.full(change.shape, density), generator=generator)
    return change * keep.to(change.device) / density
