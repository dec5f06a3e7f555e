"""AdapterPool: many adapters of one model in one piece of memory, and batches in which every row has its own."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from array import array
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from . import functional
from .checkpoint import CONFIG, TENSORS, _modules, all_finite, read_updates
from .factors import FactorStore
from .formats import FLOAT_DTYPES, QuantizedWeight
from .functional import LowRankUpdate
from .kernels.operands import Core, Matrix
from .linear import Linear
from .ops import arena
from .route import POOLS, ROUTES, entered

# Where models keep experts, tokens are sorted anew: which row one belongs to cannot be told there.
_EXPERTS = "experts"
# What models call the batch they are given.
_BATCH = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states", "x", "input")
_LARGEST = torch.finfo(torch.float32).max
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,127}")


@dataclass
class _Region:
    """A piece of the arena."""

    begin: int
    size: int


@dataclass(eq=False)
class _Rows:
    """Rows of the tables relative to where an adapter's bytes begin; adapters of one layout have them in common."""

    fields: Tensor  # int64 [sites, FIELDS]
    own: Tensor  # int64 [sites, FIELDS]: 1 where a field is an offset from the adapter's first byte


@dataclass(eq=False)
class _Version:
    """One loaded state of an adapter."""

    name: str
    rows: _Rows
    size: int
    families: tuple[tuple[Any, ...], ...]
    host: Tensor | None  # its bytes, where they are not in the arena alone
    region: _Region | None = None
    leases: int = 0
    pinned: bool = False
    retired: bool = False
    ready: Any = None  # a CUDA event: the copy to the arena is done


@dataclass
class _Family:
    """Frozen factors that adapters have in common; they stay while one of these is known."""

    region: _Region
    members: int = 0


@dataclass(frozen=True, eq=False)
class ReadAdapter:
    """What :meth:`AdapterPool.read` made of an adapter: its bytes as that pool keeps them, checked, in host memory."""

    pool: AdapterPool
    version: _Version
    factors: Mapping[tuple[Any, ...], list[Tensor]]


