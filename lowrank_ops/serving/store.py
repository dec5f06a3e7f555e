"""AdapterStore: the bytes of many adapters over the same layers, in one block of memory that is changed in place."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..adapters.experts import ExpertsLinear
from ..adapters.linear import Linear
from ..adapters.sources import files_of
from ..adapters.updates import Updates, read_updates
from ..files import check_path
from ..formats import FLOAT_DTYPES
from ..ops import arena
from ..svd.store import FactorStore
from .memory import Memory, Region
from .own import Parts
from .read import Layout, Rows

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,127}")


@dataclass(eq=False)
class Version:
    """One loaded state of an adapter."""

    name: str
    rows: Rows
    size: int
    families: tuple[tuple[Any, ...], ...]
    host: Tensor | None  # its bytes, unless only the arena has them
    own: Mapping[str, Parts]  # name of a module -> what it has of its own there, in its bytes
    region: Region | None = None
    leases: int = 0
    pinned: bool = False
    retired: bool = False
    ready: Any = None  # a CUDA event: the end of the copy to the arena


@dataclass
class _Family:
    """Frozen factors that several adapters share; kept while one of these adapters is loaded."""

    region: Region
    members: int = 0


@dataclass(frozen=True, eq=False)
class ReadAdapter:
    """An adapter read by :meth:`AdapterStore.read`: its bytes in the pool's layout, checked, in host memory."""

    pool: AdapterStore
    version: Version
    factors: Mapping[tuple[Any, ...], list[Tensor]]


