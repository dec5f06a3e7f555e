"""Compute a layer of a pool within a route: each row goes through the adapter of its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..adapters.linear import Linear
from ..adapters.route import ROUTES

# Names that models give to their input batch.
_BATCH = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states", "x", "input")


def most_ranks(layer: Linear) -> int:
    """The largest rank that can be routed to a layer. It depends on the shape and not on loaded adapters, so that a
    captured graph of kernels can be replayed with other adapters."""
    return max(512, min(layer.out_features, layer.in_features))


@dataclass
class PoolRoute:
    """An open route of a pool, as layers see it (:class:`lowrank_ops.adapters.route.Route`)."""

    memory: Tensor  # the arena
    sites: Mapping[int, int]  # id of a layer of the pool -> its index in the table
    layers: Mapping[str, Linear]  # the pool's layers; keeps them alive, and so their ids valid
    model: Callable[[], nn.Module | None]
    rows: int
    by_token: bool
    slots: Tensor  # one for each name, or for each token
    table: Tensor  # [sites, slots, FIELDS]
    used: Sequence[bool]  # by site
    repeated: dict[int, Tensor] = field(default_factory=dict)
    tokens: int = 0  # tokens in the model's latest batch
    left: bool = False

    def holds(self, layer: nn.Module) -> bool:
        return id(layer) in self.sites

    def covers(self, layer: nn.Module) -> bool:
        return self.used[self.sites[id(layer)]]

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(layer, Linear)
        site = self.sites[id(layer)]
        if x.shape[-1] != layer.in_features or x.device != self.table.device:
            raise ValueError(
                f"x must be [..., K={layer.in_features}] on {self.table.device}, the pool's device, got {list(x.shape)} on "
                f"{x.device}"
            )
        rows = x.reshape(-1, layer.in_features)
        assert layer.weight is not None
        slots = self._slots_of(x, len(rows))
        y = functional.routed(rows, layer.weight, self.memory, self.table[site], slots, layer.bias, most_ranks(layer))
        return y.view(*x.shape[:-1], layer.out_features)

    def _slots_of(self, x: Tensor, tokens: int) -> Tensor:
        if self.by_token:
            if tokens != len(self.slots):
                raise ValueError(
                    f"token_slots must have one slot for each of the {tokens} tokens, got {len(self.slots)}"
                )
            return self.slots
        # A model may flatten its batch before a layer, [B · T, K]; then rows still follow one another. Any other number
        # of tokens is a selection of them (by a router, say), whose rows cannot be known.
        flat = x.dim() == 2 and tokens in (self.rows, self.tokens)
        if not flat and (x.dim() < 3 or len(x) != self.rows):
            raise ValueError(f"names must have one name for each row of {list(x.shape)}, got {self.rows}")
        if tokens not in self.repeated:
            self.repeated[tokens] = self.slots.repeat_interleave(tokens // max(self.rows, 1))
        return self.repeated[tokens]


def check_batch(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Check, before the model's forward, that there are as many rows as names."""
    routes = (route for route in ROUTES.get() if isinstance(route, PoolRoute) and route.model() is model)
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