class AdapterPool:
    """Adapters of one model, side by side on its device: y[t] = W x[t] + bias + s_a · U_a C_a (D_a x[t]) at every layer.

    An adapter takes one contiguous piece of the arena, of its own size: kinds, ranks and dtypes differ freely. The factors
    of LoRA-XS, SVF and SVFT lie there once for all that share them. What has no room is kept in host memory and comes back
    when it is routed to. All methods may be called from any thread while others route.

    Args:
        model: with :class:`lowrank_ops.Linear` layers that have no adapter (``lo.adapt(model, None)``).
        capacity_bytes: of the arena, which is allocated at once.
        root: a directory; paths given to :meth:`load`, and the files there, must then lie inside it.
        dtype: of factors and cores in the pool; None keeps what the files have.
        factors: a directory that ``lowrank-ops precompute`` wrote, where singular vectors are needed.
        host_bytes: at most so many bytes of adapters in host memory, None for no limit. On a CPU those that have left the
            arena; on a GPU all, which are kept there so that leaving costs nothing.

    Layers of experts, to which tokens come sorted anew, get no adapters. As long as the pool is there, its layers cannot be
    merged, and get no adapter of their own.

    Raises:
        FileNotFoundError: there is no directory ``factors``.
        ValueError: the model has no such layer, a layer has an adapter, layers on several devices.
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
        layers = {
            name: m for name, m in _modules(model).items() if isinstance(m, Linear) and _EXPERTS not in name.split(".")
        }
        if not layers:
            raise ValueError("model has no lowrank_ops.Linear layer; call lowrank_ops.adapt(model, None) first")
        if taken := [name for name, layer in layers.items() if layer.adapter is not None]:
            raise ValueError(f"the pool adds adapters to the base, and layers have one already: {', '.join(taken[:5])}")
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
        self._dtype = dtype
        self._store = None if factors is None else FactorStore.existing(factors)
        self._layers = layers
        self._sites = {id(layer): site for site, layer in enumerate(layers.values())}
        self._memory = torch.empty(self.capacity_bytes, dtype=torch.uint8, device=self.device)
        self._free = [_Region(0, self.capacity_bytes)]  # by begin
        self._known: dict[str, _Version] = {}
        self._idle: dict[_Version, None] = {}  # what may leave the arena; the first was used longest ago
        self._host_used = 0  # bytes of known adapters in host memory
        self._families: dict[tuple[Any, ...], _Family] = {}
        self._layouts: WeakValueDictionary[bytes, _Rows] = WeakValueDictionary()
        self._made: dict[tuple[Any, ...], Any] = {}  # factors by family, while it is there, and keys of weights
        self._laid: dict[tuple[Any, ...], tuple[list[int], list[Tensor]]] = {}  # likewise, as they lie in the arena
        # All copies go through one stream, so that one to memory that was given back waits for the one before it.
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        self._released: dict[Any, Any] = {}  # the last event of each CUDA stream that read the arena
        self._lock, self._reading = threading.RLock(), threading.Lock()
        self._loads = self._evictions = self._hits = self._misses = 0
        for layer in layers.values():
            layer.pooled = True
        # A function, not a method: a copy of the model then is no copy of the pool, and the model does not keep it alive.
        if _check_batch not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_check_batch, with_kwargs=True)
        self._model = weakref.ref(model)
        POOLS.add(self)

    # ---- what it holds

    def load(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | ReadAdapter,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Take an adapter in under a name; one that is there already is replaced, and rows in flight finish on the old one.

        Args:
            name: letters, digits and ``_ . @ + -``, at most 128.
            source: a directory that :func:`lowrank_ops.save_adapter` or PEFT wrote, PEFT's tensors, or what :meth:`read`
                made of either.
            config: with tensors, and only with them, what adapter_config.json would hold (``r``, ``lora_alpha``, …).

        Raises:
            FileNotFoundError, ValueError: a bad name, a path outside of ``root``, a config beside files; the files are
                damaged, not finite, or of another model or weight; a kind that has no base in common with others; what
                another pool has read. The pool is left as it was.
            MemoryError: it does not fit beside what is pinned or in use.
        """
        _check_name(name)
        _check_config(source, config)
        read = source if isinstance(source, ReadAdapter) else self.read(source, config)
        if read.pool is not self:
            raise ValueError("source must be read by the pool that loads it, got what another pool has read")
        with self._forgetting():
            self._place(name, read)

    def read(
        self, source: str | os.PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
    ) -> ReadAdapter:
        """The slow part of :meth:`load`: what it returns is not in the pool yet, and ``load`` has only to copy it there.

        Args:
            source, config: as those of :meth:`load`.

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
        # Reading needs no lock but against another reader's factors.
        with self._forgetting(), self._reading:
            read = self._lay_out(read_updates(self._layers, source, config, self._store, self._made))
            if self._store is not None:
                self._store.check_used()
            return read

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Where it fails, factors of families that did not come to be are forgotten."""
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
                        self._give_back(self._families.pop(key).region)
                raise
            for key in version.families:
                self._families[key].members += 1
            self._loads += 1
            if old is not None:
                version.pinned = old.pinned
                self._retire(old)
            self._known[name] = version
            self._host_used += 0 if version.host is None else version.size
            self._settle(version)

    def unload(self, name: str) -> None:
        """Forget an adapter; rows in flight finish on it.

        Raises:
            KeyError: there is none of that name.
        """
        with self._lock:
            self._retire(self._version(name))

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device, or no longer.

        Raises:
            KeyError: there is none of that name.
            MemoryError: it has no room there.
        """
        with self._lock:
            version = self._version(name)
            if pinned:
                self._make_resident(version)
            version.pinned = pinned
            self._settle(version)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def names(self) -> list[str]:
        """The adapters that are loaded, on the device or in host memory."""
        with self._lock:
            return sorted(self._known)

    def stats(self) -> dict[str, int]:
        """Counts and bytes: what is loaded, resident, pinned, in use; loads, evictions, hits and misses of routes."""
        with self._lock:
            known = self._known.values()
            free = sum(region.size for region in self._free)
            return {
                "capacity_bytes": self.capacity_bytes,
                "used_bytes": self.capacity_bytes - free,
                "family_bytes": sum(family.region.size for family in self._families.values()),
                "host_bytes": self._host_used,
                "largest_free_bytes": max((region.size for region in self._free), default=0),
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
        """Whether the pool routes a layer."""
        return id(layer) in self._sites

    @contextmanager
    def route(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it, row b of every batch that the model is given goes through adapter names[b]; None is the base alone.

        Holds for the thread or task that enters it, for tasks started inside as long as it is open, and for any forward of
        the model, ``generate`` included; a row of tokens [T] all has the same adapter. With beams a name is given once for
        every beam, as transformers repeats rows. Routes of several pools, over other layers, may be open at once; inside a
        route another one of the same pool takes its place.

        Raises:
            KeyError: a name that is not loaded. TypeError: names is one string.
            ValueError: the route of another pool is open, and both have layers in common.
            MemoryError: the adapters of the batch do not fit beside what is pinned or in use.
        """
        with self._routed(names, None):
            yield

    @contextmanager
    def route_tokens(self, names: Sequence[str | None], token_slots: Tensor) -> Iterator[None]:
        """The same token by token, for packed batches: token t goes through names[token_slots[t]], -1 is the base alone.

        Args:
            token_slots: integers [tokens], in the order in which the tokens lie in the inputs of the layers.

        Raises:
            as :meth:`route`; ValueError: also for a slot outside of [-1, len(names)).
        """
        if not isinstance(token_slots, Tensor):
            raise TypeError(f"token_slots must be a Tensor of integers, got {type(token_slots).__name__}")
        functional.check_slots(token_slots, len(token_slots), len(names), token_slots.device)
        with self._routed(names, token_slots):
            yield

    @contextmanager
    def _routed(self, names: Sequence[str | None], token_slots: Tensor | None) -> Iterator[None]:
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence with one name or None for each row, got the string {names!r}")
        others = {o.pool for o in ROUTES.get() if isinstance(o, _Route) and o.pool is not self and not o.left}
        if not all(self._sites.keys().isdisjoint(other._sites) for other in others):
            raise ValueError("the route of another pool over the same layers is open; leave it first")
        with self._lock:
            if unknown := sorted({str(name) for name in names if name is not None and name not in self._known}):
                raise KeyError(f"not loaded: {', '.join(unknown)}")
            versions = [self._known[name] for name in dict.fromkeys(names) if name is not None]
            for version in versions:
                version.leases += 1
                self._settle(version)
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

    def _route(self, names: Sequence[str | None], versions: Sequence[_Version], token_slots: Tensor | None) -> _Route:
        slot_of = {version.name: slot for slot, version in enumerate(versions)}
        slots = torch.tensor([-1 if name is None else slot_of[name] for name in names], dtype=torch.int32)
        tables = []
        for version in versions:
            assert version.region is not None
            tables.append(version.rows.fields + version.rows.own * version.region.begin)
            if version.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(version.ready)
        table = (
            torch.stack(tables, 1) if tables else torch.zeros(len(self._sites), 0, len(arena.FIELDS), dtype=torch.int64)
        )
        used = (table[:, :, 0] > 0).any(1).tolist()
        if token_slots is not None:
            # The slot of each token by the slot of its name; -1 reads the one put last.
            slots = torch.cat([slots, slots.new_full((1,), -1)])[token_slots.cpu().long()]
        return _Route(
            self, len(names), token_slots is not None, slots.to(self.device), table.to(self.device), used
        )  # fmt: skip

    def _release(self, versions: Sequence[_Version]) -> None:
        if self.device.type == "cuda" and versions:
            stream = torch.cuda.current_stream(self.device)
            self._released[stream] = stream.record_event()
        for version in versions:
            version.leases -= 1
            self._settle(version)
            if version.retired and not version.leases:
                self._drop(version)

    # ---- memory

    def _settle(self, version: _Version) -> None:
        """Note anew, as used last, whether an adapter may leave the arena."""
        self._idle.pop(version, None)
        if version.region is not None and not (version.leases or version.pinned or version.retired):
            self._idle[version] = None

    def _version(self, name: str) -> _Version:
        if name not in self._known:
            raise KeyError(f"not loaded: {name}")
        return self._known[name]

    def _lay_out(self, updates: Mapping[str, tuple[LowRankUpdate, tuple[Any, ...] | None]]) -> ReadAdapter:
        """The bytes of an adapter side by side, and the factors of its families."""
        parts: list[Tensor] = []
        size = 0
        shared: dict[tuple[Any, ...], list[Tensor]] = {}

        def place(tensor: Tensor) -> int:
            nonlocal size
            begin, size = size, size + arena.aligned(tensor.nbytes)
            parts.append(arena.bytes_of(tensor.cpu()))
            return begin

        rounded: dict[str, list[Tensor]] = {}
        rows, own = ([[0] * len(arena.FIELDS) for _ in self._layers] for _ in range(2))
        for layer_name, (update, family) in updates.items():
            layer, rank = self._layers[layer_name], update.rank
            if rank > (limit := _most_ranks(layer)):
                raise ValueError(f"{layer_name}: the update has rank {rank}, and at most {limit} can be routed there")
            site = self._sites[id(layer)]
            core = update.core
            scale = float(update.scale)
            if not abs(scale) <= _LARGEST:
                raise ValueError(f"{layer_name}: s = {scale} is no float32")
            here = rounded[layer_name] = []
            values = None if core is None else Core(self._kept(core.values, here), core.index)
            if family is None:
                down, up = (self._matrix(factor, here) for factor in (update.down, update.up))
                placed = arena.factors(down, up, place)
            else:
                placed, shared[family] = self._laid_out(family, update)
            rows[site] = fields = arena.row(rank, placed, values, scale, place)
            for at in arena.OFFSETS if family is None else arena.OFFSETS[-2:]:
                own[site][at] = int(fields[at] >= 0)
        # All at once, as when they were read.
        if not all_finite(tensor for here in rounded.values() for tensor in here):
            raise self._too_large(next(layer_name for layer_name, here in rounded.items() if not all_finite(here)))
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        padding = torch.zeros(arena.ALIGNMENT, dtype=torch.uint8)
        gaps = (-part.numel() % arena.ALIGNMENT for part in parts)
        padded = [(part, padding[:gap]) if gap else (part,) for part, gap in zip(parts, gaps, strict=True)]
        torch.cat([*chain.from_iterable(padded)], out=memory)
        families = tuple(family for _, family in updates.values() if family is not None)
        return ReadAdapter(self, _Version("", _Rows(_integers(rows), _integers(own)), size, families, memory), shared)

    def _laid_out(self, family: tuple[Any, ...], update: LowRankUpdate) -> tuple[list[int], list[Tensor]]:
        """Fields of shared factors relative to the family, which is placed apart, and their bytes one after the other."""
        laid = self._laid.get(family)
        if laid is None:
            parts: list[Tensor] = []
            rounded: list[Tensor] = []

            def place(tensor: Tensor) -> int:
                parts.append(tensor)
                return sum(arena.aligned(part.nbytes) for part in parts[:-1])

            down, up = (self._matrix(factor, rounded) for factor in (update.down, update.up))
            laid = arena.factors(down, up, place), parts
            if not all_finite(rounded):
                raise self._too_large(family[1])
            self._laid[family] = laid
        return laid

    def _too_large(self, layer_name: str) -> ValueError:
        return ValueError(
            f"{layer_name}: a number of the adapter is too large for {self._dtype or torch.float32}, which the pool keeps"
        )

    def _kept(self, values: Tensor, rounded: list[Tensor]) -> Tensor:
        """In the pool's dtype; what thereby may have become infinite is added to ``rounded``."""
        values = values.detach()
        dtype = self._dtype or (values.dtype if values.dtype in FLOAT_DTYPES else torch.float32)
        if dtype == values.dtype:
            return values.contiguous()
        kept = values.to(dtype).contiguous()
        rounded.append(kept)
        return kept

    def _matrix(self, factor: Tensor | QuantizedWeight, rounded: list[Tensor]) -> Matrix:
        if isinstance(factor, QuantizedWeight):
            return factor.operand()
        return Matrix(self._kept(factor, rounded))

    def _place_family(self, key: tuple[Any, ...], parts: Sequence[Tensor]) -> None:
        region = self._take(sum(arena.aligned(part.nbytes) for part in parts), f"the factors of {key[1]}")
        begin = region.begin
        with self._copying():
            for part in parts:
                self._memory[begin : begin + part.nbytes] = arena.bytes_of(part).to(self.device)
                begin += arena.aligned(part.nbytes)
        if self._copies is not None:
            self._copies.synchronize()
        self._families[key] = _Family(region)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """On a GPU: within it work goes to the stream of copies, after what read the arena before."""
        if self._copies is None:
            yield
            return
        for event in self._released.values():
            self._copies.wait_event(event)
        with torch.cuda.stream(self._copies):
            yield

    def _bind(self, version: _Version) -> None:
        """Rows of shared factors made absolute; the same rows, for thousands of adapters, kept once."""
        # Anew, since what was read may be loaded again.
        rows, begins = _Rows(version.rows.fields.clone(), version.rows.own), [0] * len(self._sites)
        for key in version.families:
            begins[self._sites[id(self._layers[key[1]])]] = self._families[key].region.begin
        factors = list(arena.OFFSETS[:-2])
        offsets = rows.fields[:, factors]
        rows.fields[:, factors] = torch.where(offsets >= 0, offsets + torch.tensor(begins).unsqueeze(1), offsets)
        same = hashlib.sha256(rows.fields.numpy().tobytes() + rows.own.numpy().tobytes()).digest()
        version.rows = self._layouts.setdefault(same, rows)

    def _make_resident(self, version: _Version) -> None:
        if version.region is not None:
            return
        assert version.host is not None
        known = self._known.get(version.name) is version
        leaves = version.size if self._copies is None and known else 0
        version.region = self._take(version.size, f"adapter {version.name}", leaves)
        begin, end = version.region.begin, version.region.begin + version.size
        with self._copying():
            self._memory[begin:end].copy_(version.host, non_blocking=True)
        if self._copies is None:
            version.host = None  # it would be the same memory twice
            self._host_used -= leaves
        else:
            version.ready = self._copies.record_event()

    def _host_room(self) -> float:
        """Bytes of adapters that host memory may still take."""
        if self._host_bytes is None:
            return float("inf")
        return self._host_bytes - self._host_used

    def _check_host(self, version: _Version, old: _Version | None) -> None:
        """Raise where a new adapter, which on a GPU stays in host memory too, has no room there."""
        room = self._host_room() + (0 if old is None or old.host is None else old.host.numel())
        if self._copies is not None and version.size > room:
            raise MemoryError(
                f"adapter {version.name} needs {version.size} bytes of host memory; {max(room, 0)} of {self._host_bytes} "
                "are free"
            )

    def _take(self, size: int, what: str, leaves: int = 0) -> _Region:
        """A free piece, after evicting what was used longest ago; what is in use or pinned stays.

        ``leaves``: bytes that leave host memory for it.
        """
        size = max(arena.aligned(size), arena.ALIGNMENT)
        while True:
            for region in self._free:
                if region.size >= size:
                    taken = _Region(region.begin, size)
                    region.begin, region.size = region.begin + size, region.size - size
                    if not region.size:
                        self._free.remove(region)
                    return taken
            room = self._host_room() + leaves
            free = enough = sum(region.size for region in self._free)
            first: _Version | None = None
            # What cannot fit at all makes nobody leave.
            for v in self._idle:
                if v.host is not None or v.size <= room:
                    assert v.region is not None
                    first, enough = first or v, enough + v.region.size
                    if enough >= size:
                        break
            if first is None or enough < size:
                raise MemoryError(
                    f"{what} needs {size} bytes in one piece; of {self.capacity_bytes} bytes {free} are free, the rest is "
                    "pinned, in use, shared, or has no room in host memory"
                )
            self._evict(first)

    def _evict(self, version: _Version) -> None:
        assert version.region is not None
        if version.host is None:
            begin = version.region.begin
            version.host = self._memory[begin : begin + version.size].clone()
            self._host_used += version.size
        self._give_back(version.region)
        version.region = version.ready = None
        self._settle(version)
        self._evictions += 1

    def _give_back(self, region: _Region) -> None:
        at = bisect(self._free, region.begin, key=lambda r: r.begin)
        self._free.insert(at, region)
        for left in (at, at - 1):  # with the piece behind it, then with the one before
            if 0 <= left < len(self._free) - 1:
                piece, following = self._free[left : left + 2]
                if piece.begin + piece.size == following.begin:
                    piece.size += following.size
                    del self._free[left + 1]

    def _retire(self, version: _Version) -> None:
        """Make the pool forget a known adapter."""
        version.retired = True
        del self._known[version.name]
        self._host_used -= 0 if version.host is None else version.size
        self._settle(version)
        if not version.leases:
            self._drop(version)

    def _drop(self, version: _Version) -> None:
        if version.region is not None:
            self._give_back(version.region)
            version.region = None
        for key in version.families:
            family = self._families[key]
            family.members -= 1
            if not family.members:
                self._give_back(self._families.pop(key).region)
                self._forget(key)

    def _forget(self, key: tuple[Any, ...]) -> None:
        self._made.pop(key, None)
        self._laid.pop(key, None)


