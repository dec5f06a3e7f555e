"""Open routes: within one, each row of a batch goes through its own adapter (lowrank_ops.serving)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol
from weakref import WeakSet

from torch import Tensor, nn


class Route(Protocol):
    """The part of a route that a layer uses."""

    left: bool

    def holds(self, layer: nn.Module) -> bool:
        """Tell whether the layer belongs to the pool of this route."""

    def covers(self, layer: nn.Module) -> bool:
        """Tell whether some adapter of the route updates this layer of its pool."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Compute y [..., N] of a covered layer for x [..., K]."""


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
