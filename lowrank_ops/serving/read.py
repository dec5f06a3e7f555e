"""Lay out an adapter's bytes for a pool: factors and cores side by side, and the table's rows with their positions."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..adapters.linear import AdaptedLayer
from ..adapters.peft_files import all_finite
from ..formats import FLOAT_DTYPES, QuantizedWeight
from ..functional import LowRankUpdate
from ..kernels.operands import Core, Matrix
from ..ops import arena
from .own import Part, Parts
from .route import most_ranks

_LARGEST = torch.finfo(torch.float32).max


@dataclass(eq=False)
class Rows:
    """Rows of the tables relative to the first byte of an adapter; adapters of one layout share them."""

    fields: Tensor  # int64 [sites, FIELDS]
    own: Tensor  # int64 [sites, FIELDS]: 1 where a field is an offset from the adapter's first byte


@dataclass(frozen=True, eq=False)
class Laid:
    """An adapter in host memory.

    Attributes:
        rows: its rows of the tables.
        memory: its bytes.
        families: keys of the factors that it shares with other adapters.
        factors: the bytes of shared factors by key.
        own: name of a module -> the parts that the adapter has of its own there.
    """

    rows: Rows
    memory: Tensor
    families: tuple[tuple[Any, ...], ...]
    factors: Mapping[tuple[Any, ...], list[Tensor]]
    own: Mapping[str, Parts]


class Layout:
    """The layout of the adapters of one model.

    Args:
        layers: by name, in the order of ``sites``: linear layers and stacks of experts.
        sites: id of a layer -> its row of the tables.
        dtype: dtype of factors and cores; None keeps the files' dtypes.
        device: the device of the pool.

    Attributes:
        laid: shared factors by family, as laid out in the arena.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaptedLayer],
        sites: Mapping[int, int],
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.layers, self.sites, self.dtype, self.device = layers, sites, dtype, device
        self.laid: dict[tuple[Any, ...], tuple[list[int], list[Tensor]]] = {}

    def lay_out(
        self,
        updates: Mapping[str, tuple[LowRankUpdate, tuple[Any, ...] | None]],
        own: Mapping[str, Mapping[str, Tensor | float]],
    ) -> Laid:
        """Lay an adapter's parts out side by side, and collect the factors of its families."""
        parts: list[Tensor] = []
        size = 0
        shared: dict[tuple[Any, ...], list[Tensor]] = {}

        def place(tensor: Tensor) -> int:
            nonlocal size
            begin, size = size, size + arena.align(tensor.nbytes)
            parts.append(arena.bytes_of(tensor.cpu()))
            return begin

        rounded: dict[str, list[Tensor]] = {}
        rows, inside = ([[0] * len(arena.FIELDS) for _ in self.layers] for _ in range(2))
        for layer_name, (update, family) in updates.items():
            layer, rank = self.layers[layer_name], update.rank
            if rank > (limit := most_ranks(layer)):
                raise ValueError(f"{layer_name}: the update has rank {rank}, and at most {limit} can be routed there")
            site = self.sites[id(layer)]
            core = update.core
            scale = float(update.scale)
            if not abs(scale) <= _LARGEST:
                raise ValueError(f"{layer_name}: s = {scale} does not fit in float32")
            here = rounded[layer_name] = []
            values = None if core is None else Core(self._convert(core.values, here), core.index)
            if family is None:
                down, up = (self._matrix(factor, here) for factor in (update.down, update.up))
                placed = arena.factor_fields(down, up, place)
            else:
                placed, shared[family] = self._lay_out_family(family, update)
            rows[site] = fields = arena.row(rank, placed, values, scale, place, update.experts)
            for at in arena.OFFSETS if family is None else arena.OFFSETS[-2:]:
                inside[site][at] = int(fields[at] >= 0)
        # Check all at once, as when the files were read.
        if not all_finite(tensor for here in rounded.values() for tensor in here):
            raise self._too_large(next(layer_name for layer_name, here in rounded.items() if not all_finite(here)))
        whole = {
            module: {
                key: Part(place(value), value.dtype, value.shape) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }
            for module, values in own.items()
        }
        memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.device.type == "cuda")
        padding = torch.zeros(arena.ALIGNMENT, dtype=torch.uint8, device="cpu")
        gaps = (-part.numel() % arena.ALIGNMENT for part in parts)
        padded = [(part, padding[:gap]) if gap else (part,) for part, gap in zip(parts, gaps, strict=True)]
        torch.cat([*chain.from_iterable(padded)], out=memory)
        families = tuple(family for _, family in updates.values() if family is not None)
        return Laid(Rows(_integers(rows), _integers(inside)), memory, families, shared, whole)

    def _lay_out_family(self, family: tuple[Any, ...], update: LowRankUpdate) -> tuple[list[int], list[Tensor]]:
        """Lay out shared factors, which are placed separately: fields relative to the family, and bytes in order."""
        laid = self.laid.get(family)
        if laid is None:
            parts: list[Tensor] = []
            rounded: list[Tensor] = []

            def place(tensor: Tensor) -> int:
                parts.append(tensor)
                return sum(arena.align(part.nbytes) for part in parts[:-1])

            down, up = (self._matrix(factor, rounded) for factor in (update.down, update.up))
            laid = arena.factor_fields(down, up, place), parts
            if not all_finite(rounded):
                raise self._too_large(family[1])
            self.laid[family] = laid
        return laid

    def _too_large(self, layer_name: str) -> ValueError:
        return ValueError(
            f"{layer_name}: a number of the adapter is too large for {self.dtype or torch.float32}, which the pool keeps"
        )

    def _convert(self, values: Tensor, rounded: list[Tensor]) -> Tensor:
        """Convert to the pool's dtype; add results that may have become infinite to ``rounded``."""
        values = values.detach()
        dtype = self.dtype or (values.dtype if values.dtype in FLOAT_DTYPES else torch.float32)
        if dtype == values.dtype:
            return values.contiguous()
        kept = values.to(dtype).contiguous()
        rounded.append(kept)
        return kept

    def _matrix(self, factor: Tensor | QuantizedWeight, rounded: list[Tensor]) -> Matrix:
        return factor.operand() if isinstance(factor, QuantizedWeight) else Matrix(self._convert(factor, rounded))


def _integers(rows: Sequence[Sequence[int]]) -> Tensor:
    """Make an int64 tensor; torch.tensor takes several times as long for lists of lists."""
    flat = array("q", chain.from_iterable(rows))
    return torch.frombuffer(flat, dtype=torch.int64).view(len(rows), -1)