def _integers(rows: Sequence[Sequence[int]]) -> Tensor:
    """As int64; torch.tensor takes several times as long for lists of lists."""
    flat = array("q", chain.from_iterable(rows))
    return torch.frombuffer(flat, dtype=torch.int64).view(len(rows), -1)


def _check_batch(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Before the model's forward: as many rows as names."""
    routes = (route for route in ROUTES.get() if isinstance(route, _Route) and route.pool._model() is model)
    route = next(routes, None)
    if route is None or route.left or route.by_token:
        return
    named = (keywords.get(name) for name in _BATCH)
    given = next((t for t in (*inputs, *named) if isinstance(t, Tensor) and t.dim() > 0), None)
    if given is None:
        return
    if len(given) != route.rows:
        raise ValueError(f"names must have one name for each of the {len(given)} rows, got {route.rows}")
    route.tokens = given.shape[:-1].numel() if given.is_floating_point() else given.numel()


@dataclass
class _Route:
    """An open route of a pool, as layers see it (:class:`lowrank_ops.route.Route`)."""

    pool: AdapterPool
    rows: int
    by_token: bool
    slots: Tensor  # of each name, or of each token
    table: Tensor  # [sites, slots, FIELDS]
    used: Sequence[bool]  # by site
    repeated: dict[int, Tensor] = field(default_factory=dict)
    tokens: int = 0  # of the batch that the model was given last
    left: bool = False

    def holds(self, layer: nn.Module) -> bool:
        return self.pool.holds(layer)

    def covers(self, layer: nn.Module) -> bool:
        return self.used[self.pool._sites[id(layer)]]

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(layer, Linear)
        site = self.pool._sites[id(layer)]
        if x.shape[-1] != layer.in_features or x.device != self.table.device:
            raise ValueError(
                f"x must be [..., K={layer.in_features}] on {self.table.device}, where the pool is, got {list(x.shape)} on "
                f"{x.device}"
            )
        rows = x.reshape(-1, layer.in_features)
        assert layer.weight is not None
        slots = self._slots_of(x, len(rows))
        y = functional.routed(
            rows, layer.weight, self.pool._memory, self.table[site], slots, layer.bias, _most_ranks(layer)
        )
        return y.view(*x.shape[:-1], layer.out_features)

    def _slots_of(self, x: Tensor, tokens: int) -> Tensor:
        if self.by_token:
            if tokens != len(self.slots):
                raise ValueError(
                    f"token_slots must have one slot for each of the {tokens} tokens, got {len(self.slots)}"
                )
            return self.slots
        # A model may have flattened its batch before a layer, [B · T, K]; then rows lie one after the other too. Another
        # number of tokens is a choice of them (a router's, say), and whose they are cannot be told.
        flat = x.dim() == 2 and tokens in (self.rows, self.tokens)
        if not flat and (x.dim() < 3 or len(x) != self.rows):
            raise ValueError(f"names must have one name for each row of {list(x.shape)}, got {self.rows}")
        if tokens not in self.repeated:
            self.repeated[tokens] = self.slots.repeat_interleave(tokens // max(self.rows, 1))
        return self.repeated[tokens]


def _most_ranks(layer: Linear) -> int:
    """The largest rank that is routed there: of the shape and not of what is loaded, so that a captured graph of kernels
    can be replayed with other adapters."""
    return max(512, min(layer.out_features, layer.in_features))


def _check_config(source: Any, config: Mapping[str, Any] | None) -> None:
    if config is not None and not isinstance(source, Mapping):
        raise ValueError("config says what tensors are, and files have one of their own; leave config out")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"name must be letters, digits and _ . @ + -, at most 128 and no path, got {name!r}"
        )  # fmt: skip
