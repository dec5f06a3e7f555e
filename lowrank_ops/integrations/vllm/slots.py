"""The adapters that an engine has in its slots: an arena and tables of fixed addresses. Knows nothing of vLLM."""

from __future__ import annotations

import copy
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.foreign import weight_of
from ...adapters.kinds import LoRA
from ...adapters.peft_files import Loaded
from ...adapters.rounding import Base
from ...adapters.sources import all_loaded, read_source
from ...adapters.start import changes_base
from ...adapters.updates import Updates, family_of, read_updates
from ...functional import LowRankUpdate
from ...ops import arena
from ...serving.store import AdapterStore, ReadAdapter, Version
from .shards import Shard, ShardedLinear, layer_over, whole_of

_FIELD = {name: at for at, name in enumerate(arena.FIELDS)}


class Slots:
    """What the layers of a model read for a batch: every token's slot, and each slot's rows of the tables.

    The tensors keep their addresses, so that a captured graph replays with other adapters, and a batch waits for nothing.

    Args:
        layers: of the model.
        count: slots.
        tokens: of the largest batch.
        capacity_bytes: of the arena.
        rank: the largest of an adapter that brings factors of its own.
        dtype: of the factors and cores in the arena.
        factors: a directory of ``lowrank-ops precompute`` or None.
        exchange: a value -> the values of all processes that have parts of the same matrices; needed if there are several.

    Raises:
        ValueError: two layers have a matrix of one name.
    """

    def __init__(
        self,
        layers: Sequence[ShardedLinear],
        count: int,
        tokens: int,
        capacity_bytes: int,
        rank: int,
        dtype: torch.dtype,
        factors: str | None = None,
        exchange: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        sites: dict[str, Any] = {}
        shards: dict[str, Shard] = {}
        for layer in layers:
            layer.first, layer.routing = len(sites), self
            for shard, site in zip(layer.shards, layer.sites, strict=True):
                if shard.name in sites:
                    raise ValueError(
                        f"two layers of the model have the matrix {shard.name!r}, and adapters name it once"
                    )
                sites[shard.name], shards[shard.name] = site, shard
        if all(shard.part.is_whole for shard in shards.values()):
            self.store = AdapterStore(sites, capacity_bytes, dtype=dtype, factors=factors)
        else:
            assert exchange is not None
            self.store = SplitStore(sites, shards, exchange, capacity_bytes, dtype, factors)
        self.rank = rank
        device = self.store.device
        self.memory = self.store.memory
        self.table = torch.zeros(len(sites), count, len(arena.FIELDS), dtype=torch.int64, device=device)
        self.slots = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        self._held: list[tuple[ReadAdapter, list[Version]] | None] = [None] * count
        self._used = torch.zeros(len(sites), count, dtype=torch.bool)  # whether a slot has an update at a site
        self._covered = [device.type != "cpu"] * len(sites)
        self._active: list[int] = []

    def covers(self, sites: range) -> bool:
        """Tell whether some token may have an update at one of the sites; on a GPU always, as a graph knows no other way."""
        return any(self._covered[sites.start : sites.stop])

    def read(self, directory: Path) -> ReadAdapter:
        """Read an adapter from its directory.

        Raises:
            FileNotFoundError, ValueError: as :meth:`AdapterPool.read`; its rank is above the limit; it changes more than
                the layers' updates.
        """
        read = self.store.read(directory)
        if own := sorted(read.version.own):
            raise ValueError(
                f"{directory}: the adapter changes more than the updates of {', '.join(own[:3])} (DoRA, a bias, or "
                "parameters trained whole), which the plugin does not route; serve it with lowrank-ops serve"
            )
        rows = read.version.rows
        ranks = rows.fields[rows.own[:, _FIELD["down_data"]] > 0, _FIELD["rank"]]
        if len(ranks) and (most := int(ranks.max())) > self.rank:
            raise ValueError(f"{directory}: the adapter has rank {most}, and max_lora_rank is {self.rank}")
        return read

    def put(self, slot: int, read: ReadAdapter) -> None:
        """Let a free slot have an adapter.

        Raises:
            MemoryError: the arena has no room for it beside the adapters in other slots.
        """
        try:
            self._place(slot, read)
        except MemoryError:  # the free bytes may lie in pieces
            held = {at: one[0] for at, one in enumerate(self._held) if one is not None}
            for at in held:
                self.clear(at)
            for at, other in held.items():
                self._place(at, other)
            self._place(slot, read)

    def _place(self, slot: int, read: ReadAdapter) -> None:
        name = f"slot-{slot}"
        self.store.load(name, read)
        versions = self.store.acquire([name])
        rows = self.store.table(versions[0])
        self._held[slot] = read, versions
        self._used[:, slot] = rows[:, _FIELD["rank"]] > 0
        self.table[:, slot].copy_(rows.pin_memory() if self.table.is_cuda else rows, non_blocking=True)
        self._cover()

    def clear(self, slot: int) -> None:
        """Let a slot have no adapter."""
        if (held := self._held[slot]) is None:
            return
        self.table[:, slot].zero_()
        self._used[:, slot] = False
        self._held[slot] = None
        self.store.release(held[1])
        self.store.unload(f"slot-{slot}")
        self._cover()

    def route(self, slots: Tensor, active: Iterable[int]) -> None:
        """Set the slots of a batch's tokens.

        Args:
            slots: integers [tokens], -1 for none; the tokens that a larger captured graph has besides get none.
            active: the slots that occur.
        """
        count = slots.shape[0]
        self.slots[:count].copy_(slots, non_blocking=True)
        self.slots[count:].fill_(-1)
        self._active = sorted(active)
        self._cover()

    def _cover(self) -> None:
        if not self.table.is_cuda:
            self._covered = self._used[:, self._active].any(1).tolist()


def arena_bytes(layers: Iterable[ShardedLinear], count: int, rank: int, dtype: torch.dtype) -> int:
    """Bytes of an arena in which every slot can have a LoRA of the largest rank."""
    shapes = [shard.weight.shape for layer in layers for shard in layer.shards]
    one = sum(arena.align(int(n) * min(rank, *map(int, s)) * dtype.itemsize) for s in shapes for n in s)
    return count * max(one, arena.ALIGNMENT)


class SplitStore(AdapterStore):
    """Adapters over the parts of matrices that one of several processes has: U's rows, D's columns and the whole core.

    Factors that are made of W are made of the whole W, which the processes exchange once for each matrix and set of factors.

    Args:
        sites, capacity_bytes, dtype, factors: as in :class:`AdapterStore`.
        shards: the parts, by the names of the sites.
        exchange: as in :class:`Slots`.
    """

    def __init__(
        self,
        sites: Mapping[str, Any],
        shards: Mapping[str, Shard],
        exchange: Callable[[Any], list[Any]],
        capacity_bytes: int,
        dtype: torch.dtype,
        factors: str | None,
    ) -> None:
        super().__init__(sites, capacity_bytes, dtype=dtype, factors=factors)
        self._shards, self._exchange = shards, exchange
        self._keys: dict[str, str] = {}  # of the whole matrices

    def _updates(
        self, source: str | os.PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | None
    ) -> Updates:
        asked: list[str] | None = None
        try:
            checked, contents, records, _ = read_source(source, config, self._layers)
            found = all_loaded(checked, contents.layers, records, {})
            asked = sorted(name for name, loaded in found.items() if name in self._shards and self._reads(name, loaded))
        finally:  # no process may wait for one that failed
            told = self._exchange(asked)
        if any(other != asked for other in told):
            raise ValueError(f"{source}: another process could not read the adapter, or read another one")
        layers, known = {}, ChainMap[tuple[Any, ...], Any]({}, self._made)
        for name, shard in self._shards.items():
            layer = self._whole(name) if name in asked else layer_over(torch.zeros(()).expand(shard.part.shape))
            if name in asked:
                self._keys[name] = Base(weight_of(layer), layer.branch).key()
            if name in self._keys:
                known["weight", id(layer.weight)] = self._keys[name]
            layers[name] = layer
        updates, own = read_updates(layers, source, config, self._store, known, layers)
        self._made |= {key: made for key, made in known.maps[0].items() if key[0] == "factors"}
        return {
            name: (self._shards[name].part.update(update), family) for name, (update, family) in updates.items()
        }, own

    def _reads(self, name: str, loaded: Loaded) -> bool:
        """Tell whether the whole W must be there: to make factors, or to tell whether it is the adapter's."""
        kind, key = loaded.kind, self._keys.get(name)
        if isinstance(kind, LoRA):
            return kind.dora or (changes_base(kind) and (key is None or loaded.source is None))
        return key is None or family_of(name, loaded) not in self._made

    def _whole(self, name: str) -> Any:
        """The layer over the whole matrix, whose parts the processes exchange."""
        shard = self._shards[name]
        told = self._exchange((shard.part, copy.deepcopy(shard.weight).to("cpu"), copy.deepcopy(shard.branch)))
        branch = None
        if shard.branch is not None:
            (N, K), R = shard.part.shape, shard.branch.rank
            down = whole_of([(p._replace(shape=(R, K), rows=((0, R),)), b.down) for p, _, b in told])
            up = whole_of([(p._replace(shape=(N, R), columns=(0, R)), b.up) for p, _, b in told])
            branch = LowRankUpdate(down, up)
        return layer_over(whole_of([(part, weight) for part, weight, _ in told]), branch)
