"""Routes that are open: within one, every row of a batch goes through an adapter of its own (lowrank_ops.serving)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol
from weakref import WeakSet

from torch import Tensor, nn


class Route(Protocol):
    """What a layer asks of a route."""

    left: bool

    def holds(self, layer: nn.Module) -> bool:
        """Whether the layer is one of the pool whose route it is."""

    def covers(self, layer: nn.Module) -> bool:
        """Whether some adapter of the route has an update for a layer that it holds."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """y [..., N] of a layer that it covers, for x [..., K]."""


class Pool(Protocol):
    """What is asked of a pool before one of its layers is changed."""

    def holds(self, layer: nn.Module) -> bool:
        """Whether the pool routes the layer."""


POOLS: WeakSet[Pool] = WeakSet()


def check_unpooled(layer: nn.Module) -> None:
    """Raise where a pool routes the layer: rows would pass by what takes its place, or by an adapter it gets."""
    if any(pool.holds(layer) for pool in list(POOLS)):
        raise ValueError("an AdapterPool routes the layer as it is; drop the pool first, or take a copy of the model")


# The routes that this thread or task is in, the innermost first. Those of several pools stand side by side.
ROUTES: ContextVar[tuple[Route, ...]] = ContextVar("routes", default=())


def route_of(layer: nn.Module) -> Route | None:
    """The innermost route of the layer's pool; None outside of one, and where it has no update for the layer.

    Raises:
        RuntimeError: that route was left elsewhere, and what it read may have been overwritten.
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
    """Within it a route is the innermost one. Routes may be left in any order."""
    ROUTES.set((route, *(outer for outer in ROUTES.get() if not outer.left)))
    try:
        yield
    finally:
        # A task that was started inside still has it.
        route.left = True
        ROUTES.set(tuple(other for other in ROUTES.get() if other is not route))
