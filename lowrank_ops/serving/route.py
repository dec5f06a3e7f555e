"""Compute a layer of a pool within a route: each row goes through the adapter of its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, ops
from ..adapters.experts import ExpertsLinear
from ..adapters.linear import AdaptedLayer, Linear
from ..adapters.route import ROUTES, Rows, numbered
from ..adapters.tokens import put_rows
from .mixtures import Entries
from .order import GRIDS, Batch, Media, Order, rows_of
from .own import Own

# Names that models give to their input batch.
_BATCH = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states", "x", "input")


def most_ranks(layer: AdaptedLayer) -> int:
    """The largest rank that can be routed to a layer. It depends on the shape and not on loaded adapters, so that a
    captured graph of kernels can be replayed with other adapters."""
    return max(512, min(layer.out_features, layer.in_features))


@dataclass
class PoolRoute:
    """An open route of a pool, as layers see it (:class:`lowrank_ops.adapters.route.Route`)."""

    memory: Tensor  # the arena
    sites: Mapping[int, int]  # id of a layer of the pool -> its index in the table
    layers: Mapping[str, AdaptedLayer]  # the pool's layers; keeps them alive, and so their ids valid
    check: RowCheck  # of the pool's model
    by_token: bool
    names: Sequence[int]  # a number for each row; rows with the same adapters have the same
    entries: Entries  # of each row, or of each token
    alike: bool  # whether all have the same adapters
    table: Tensor  # [sites, slots, FIELDS]
    used: Sequence[bool]  # by site
    own: Mapping[int, Own]  # id of a module -> what the adapters have of their own there
    orders: Mapping[int, Order]  # id of a module -> how its input follows from the batch; ROWS where it is missing
    media: Media
    batch: Batch = field(default_factory=Batch)
    by_shape: dict[Any, Entries] = field(default_factory=dict)  # order and shape of an input -> its tokens' entries
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
        assert layer.weight is not None
        entries, own = self._entries_of(layer, x.shape, x.shape[:-1].numel()), self.own.get(id(layer))
        capacity, branch = most_ranks(layer), layer.branch
        if own is None and ops.dispatcher_is_idle() and (run := layer.prepared()) is not None:
            return run.route_idle(x, self.memory, self.table[site], entries.slots, capacity, entries.strengths)
        rows = x.reshape(-1, layer.in_features)
        if own is None or entries.strengths is not None:
            operands = rows, layer.weight, self.memory, self.table[site], entries.slots, layer.bias, capacity
            y = functional.routed(*operands, branch=branch, strengths=entries.strengths)
        if own is not None:
            # With strengths, first every column by itself.
            columns = [self._with_own(layer, rows, slots, own) for slots in entries.columns]
            if entries.strengths is None:
                y = columns[0]
            else:
                base = functional.adapted_linear(rows, layer.weight, None, layer.bias, branch=branch)
                y = entries.mixed(base, columns, own.holders(y.device), y)
        return y.view(*x.shape[:-1], layer.out_features)

    def _with_own(self, layer: Linear, rows: Tensor, slots: Tensor, own: Own) -> Tensor:
        """y [T, N] of a layer in which adapters have something of their own, with one adapter for a token."""
        assert layer.weight is not None
        operands = rows, layer.weight, self.memory, self.table[self.sites[id(layer)]], slots
        capacity, branch = most_ranks(layer), layer.branch
        y = functional.routed(*operands, layer.bias, capacity, branch=branch)
        if own.has("bias") or own.has("scale"):
            # y = g ⊙ (W x + s · U C (D x)) + b, for those rows alone: the others keep the bits that they have by themselves.
            z = (y if layer.bias is None else functional.routed(*operands, None, capacity, branch=branch)).float()
            if (scales := own.stacked("scale", y.new_ones(layer.out_features, dtype=torch.float32))) is not None:
                z = z * scales.index_select(0, slots + 1)
            biases = own.stacked("bias", layer.bias)
            if (bias := layer.bias if biases is None else biases.index_select(0, slots + 1)) is not None:
                z = z + bias
            y = torch.where(own.holders(y.device).index_select(0, slots + 1), z.to(y.dtype), y)
        if own.has("weight"):
            for slot, where in own.groups(slots):
                if slot >= 0 and "weight" in (tensors := own.tensors(slot)):
                    here = nn.functional.linear(rows[where], tensors["weight"], tensors.get("bias", layer.bias))
                    y[where] = here.to(y.dtype)
        if own.has("token_rows"):
            for slot, where in own.groups(slots):
                if slot >= 0 and "token_rows" in (tensors := own.tensors(slot)):
                    y[where] = put_rows(layer, rows[where], y[where], tensors["token_index"], tensors["token_rows"])
        return y

    def experts(self, layer: nn.Module, x: Tensor, rows: Rows) -> Tensor:
        assert isinstance(layer, ExpertsLinear) and layer.weight is not None
        if rows.tokens is None:
            entries = self._entries_of(layer, x.shape, len(x))
        else:
            shape = torch.Size((rows.total, layer.in_features))
            entries = self._entries_of(layer, shape, rows.total).at(rows.tokens)
        table = self.table[self.sites[id(layer)]]
        operands = x, layer.weight, self.memory, table, entries.slots, layer.bias, most_ranks(layer), rows.offsets
        return functional.routed(*operands, branch=layer.branch, strengths=entries.strengths)

    def module(
        self, module: nn.Module, plain: Callable[..., Any], inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        rows, own, seen = None if self.by_token else len(self.names), self.own[id(module)], self.entries

        def run(column: int) -> Tensor:
            def slots_of(x: Tensor, tokens: int) -> Tensor:
                nonlocal seen
                seen = self._entries_of(module, x.shape, tokens)
                return seen.columns[column]

            return own.run(module, plain, inputs, keywords, rows, slots_of)

        columns = [run(column) for column in range(len(self.entries.columns))]
        if self.entries.strengths is None:
            return columns[0]
        y = columns[0]
        base = plain(*inputs, **keywords).expand_as(y)
        flat = [part.reshape(len(seen.slots), -1) for part in (base, *columns)]
        return seen.mixed(flat[0], flat[1:], own.holders(y.device), flat[0]).view_as(y)

    def _entries_of(self, layer: nn.Module, shape: torch.Size, tokens: int) -> Entries:
        """The adapters of each token of an input of a layer.

        Raises:
            ValueError: the row of a token cannot be told.
        """
        order = self.orders.get(id(layer), Order.ROWS)
        if self.by_token:
            if tokens != len(self.entries.slots):
                raise ValueError(
                    f"token_slots must have one slot for each of the {tokens} tokens, got {len(self.entries.slots)}"
                )
            if order is Order.CHOSEN and not self.alike:
                raise ValueError(self._refusal(layer, shape, order))
            return self.entries
        # [N, K] may be a flattened batch, which depends on its number of tokens.
        key = order, shape, self.batch.tokens if len(shape) == 2 else 0
        if key not in self.by_shape:
            if self.alike:  # whatever row a token is of
                rows: Tensor | None = torch.zeros(tokens, dtype=torch.int64, device="cpu")
            else:
                rows = rows_of(order, shape, self.names, self.batch, self.media)
                if rows is None:
                    raise ValueError(self._refusal(layer, shape, order))
            assert rows is not None
            self.by_shape[key] = self.entries.at(rows)
        return self.by_shape[key]

    def _refusal(self, layer: nn.Module, shape: torch.Size, order: Order) -> str:
        name = next((name for name, mine in self.layers.items() if mine is layer), type(layer).__name__)
        return (
            f"names must have one name for each row of {list(shape)}, got {len(self.names)}; layer {name!r} takes its input "
            f"as {order.value}, so the row of each token cannot be told here: give all rows the same name, or use adapters "
            "without this layer"
        )

    def note(self, given: Tensor, grids: Sequence[Tensor | None]) -> None:
        """Take what a forward of the model tells of its batch."""
        floating = given.is_floating_point()
        self.batch = Batch(given.shape[:-1].numel() if floating else given.numel())
        if self.media.tokens:
            self.by_shape = {key: entries for key, entries in self.by_shape.items() if key[0] is not Order.MEDIA}
            if not floating:
                self.batch.ids, self.batch.grids = given, tuple(grids)


def _is_batch(given: Any) -> bool:
    """Tell whether an argument has a row for each name: a Tensor, or a list of Tensors."""
    if isinstance(given, list):
        return bool(given) and all(isinstance(t, Tensor) for t in given)
    return isinstance(given, Tensor) and given.dim() > 0


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
        compiling = torch.compiler.is_dynamo_compiling()
        if not compiling and not ROUTES.get():
            return
        named = (keywords.get(name) for name in _BATCH)
        given = next((t for t in (*inputs, *named) if _is_batch(t)), None)
        if given is None:
            return
        if not isinstance(given, Tensor):  # a list of rows, of which no layer can tell more than their number
            given = torch.zeros(len(given), 1, device="cpu")
        grids = [keywords.get(name) for name in GRIDS]
        if compiling:
            torch.ops.lowrank_ops_routes.check_rows(given, *grids, self.number)
        else:
            self.count(given, *grids)

    def count(self, given: Tensor, *grids: Tensor | None) -> None:
        """Note the rows, tokens and media of a batch for the innermost route of the model."""
        route = next((r for r in ROUTES.get() if isinstance(r, PoolRoute) and r.check is self), None)
        if route is None or route.left or route.by_token:
            return
        if len(given) != len(route.names):
            raise ValueError(f"names must have one name for each of the {len(given)} rows, got {len(route.names)}")
        route.note(given, grids)
