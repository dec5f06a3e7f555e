"""The adapters that an engine has in its slots: an arena and tables of fixed addresses. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.kinds import LoRA
from ...adapters.peft_files import LORA, PREFIX, check_shapes
from ...adapters.sources import all_loaded
from ...adapters.start import changes_base
from ...adapters.versions import read_files
from ...ops import arena
from ...serving.store import AdapterStore, ReadAdapter, Version
from .shards import Part, ShardedLinear

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
    ) -> None:
        sites: dict[str, Any] = {}
        self.parts: dict[str, Part] = {}
        for layer in layers:
            layer.first, layer.routing = len(sites), self
            for shard, site in zip(layer.shards, layer.sites, strict=True):
                if shard.name in sites:
                    raise ValueError(
                        f"two layers of the model have the matrix {shard.name!r}, and adapters name it once"
                    )
                sites[shard.name], self.parts[shard.name] = site, shard.part
        self.store = AdapterStore(sites, capacity_bytes, dtype=dtype, factors=factors)
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
                the layers' updates; it is not a LoRA, and layers are split over processes.
        """
        whole = all(part.is_whole for part in self.parts.values())
        read = self.store.read(directory) if whole else self.store.read(*cut_adapter(directory, self.parts))
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


def cut_adapter(directory: Path, parts: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a LoRA for the parts of the matrices that a process has.

    Raises:
        FileNotFoundError, ValueError: the files are damaged; the adapter is not a plain LoRA over these matrices.
    """
    config, contents, records = read_files(directory)
    if contents.beside or contents.tokens or contents.embeddings:
        raise ValueError(
            f"{directory}: only updates of linear layers can be split over processes, and the adapter has more"
        )
    tensors = {}
    for name, loaded in all_loaded(config, contents.layers, records, {}).items():
        if name not in parts:
            raise ValueError(
                f"the adapter in {directory} has tensors for {name!r}, which is not a layer that can be routed"
            )
        kind = loaded.kind
        if not isinstance(kind, LoRA) or changes_base(kind) or kind.dora or kind.lora_bias:
            raise ValueError(
                f"{directory}: {kind} of {name!r} is made of the whole weight, which is split over processes; write it as a "
                "LoRA with lowrank_ops.save_adapter(..., as_lora=True), or serve it without tensor parallelism"
            )
        check_shapes(name, loaded, *parts[name].shape)
        down, up = loaded.tensors["down"], loaded.tensors["up"]
        tensors[f"{PREFIX}{name}.{LORA['down']}"] = parts[name].down(down)
        tensors[f"{PREFIX}{name}.{LORA['up']}"] = parts[name].up(up).contiguous()
    return tensors, config
