"""AdapterPool: many adapters of one model in one block of memory, and batches in which every row has its own adapter."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import functional
from ..adapters.beside import named_holders
from ..adapters.experts import ExpertsLinear
from ..adapters.linear import AdaptedLayer, Linear, check_unsplit
from ..adapters.names import call_named, modules_of
from ..adapters.route import POOLS, ROUTES, Place, entered, numbered
from ..ops import arena
from .mixtures import Adapters, Entries, Mixture, mixture, names_of
from .order import find_orders, media_of
from .own import Own, Parts, RoutedForward
from .route import PoolRoute, RowCheck
from .store import AdapterStore, ReadAdapter, Version  # noqa: F401  (imported from here too)

# Inside experts only updates are routed, not parameters that an adapter trained whole.
_EXPERTS = "experts"


class AdapterPool(AdapterStore):
    """Adapters of one model, side by side on its device: y[t] = W x[t] + bias + s_a · U_a C_a (D_a x[t]) at every layer.

    A row may have several, each at a strength w: y[t] = W x[t] + bias + Σ_a w_a s_a · U_a C_a (D_a x[t]), summed in the
    order of their names, so that a row's bits do not depend on other rows. Their factors are held and read once.

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
        # Every module that a row may have parameters of its own in.
        holders = {name: module for name, module in named_holders(model) if _EXPERTS not in name.split(".")}
        super().__init__(layers, capacity_bytes, root, dtype, factors, host_bytes, holders)
        # Those modules for which some adapter has had parameters, apart from adapted layers.
        self._owned: list[nn.Module] = []
        weakref.finalize(self, RoutedForward.remove, self._owned)
        self._orders, self._media = find_orders(model), media_of(model)
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

    def _loaded(self, version: Version) -> None:
        for module in (self._holders[holder] for holder in version.own):
            if not self.holds(module):
                RoutedForward.install(module)
                self._owned.append(module)

    # ---- routing

    def holds(self, layer: nn.Module) -> bool:
        """Tell whether the pool routes a layer."""
        return id(layer) in self._sites or any(layer is module for module in self._owned)

    @contextmanager
    def route(self, names: Sequence[Adapters]) -> Iterator[None]:
        """Within the context row b of every batch of the model goes through adapter names[b]; None means the base alone.

        A mapping of names to strengths, ``{"a": 0.7, "b": 0.3}``, is a row with 1 to 8 adapters at once. Strengths are
        finite numbers, and may be 0 or below. What an adapter trained whole, a DoRA included, counts by its strength too:
        y = base + Σ_a w_a (y_a - base), y_a with adapter a alone.

        Holds for the thread or task that enters it, for tasks started inside while it is open, and for any forward of
        the model, ``generate`` included. Tokens [T] without a batch dimension are one row. With beams a name is given
        once for every beam, because transformers repeats rows. Routes of several pools over different layers may be
        open at once; a route inside a route of the same pool replaces it for its duration.

        Where a layer's input is not [B, T, K] the row of a token is told from its order, as :mod:`lowrank_ops.serving.order`
        knows it: tokens before rows, windows, and pictures that fill the placeholders of a row. Where it cannot be told and
        names differ, the forward raises ValueError with the layer's name.

        Raises:
            KeyError: a name is not loaded.
            TypeError: names is a string; a row is neither a name, nor a mapping of names to numbers, nor None.
            ValueError: a mapping is empty, has more than 8 names or a strength that is not finite; the route of another
                pool is open, and the pools share layers.
            MemoryError: the adapters of the batch do not fit in addition to pinned and used ones.
        """
        with self._open_route(names, None):
            yield

    @contextmanager
    def route_tokens(self, names: Sequence[Adapters], token_slots: Tensor) -> Iterator[None]:
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
    def _open_route(self, names: Sequence[Adapters], token_slots: Tensor | None) -> Iterator[None]:
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence with one name or None for each row, got the string {names!r}")
        others = [
            o.sites for o in ROUTES.get() if isinstance(o, PoolRoute) and o.sites is not self._sites and not o.left
        ]
        if not all(self._sites.keys().isdisjoint(sites) for sites in others):
            raise ValueError("the route of another pool over the same layers is open; leave it first")
        mixtures = [mixture(given) for given in names]
        versions = self.acquire(names_of(mixtures))
        try:
            with entered(self._route(mixtures, versions, token_slots)):
                yield
        finally:
            self.release(versions)

    def _route(self, mixtures: Sequence[Mixture], versions: Sequence[Version], token_slots: Tensor | None) -> PoolRoute:
        known: dict[Mixture, int] = {}
        of_rows = [known.setdefault(m, len(known)) for m in mixtures]
        alike = len(known) == 1
        # The last row, which index -1 reads, has no adapter.
        entries = Entries.of([*mixtures, ()], {version.name: slot for slot, version in enumerate(versions)})
        tables = [self.table(version) for version in versions]
        empty = torch.zeros(len(self._sites), 0, len(arena.FIELDS), dtype=torch.int64, device="cpu")
        table = torch.stack(tables, 1) if tables else empty
        used = (table[:, :, 0] > 0).any(1).tolist()
        rows = torch.arange(len(mixtures), device="cpu")
        if token_slots is not None:
            rows = token_slots.cpu().long()
            alike = len({(*of_rows, known.get((), -1))[row] for row in rows.tolist()}) == 1
        held: dict[int, list[tuple[Parts, int] | None]] = {}
        for slot, version in enumerate(versions):
            assert version.region is not None
            for holder, parts in version.own.items():
                of_module = held.setdefault(id(self._holders[holder]), [None] * len(versions))
                of_module[slot] = parts, version.region.begin
        own = {module: Own(self._memory.bytes, parts) for module, parts in held.items()}
        return PoolRoute(
            self._memory.bytes, self._sites, self._layers, self._check, token_slots is not None, of_rows,
            entries.at(rows).to(self.device), alike, table.to(self.device), used, own,
            self._orders, self._media,
        )  # fmt: skip
