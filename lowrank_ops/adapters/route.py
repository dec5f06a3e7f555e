"""Open routes: within one, each row of a batch goes through its own adapter (lowrank_ops.serving)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """Rows of a block of experts: every token once for each of its experts, sorted by expert."""

    offsets: Tensor  # int32 [E + 1]: expert e has the rows offsets[e] … offsets[e + 1] − 1
    tokens: Tensor | None  # int64 [P]: the token of each row; None if the block is not told
    total: int  # number of tokens


class Route(Protocol):
    """The part of a route that a layer uses."""

    left: bool

    def holds(self, layer: nn.Module) -> bool:
        """Tell whether the layer belongs to the pool of this route."""

    def covers(self, layer: nn.Module) -> bool:
        """Tell whether some adapter of the route changes this layer of its pool."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Compute y [..., N] of a covered layer for x [..., K]."""

    def experts(self, layer: nn.Module, x: Tensor, rows: Rows) -> Tensor:
        """Compute y [P, N] of a covered stack of experts for x [P, K]."""

    def module(
        self, module: nn.Module, plain: Callable[..., Any], inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        """Compute a covered module that is not an adapted layer; plain: its forward without a route."""


class Pool(Protocol):
    """The part of a pool that is asked before one of its layers is changed."""

    def holds(self, layer: nn.Module) -> bool:
        """Tell whether the pool routes the layer."""


POOLS: WeakSet[Pool] = WeakSet()


def check_unpooled(layer: nn.Module) -> None:
    """Raise if a pool routes the layer: rows would bypass a replacement of the layer or a new adapter in it."""
    if any(pool.holds(layer) for pool in list(POOLS)):
        raise ValueError("an AdapterPool routes the layer as it is; drop the pool first, or take a copy of the model")


# The routes that this thread or task is in, innermost last; routes of several pools may be open at once.
ROUTES: ContextVar[tuple[Route, ...]] = ContextVar("routes", default=())


def route_of(layer: nn.Module) -> Route | None:
    """The innermost route of the layer's pool; None outside a route, or if the route has no update for the layer.

    Raises:
        RuntimeError: the route was left elsewhere, and its memory may have been overwritten.
    """
    for route in ROUTES.get():
        if route.holds(layer):
            if route.left:
                raise RuntimeError(
                    "the route that this task or thread was started in has been left; enter a route inside the task"
                )
            return route if route.covers(layer) else None
    return None


# ---- compiled models

# A graph must not depend on a route: each route would compile it again. So it calls two ops, which find the route when
# they run. They get the number of a layer or of a check as a tensor, so that equal blocks of a model can share a graph.
LIBRARY = torch.library.Library("lowrank_ops_routes", "DEF")
_NUMBERS = count()
_NUMBERED: WeakValueDictionary[int, Any] = WeakValueDictionary()


def numbered(thing: Any) -> Tensor:
    """Give a layer or a check a number under which the ops find it, as long as it exists."""
    number = next(_NUMBERS)
    _NUMBERED[number] = thing
    return torch.tensor(number, device="cpu")


class Place(NamedTuple):
    """What a compiled graph knows of a layer of a pool."""

    layer: Tensor  # its number
    check: Tensor  # the number of the check of rows of the pool's model

    def linear(self, x: Tensor, out_features: int) -> Tensor:
        """y [..., N] of the layer as it stands when the graph runs; without gradients."""
        y: Tensor = torch.ops.lowrank_ops_routes.linear(x, self.layer, self.check, out_features)
        return y

    def experts(self, x: Tensor, rows: Rows, out_features: int) -> Tensor:
        """The same for a stack of experts: y [P, N]."""
        y: Tensor = torch.ops.lowrank_ops_routes.experts(x, *rows, self.layer, self.check, out_features)
        return y


def _define(declaration: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = declaration.partition("(")[0]
    LIBRARY.define(declaration, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowrank_ops_routes::{name}", fake, lib=LIBRARY)


_define(
    "linear(Tensor x, Tensor layer, Tensor check, int out_features) -> Tensor",
    lambda x, layer, check, out_features: _NUMBERED[int(layer)].forward(x),
    lambda x, layer, check, out_features: x.new_empty(*x.shape[:-1], out_features),
)
_define(
    "experts(Tensor x, Tensor offsets, Tensor tokens, SymInt total, Tensor layer, Tensor check, int out_features) -> Tensor",
    lambda x, offsets, tokens, total, layer, check, out_features: _NUMBERED[int(layer)].forward(
        x, Rows(offsets, tokens, total)
    ),
    lambda x, offsets, tokens, total, layer, check, out_features: x.new_empty(x.shape[0], out_features),
)
# The op leaves its check as it is. Declared as written, it runs, and before the layers, which read it.
_define(
    "check_rows(Tensor batch, Tensor? images, Tensor? videos, Tensor(a!) check) -> ()",
    lambda batch, images, videos, check: _NUMBERED[int(check)].count(batch, images, videos),
    lambda batch, images, videos, check: None,
)


# ---- routes


@contextmanager
def entered(route: Route) -> Iterator[None]:
    """Make a route the innermost one within the context. Routes may be left in any order."""
    ROUTES.set((route, *(outer for outer in ROUTES.get() if not outer.left)))
    try:
        yield
    finally:
        # A task started inside the context still has the route.
        route.left = True
        ROUTES.set(tuple(other for other in ROUTES.get() if other is not route))