class AdapterStore:
    """Adapters of the same layers, side by side in an arena on their device, and the rows of tables that say where.

    A site is a layer by its name: N and K, and its weight W where a kind is made of it. What routes tokens over the sites
    takes leases of adapters, and reads their rows of the tables: :class:`AdapterPool` for models of ours, and the plugin of
    vLLM. All methods may be called from any thread.

    Args:
        layers: the sites by name.
        capacity_bytes, root, dtype, factors, host_bytes: as in :class:`AdapterPool`.
        holders: the modules in which an adapter may have parameters of its own, by name; the layers if None.

    Raises:
        FileNotFoundError: the directory ``factors`` does not exist.
        ValueError: the layers are on several devices, or an argument is out of range.
    """

    def __init__(
        self,
        layers: Mapping[str, Linear | ExpertsLinear],
        capacity_bytes: int,
        root: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        factors: str | os.PathLike[str] | None = None,
        host_bytes: int | None = None,
        holders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        devices = {layer.device for layer in layers.values()}
        if len(devices) > 1:
            raise ValueError(f"all layers must be on one device, got {', '.join(sorted(map(str, devices)))}")
        for name, value in (("capacity_bytes", capacity_bytes), ("host_bytes", host_bytes or 0)):
            if not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if root is not None:
            check_path("root", root)
        if capacity_bytes < arena.ALIGNMENT:
            raise ValueError(f"capacity_bytes must be at least {arena.ALIGNMENT}, got {capacity_bytes}")
        if host_bytes is not None and host_bytes < 0:
            raise ValueError(f"host_bytes must be at least 0 or None, got {host_bytes}")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16, float16 or None, got {dtype}")
        self.device = devices.pop()
        self.capacity_bytes = capacity_bytes // arena.ALIGNMENT * arena.ALIGNMENT
        self._host_bytes = host_bytes
        self._root = None if root is None else Path(root).resolve()
        self._store = None if factors is None else FactorStore.existing(factors)
        self._layers = layers
        self._holders = layers if holders is None else holders
        self._sites = {id(layer): site for site, layer in enumerate(layers.values())}
        self._memory: Memory[Version] = Memory(self.capacity_bytes, self.device)
        self._layout = Layout(layers, self._sites, dtype, self.device)
        self._known: dict[str, Version] = {}
        self._host_used = 0  # bytes of loaded adapters in host memory
        self._families: dict[tuple[Any, ...], _Family] = {}
        self._layouts: WeakValueDictionary[bytes, Rows] = WeakValueDictionary()
        self._made: dict[tuple[Any, ...], Any] = {}  # factors of families that exist, and keys of weights
        # All copies use one stream, so that a copy into freed memory waits for earlier copies from or to it.
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        self._released: dict[Any, Any] = {}  # the last event of each CUDA stream that read the arena
        self._lock, self._reading = threading.RLock(), threading.Lock()
        self._loads = self._evictions = self._hits = self._misses = 0

    # ---- contents

    def load(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | ReadAdapter,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Load an adapter under a name. It replaces an adapter of that name, and rows in flight finish on the old one.

        Args:
            name: letters, digits and ``_ . @ + -``, at most 128.
            source: a directory written by :func:`lowrank_ops.save_adapter`, PEFT or diffusers, a safetensors file or
                tensors of a layout that :func:`lowrank_ops.load_adapter` reads, or what :meth:`read` returned for either.
            config: for tensors only: the contents of adapter_config.json (``r``, ``lora_alpha``, …).

        Raises:
            FileNotFoundError, ValueError: the name is bad; a path is outside ``root``; files come with a config; files
                are damaged, not finite, or made for another model or weight; the kind shares no base with others;
                another pool has read the source. The pool stays unchanged.
            MemoryError: it does not fit in addition to pinned and used adapters.
        """
        _check_name(name)
        _check_config(source, config)
        read = source if isinstance(source, ReadAdapter) else self.read(source, config)
        if read.pool is not self:
            raise ValueError("source must be read by the pool that loads it, got what another pool has read")
        with self._forget_unused_factors():
            self._place(name, read)

    def read(
        self, source: str | os.PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
    ) -> ReadAdapter:
        """Do the slow part of :meth:`load`: the result is not in the pool yet, and ``load`` only has to copy it there.

        Args:
            source, config: as in :meth:`load`.

        Raises:
            FileNotFoundError, ValueError: as :meth:`load`.
        """
        _check_config(source, config)
        if not isinstance(source, Mapping):
            path = Path(source).resolve()
            for place in (path, *files_of(path)):
                if self._root is not None and not place.resolve().is_relative_to(self._root):
                    raise ValueError(f"source must be inside {self._root}, got {place.resolve()}")
            source = path
        # Reading needs a lock only against other readers, because of shared factors.
        with self._forget_unused_factors(), self._reading:
            read = self._updates(source, config)
            laid = self._layout.lay_out(*read)
            if self._store is not None:
                self._store.check_used()
            version = Version("", laid.rows, len(laid.memory), laid.families, laid.memory, laid.own)
            return ReadAdapter(self, version, laid.factors)

    def _updates(
        self, source: str | os.PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | None
    ) -> Updates:
        """What :func:`read_updates` reads for the layers."""
        return read_updates(self._layers, source, config, self._store, self._made, self._holders)

    @contextmanager
    def _forget_unused_factors(self) -> Iterator[None]:
        """On an error, forget factors of families that were not added to the pool."""
        try:
            yield
        except BaseException:
            with self._lock:
                for key in [key for key in list(self._made) if key[0] == "factors" and key not in self._families]:
                    self._forget(key)
            raise

    def _place(self, name: str, read: ReadAdapter) -> None:
        version = replace(read.version, name=name)
        with self._lock:
            old = self._known.get(name)
            self._check_host(version, old)
            placed = [key for key in version.families if key not in self._families]
            try:
                for key in placed:
                    self._place_family(key, read.factors[key])
                self._bind(version)
                self._make_resident(version)
            except BaseException:
                for key in placed:
                    if key in self._families:
                        self._memory.give_back(self._families.pop(key).region)
                raise
            for key in version.families:
                self._families[key].members += 1
            self._loads += 1
            if old is not None:
                version.pinned = old.pinned
                self._retire(old)
            self._known[name] = version
            self._loaded(version)
            self._host_used += 0 if version.host is None else version.size
            self._mark_used(version)

    def unload(self, name: str) -> None:
        """Forget an adapter; rows in flight finish on it.

        Raises:
            KeyError: no adapter has this name.
        """
        with self._lock:
            self._retire(self._version(name))

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device, or let it be evicted again.

        Raises:
            KeyError: no adapter has this name.
            MemoryError: it does not fit there.
        """
        with self._lock:
            version = self._version(name)
            if pinned:
                self._make_resident(version)
            version.pinned = pinned
            self._mark_used(version)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def names(self) -> list[str]:
        """The loaded adapters, on the device or in host memory."""
        with self._lock:
            return sorted(self._known)

    def stats(self) -> dict[str, int]:
        """Counts and bytes of loaded, resident, pinned and used adapters; loads, evictions, hits and misses of routes."""
        with self._lock:
            known = self._known.values()
            free = sum(region.size for region in self._memory.free)
            return {
                "capacity_bytes": self.capacity_bytes,
                "used_bytes": self.capacity_bytes - free,
                "family_bytes": sum(family.region.size for family in self._families.values()),
                "host_bytes": self._host_used,
                "largest_free_bytes": max((region.size for region in self._memory.free), default=0),
                "adapters": len(self._known),
                "resident": sum(v.region is not None for v in known),
                "pinned": sum(v.pinned for v in known),
                "in_use": sum(v.leases > 0 for v in known),
                "loads": self._loads,
                "evictions": self._evictions,
                "hits": self._hits,
                "misses": self._misses,
            }

    def _loaded(self, version: Version) -> None:
        """Called when an adapter is among the known ones."""

    # ---- leases

    def acquire(self, names: Iterable[str | None]) -> list[Version]:
        """The adapters of some names, once each, on the device and kept there until :meth:`release`.

        Raises:
            KeyError: a name is not loaded.
            MemoryError: they do not fit in addition to pinned and used ones.
        """
        with self._lock:
            asked = [name for name in dict.fromkeys(names) if name is not None]
            if unknown := sorted(str(name) for name in asked if name not in self._known):
                raise KeyError(f"not loaded: {', '.join(unknown)}")
            versions = [self._known[name] for name in asked]
            for version in versions:
                version.leases += 1
                self._mark_used(version)
            try:
                for version in versions:
                    self._hits += version.region is not None
                    self._misses += version.region is None
                    self._make_resident(version)
            except BaseException:
                self.release(versions)
                raise
            return versions

    def table(self, version: Version) -> Tensor:
        """int64 [sites, FIELDS]: the rows of an adapter that is on the device, for the stream that reads it next."""
        assert version.region is not None
        if version.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(version.ready)
        return version.rows.fields + version.rows.own * version.region.begin

    def release(self, versions: Sequence[Version]) -> None:
        """Let adapters that were acquired be evicted, after the work that the current stream has now."""
        with self._lock:
            if self.device.type == "cuda" and versions:
                stream = torch.cuda.current_stream(self.device)
                self._released[stream] = stream.record_event()
            for version in versions:
                version.leases -= 1
                self._mark_used(version)
                if version.retired and not version.leases:
                    self._drop(version)

    @property
    def memory(self) -> Tensor:
        """The arena: uint8 [capacity_bytes], at one address for good."""
        return self._memory.bytes

    # ---- memory

    def _mark_used(self, version: Version) -> None:
        """Mark an adapter as most recently used, and as evictable or not."""
        evictable = version.region is not None and not (version.leases or version.pinned or version.retired)
        self._memory.mark_used(version, evictable)

    def _version(self, name: str) -> Version:
        if name not in self._known:
            raise KeyError(f"not loaded: {name}")
        return self._known[name]

    def _place_family(self, key: tuple[Any, ...], parts: Sequence[Tensor]) -> None:
        region = self._take(sum(arena.align(part.nbytes) for part in parts), f"the factors of {key[1]}")
        begin = region.begin
        with self._copy_stream():
            for part in parts:
                self._memory.bytes[begin : begin + part.nbytes] = arena.bytes_of(part).to(self.device)
                begin += arena.align(part.nbytes)
        if self._copies is not None:
            self._copies.synchronize()
        self._families[key] = _Family(region)

    @contextmanager
    def _copy_stream(self) -> Iterator[None]:
        """On a GPU, run the context's work on the copy stream, after all work that reads the arena."""
        if self._copies is None:
            yield
            return
        for event in self._released.values():
            self._copies.wait_event(event)
        with torch.cuda.stream(self._copies):
            yield

    def _bind(self, version: Version) -> None:
        """Make the rows of shared factors absolute; equal rows of thousands of adapters are stored once."""
        # Clone, because the same ReadAdapter may be loaded again.
        rows, begins = replace(version.rows, fields=version.rows.fields.clone()), [0] * len(self._sites)
        for key in version.families:
            begins[self._sites[id(self._layers[key[1]])]] = self._families[key].region.begin
        factors = list(arena.OFFSETS[:-2])
        offsets = rows.fields[:, factors]
        rows.fields[:, factors] = torch.where(offsets >= 0, offsets + offsets.new_tensor(begins).unsqueeze(1), offsets)
        same = hashlib.sha256(rows.fields.numpy().tobytes() + rows.own.numpy().tobytes()).digest()
        version.rows = self._layouts.setdefault(same, rows)

    def _make_resident(self, version: Version) -> None:
        if version.region is not None:
            return
        assert version.host is not None
        known = self._known.get(version.name) is version
        leaves = version.size if self._copies is None and known else 0
        version.region = self._take(version.size, f"adapter {version.name}", leaves)
        begin, end = version.region.begin, version.region.begin + version.size
        with self._copy_stream():
            self._memory.bytes[begin:end].copy_(version.host, non_blocking=True)
        if self._copies is None:
            version.host = None  # the arena has the only copy
            self._host_used -= leaves
        else:
            version.ready = self._copies.record_event()

    def _host_room(self) -> float:
        """Bytes of adapters that host memory can still take."""
        if self._host_bytes is None:
            return float("inf")
        return self._host_bytes - self._host_used

    def _check_host(self, version: Version, old: Version | None) -> None:
        """Raise if host memory has no room for a new adapter; on a GPU it stays there too."""
        room = self._host_room() + (0 if old is None or old.host is None else old.host.numel())
        if self._copies is not None and version.size > room:
            raise MemoryError(
                f"adapter {version.name} needs {version.size} bytes of host memory; {max(room, 0)} of {self._host_bytes} "
                "are free"
            )

    def _take(self, size: int, what: str, leaves: int = 0) -> Region:
        """Take a free piece; used and pinned adapters stay. ``leaves``: bytes of host memory that become free."""

        def may_leave(version: Version) -> bool:
            return version.host is not None or version.size <= self._host_room() + leaves

        return self._memory.take(size, what, may_leave, self._evict)

    def _evict(self, version: Version) -> None:
        assert version.region is not None
        if version.host is None:
            begin = version.region.begin
            version.host = self._memory.bytes[begin : begin + version.size].clone()
            self._host_used += version.size
        self._memory.give_back(version.region)
        version.region = version.ready = None
        self._mark_used(version)
        self._evictions += 1

    def _retire(self, version: Version) -> None:
        """Make the pool forget a loaded adapter."""
        version.retired = True
        del self._known[version.name]
        self._host_used -= 0 if version.host is None else version.size
        self._mark_used(version)
        if not version.leases:
            self._drop(version)

    def _drop(self, version: Version) -> None:
        if version.region is not None:
            self._memory.give_back(version.region)
            version.region = None
        for key in version.families:
            family = self._families[key]
            family.members -= 1
            if not family.members:
                self._memory.give_back(self._families.pop(key).region)
                self._forget(key)

    def _forget(self, key: tuple[Any, ...]) -> None:
        self._made.pop(key, None)
        self._layout.laid.pop(key, None)


def _check_config(source: Any, config: Mapping[str, Any] | None) -> None:
    if config is not None and not isinstance(source, Mapping):
        raise ValueError("config describes tensors, and files have their own; leave config out")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"name must be letters, digits and _ . @ + -, at most 128, and not a path, got {name!r}"
        )  # fmt: skip
