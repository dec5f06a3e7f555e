"""AdapterPool: many adapters of one model in one block of memory, and batches in which every row has its own adapter."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .. import functional
from ..adapters.beside import named_holders
from ..adapters.experts import ExpertsLinear
from ..adapters.linear import AdaptedLayer, Linear, check_unsplit
from ..adapters.names import call_named, modules_of
from ..adapters.peft_files import CONFIG, TENSORS
from ..adapters.route import POOLS, ROUTES, Place, entered, numbered
from ..adapters.updates import read_updates
from ..formats import FLOAT_DTYPES
from ..ops import arena
from ..svd.store import FactorStore
from .memory import Memory, Region
from .order import find_orders, media_of
from .own import Own, Parts, RoutedForward
from .read import Layout, Rows
from .route import PoolRoute, RowCheck

# Inside experts only updates are routed, not parameters that an adapter trained whole.
_EXPERTS = "experts"
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
    """An adapter read by :meth:`AdapterPool.read`: its bytes in the pool's layout, checked, in host memory."""

    pool: AdapterPool
    version: Version
    factors: Mapping[tuple[Any, ...], list[Tensor]]


class AdapterPool:
    """Adapters of one model, side by side on its device: y[t] = W x[t] + bias + s_a · U_a C_a (D_a x[t]) at every layer.

    An adapter takes one contiguous piece of the arena, as large as it needs: kinds, ranks and dtypes may differ.
    Adapters that share the factors of LoRA-XS, SVF or SVFT store them once. Adapters that do not fit stay in host
    memory and are copied back when a route needs them. All methods may be called from any thread while others route.

    Args:
        model: with :class:`lowrank_ops.Linear` layers that have no adapter (``lo.adapt(model, None)``).
        capacity_bytes: of the arena, which is allocated at once.
        root: a directory; paths passed to :meth:`load`, and their files, must lie inside it.
        dtype: of factors and cores in the pool; None keeps what the files have.
        factors: a directory written by ``lowrank-ops precompute``, for kinds that need singular vectors.
        host_bytes: limit of adapters in host memory, None for no limit. On a CPU it counts adapters evicted from the
            arena; on a GPU it counts all, because each has a copy in host memory so that eviction costs nothing.

    What an adapter trained whole (PEFT's ``modules_to_save``, ``bias``) lies beside its updates. A layer of ours adds the
    bias of each row; any other module, and a head in four bits that an adapter has dense, runs once for each adapter of the
    batch that has its own there. Modules that compute every token by itself (linear layers, embeddings, norms) may get
    tokens; others must get one row for each name and return a Tensor.

    Fused experts (:class:`lowrank_ops.Experts`) are routed too: a row keeps its adapter in every expert that it is sent to.
    As long as the pool exists, its layers cannot be merged and get no adapter of their own.

    Raises:
        FileNotFoundError: the directory ``factors`` does not exist.
        ValueError: the model has no such layer, a layer has an adapter or is split, or layers are on several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity_bytes: int = 2 << 30,
        root: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        factors: str | os.PathLike[str] | None = None,
        host_bytes: int | None = None,
    ) -> None:
        layers = {name: m for name, m in modules_of(model).items() if isinstance(m, Linear | ExpertsLinear)}
        if not layers:
            raise ValueError("model has no lowrank_ops.Linear layer; call lowrank_ops.adapt(model, None) first")
        adapted = {name: m for name, m in modules_of(model).items() if isinstance(m, AdaptedLayer)}
        if taken := [name for name, layer in adapted.items() if layer.adapter is not None]:
            raise ValueError(f"the pool adds adapters to the base, and layers have one already: {', '.join(taken[:5])}")
        for name, layer in layers.items():
            call_named(name, check_unsplit, layer)
        devices = {layer.device for layer in layers.values()}
        if len(devices) > 1:
            raise ValueError(f"all layers must be on one device, got {', '.join(sorted(map(str, devices)))}")
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
        self._holders = {
            name: module for name, module in named_holders(model) if _EXPERTS not in name.split(".")
        }  # every module that a row may have parameters of its own in
        # Those modules for which some adapter has had parameters, apart from adapted layers.
        self._owned: list[nn.Module] = []
        weakref.finalize(self, RoutedForward.remove, self._owned)
        self._sites = {id(layer): site for site, layer in enumerate(layers.values())}
        self._orders, self._media = find_orders(model), media_of(model)
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
        # The check knows nothing of the pool: a copy of the model must not copy the pool, and the model must not keep
        # the pool alive.
        check = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, RowCheck)), None)
        if check is None:
            check = RowCheck()
            model.register_forward_pre_hook(check, with_kwargs=True)
        self._check = check
        for layer in layers.values():
            layer.pooled = Place(numbered(layer), check.number)
        POOLS.add(self)

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
            source: a directory written by :func:`lowrank_ops.save_adapter` or PEFT, PEFT's tensors, or what
                :meth:`read` returned for either.
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
            for place in (path, path / CONFIG, path / TENSORS):
                if self._root is not None and not place.resolve().is_relative_to(self._root):
                    raise ValueError(f"source must be inside {self._root}, got {place.resolve()}")
            source = path
        # Reading needs a lock only against other readers, because of shared factors.
        with self._forget_unused_factors(), self._reading:
            read = read_updates(self._layers, source, config, self._store, self._made, self._holders)
            laid = self._layout.lay_out(*read)
            if self._store is not None:
                self._store.check_used()
            version = Version("", laid.rows, len(laid.memory), laid.families, laid.memory, laid.own)
            return ReadAdapter(self, version, laid.factors)

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
            for module in (self._holders[holder] for holder in version.own):
                if not self.holds(module):
                    RoutedForward.install(module)
                    self._owned.append(module)
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

    # ---- routing

    def holds(self, layer: nn.Module) -> bool:
        """Tell whether the pool routes a layer."""
        return id(layer) in self._sites or any(layer is module for module in self._owned)

    @contextmanager
    def route(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the context row b of every batch of the model goes through adapter names[b]; None means the base alone.

        Holds for the thread or task that enters it, for tasks started inside while it is open, and for any forward of
        the model, ``generate`` included. Tokens [T] without a batch dimension are one row. With beams a name is given
        once for every beam, because transformers repeats rows. Routes of several pools over different layers may be
        open at once; a route inside a route of the same pool replaces it for its duration.

        Where a layer's input is not [B, T, K] the row of a token is told from its order, as :mod:`lowrank_ops.serving.order`
        knows it: tokens before rows, windows, and pictures that fill the placeholders of a row. Where it cannot be told and
        names differ, the forward raises ValueError with the layer's name.

        Raises:
            KeyError: a name is not loaded. TypeError: names is a string.
            ValueError: the route of another pool is open, and the pools share layers.
            MemoryError: the adapters of the batch do not fit in addition to pinned and used ones.
        """
        with self._open_route(names, None):
            yield

    @contextmanager
    def route_tokens(self, names: Sequence[str | None], token_slots: Tensor) -> Iterator[None]:
        """Route token by token, for packed batches: token t goes through names[token_slots[t]]; -1 means the base alone.

        Args:
            token_slots: integers [tokens], in the order of the tokens in the layers' inputs.

        Raises:
            as :meth:`route`; ValueError: also for a slot outside [-1, len(names)).
        """
        if not isinstance(token_slots, Tensor):
            raise TypeError(f"token_slots must be a Tensor of integers, got {type(token_slots).__name__}")
        functional.check_slots(token_slots, len(token_slots), len(names), token_slots.device)
        with self._open_route(names, token_slots):
            yield

    @contextmanager
    def _open_route(self, names: Sequence[str | None], token_slots: Tensor | None) -> Iterator[None]:
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence with one name or None for each row, got the string {names!r}")
        others = [
            o.sites for o in ROUTES.get() if isinstance(o, PoolRoute) and o.sites is not self._sites and not o.left
        ]
        if not all(self._sites.keys().isdisjoint(sites) for sites in others):
            raise ValueError("the route of another pool over the same layers is open; leave it first")
        with self._lock:
            if unknown := sorted({str(name) for name in names if name is not None and name not in self._known}):
                raise KeyError(f"not loaded: {', '.join(unknown)}")
            versions = [self._known[name] for name in dict.fromkeys(names) if name is not None]
            for version in versions:
                version.leases += 1
                self._mark_used(version)
            try:
                for version in versions:
                    self._hits += version.region is not None
                    self._misses += version.region is None
                    self._make_resident(version)
                route = self._route(names, versions, token_slots)
            except BaseException:
                self._release(versions)
                raise
        try:
            with entered(route):
                yield
        finally:
            with self._lock:
                self._release(versions)

    def _route(self, names: Sequence[str | None], versions: Sequence[Version], token_slots: Tensor | None) -> PoolRoute:
        slot_of = {version.name: slot for slot, version in enumerate(versions)}
        of_names = [-1 if name is None else slot_of[name] for name in names]
        slots = torch.tensor(of_names, dtype=torch.int32, device="cpu")
        tables = []
        for version in versions:
            assert version.region is not None
            tables.append(version.rows.fields + version.rows.own * version.region.begin)
            if version.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(version.ready)
        empty = torch.zeros(len(self._sites), 0, len(arena.FIELDS), dtype=torch.int64, device="cpu")
        table = torch.stack(tables, 1) if tables else empty
        used = (table[:, :, 0] > 0).any(1).tolist()
        if token_slots is not None:
            # Map each token to the slot of its name; index -1 reads the appended -1.
            slots = torch.cat([slots, slots.new_full((1,), -1)])[token_slots.cpu().long()]
        held: dict[int, list[tuple[Parts, int] | None]] = {}
        for slot, version in enumerate(versions):
            assert version.region is not None
            for holder, parts in version.own.items():
                of_module = held.setdefault(id(self._holders[holder]), [None] * len(versions))
                of_module[slot] = parts, version.region.begin
        own = {module: Own(self._memory.bytes, parts) for module, parts in held.items()}
        return PoolRoute(
            self._memory.bytes, self._sites, self._layers, self._check, token_slots is not None, of_names,
            slots.to(self.device), len(slots.unique()) == 1, table.to(self.device), used, own,
            self._orders, self._media,
        )  # fmt: skip

    def _release(self, versions: Sequence[Version]) -> None:
        if self.device.type == "cuda" and versions:
            stream = torch.cuda.current_stream(self.device)
            self._released[stream] = stream.record_event()
        for version in versions:
            version.leases -= 1
            self._mark_used(version)
            if version.retired and not version.leases:
                self._drop(version)

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
