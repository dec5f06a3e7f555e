"""Compute a layer of a pool within a route: each row goes through the adapter of its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, ops
from ..adapters.linear import Linear
from ..adapters.route import ROUTES, numbered
from .own import Own

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
    check: RowCheck  # of the pool's model
    rows: int
    by_token: bool
    slots: Tensor  # one for each name, or for each token
    table: Tensor  # [sites, slots, FIELDS]
    used: Sequence[bool]  # by site
    own: Mapping[int, Own]  # id of a module -> what the adapters have of their own there
    repeated: dict[int, Tensor] = field(default_factory=dict)
    tokens: int = 0  # tokens in the model's latest batch
    left: bool = False

    def holds(self, layer: nn.Module) -> bool:
        return id(layer) in self.sites or id(layer) in self.own

    def covers(self, layer: nn.Module) -> bool:
        return id(layer) in self.own or self.used[self.sites[id(layer)]]

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
        slots, own = self._slots_of(x, len(rows)), self.own.get(id(layer))
        biases = None if own is None else own.stacked("bias", layer.bias)
        bias = layer.bias if biases is None else None
        y = functional.routed(rows, layer.weight, self.memory, self.table[site], slots, bias, most_ranks(layer))
        if biases is not None:
            y += biases.to(y.dtype).index_select(0, slots + 1)
        if own is not None and own.has("weight"):
            for slot, where in own.groups(slots):
                if slot >= 0 and "weight" in (tensors := own.tensors(slot)):
                    here = nn.functional.linear(rows[where], tensors["weight"], tensors.get("bias", layer.bias))
                    y[where] = here.to(y.dtype)
        return y.view(*x.shape[:-1], layer.out_features)

    def module(
        self, module: nn.Module, plain: Callable[..., Any], inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        rows = None if self.by_token else self.rows
        return self.own[id(module)].run(module, plain, inputs, keywords, rows, self._slots_of)

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


class RowCheck:
    """A hook before the forward of a pool's model: check that a batch has as many rows as there are names.

    A copy of the model gets a check of its own, of which no route knows.
    """

    def __init__(self) -> None:
        self.number = numbered(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowCheck, ()

    @ops.run_eagerly
    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling and not ROUTES.get():
            return
        named = (keywords.get(name) for name in _BATCH)
        given = next((t for t in (*inputs, *named) if isinstance(t, Tensor) and t.dim() > 0), None)
        if given is None:
            return
        if compiling:
            torch.ops.lowrank_ops_routes.check_rows(given, self.number)
        else:
            self.count(given)

    def count(self, given: Tensor) -> None:
        """Count the rows and tokens of a batch for the innermost route of the model."""
        route = next((r for r in ROUTES.get() if isinstance(r, PoolRoute) and r.check is self), None)
        if route is None or route.left or route.by_token:
            return
        if len(given) != route.rows:
            raise ValueError(f"names must have one name for each of the {len(given)} rows, got {route.rows}")
        route.tokens = given.shape[:-1].numel() if given.is_floating_point() else given.numel()
