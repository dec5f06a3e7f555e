"""Rows with several adapters at once, each at a strength of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What a row goes through: an adapter at full strength, several by name, each at its strength, or None for the base.
Adapters = str | Mapping[str, float] | None
# The same as (name, strength) in the order of names, in which their updates are summed.
Mixture = tuple[tuple[str, float], ...]
# The most adapters of a row.
MOST = 8
STRONGEST = torch.finfo(torch.float32).max


def mixture(given: Adapters, argument: str = "names") -> Mixture:
    """The adapters of a row with their strengths, in the order of their names.

    Raises:
        TypeError: given is neither a name, nor names with strengths, nor None; a strength is no number.
        ValueError: there are no names in it or more than 8; a strength is not finite.
    """
    if given is None:
        return ()
    if isinstance(given, str):
        return ((given, 1.0),)
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(
            f"{argument} must have a name, a mapping of names to strengths or None for each row, got {given!r}"
        )
    if not 0 < len(given) <= MOST:
        raise ValueError(
            f"{argument} must have 1 to {MOST} adapters for a row, got {len(given)}; None is the base alone"
        )
    for name, strength in given.items():
        if not isinstance(strength, Real) or isinstance(strength, bool):
            raise TypeError(f"{argument}: the strength of {name!r} must be a number, got {strength!r}")
        if not -STRONGEST <= strength <= STRONGEST:
            raise ValueError(f"{argument}: the strength of {name!r} must be finite in float32, got {strength}")
    return tuple(sorted((name, float(strength)) for name, strength in given.items()))


class Entries(NamedTuple):
    """The slots of tokens or rows and their strengths, as :func:`lowrank_ops.functional.routed` takes them.

    Attributes:
        slots: int32 [T], or [T, S] with strengths; -1 where there is none.
        strengths: float32 [T, S]; None if every token has at most one adapter, at full strength.
        columns: the columns of slots, S times int32 [T].
    """

    slots: Tensor
    strengths: Tensor | None
    columns: tuple[Tensor, ...]

    @classmethod
    def of(cls, mixtures: Sequence[Mixture], slot_of: Mapping[str, int]) -> Entries:
        """The entries of mixtures; slot_of: the slot of each name."""
        count = max((len(m) for m in mixtures), default=0)
        if count <= 1 and all(strength == 1 for m in mixtures for _, strength in m):
            alone = [slot_of[m[0][0]] if m else -1 for m in mixtures]
            return cls.made(torch.tensor(alone, dtype=torch.int32, device="cpu"), None)
        slots = torch.full((len(mixtures), count), -1, dtype=torch.int32, device="cpu")
        strengths = torch.ones(len(mixtures), count, device="cpu")
        for row, m in enumerate(mixtures):
            slots[row, : len(m)] = torch.tensor([slot_of[name] for name, _ in m], dtype=torch.int32, device="cpu")
            strengths[row, : len(m)] = torch.tensor([strength for _, strength in m], device="cpu")
        return cls.made(slots, strengths)

    @classmethod
    def made(cls, slots: Tensor, strengths: Tensor | None) -> Entries:
        """Entries of these tensors."""
        columns = (slots,) if strengths is None else tuple(column.contiguous() for column in slots.unbind(1))
        return cls(slots, strengths, columns)

    def at(self, rows: Tensor) -> Entries:
        """The entries at some positions."""
        rows = rows.to(self.slots.device)
        return Entries.made(self.slots[rows], None if self.strengths is None else self.strengths[rows])

    def to(self, device: torch.device) -> Entries:
        """The same on a device."""
        return Entries.made(self.slots.to(device), None if self.strengths is None else self.strengths.to(device))

    def mixed(self, base: Tensor, of_columns: Sequence[Tensor], holders: Tensor, otherwise: Tensor) -> Tensor:
        """y = base + Σ_j strength_j (y_j - base), for tokens some of whose adapters hold something of their own.

        Args:
            base: [T, …], without adapters.
            of_columns: S times y_j [T, …], with the adapters of one column at full strength.
            holders: bool [1 + slots, 1]: whether an adapter holds something here; first, for none, False.
            otherwise: [T, …], of tokens whose adapters hold nothing here.

        Returns:
            y in the dtype of of_columns; a token with one adapter, at full strength, has the bits of its column.

        Numerics: the sum in float32.
        """
        assert self.strengths is not None
        first = of_columns[0]
        wide = (len(first), *[1] * (first.dim() - 1))
        total = base.float()
        for y, strength in zip(of_columns, self.strengths.unbind(1), strict=True):
            total = total + strength.view(wide) * (y.float() - base.float())
        alone = (self.slots[:, 1:] < 0).all(1) & (self.strengths[:, 0] == 1)
        held = holders[:, 0][self.slots.long() + 1].any(1)
        return torch.where(held.view(wide), torch.where(alone.view(wide), first, total.to(first.dtype)), otherwise)


def names_of(mixtures: Sequence[Any]) -> list[str]:
    """The names in mixtures, once each, sorted."""
    return sorted({name for m in mixtures for name, _ in m})
