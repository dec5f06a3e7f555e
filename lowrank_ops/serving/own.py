"""What a row has of its own besides updates: heads, embeddings, norms and biases that an adapter trained whole.

They lie in the arena beside the adapter's factors. A module that is no layer of ours gets a forward that splits its input by
adapter, and runs once for each adapter that has parameters of its own there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.conv import convolve
from ..adapters.dora import scaled_linear
from ..adapters.embedding import Embedding, embed
from ..adapters.linear import branch_of
from ..adapters.route import route_of
from ..adapters.tokens import put_rows
from ..functional import LowRankUpdate

# Modules that compute every token by itself: classes, and endings of the names of classes in other libraries.
_TOKENWISE = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_TOKENWISE_NAMES = ("Conv1D", "RMSNorm", "LayerNorm", "Embedding")


class Part(NamedTuple):
    """A tensor in an adapter's bytes."""

    begin: int  # relative to the adapter's first byte
    dtype: torch.dtype
    shape: torch.Size

    def view(self, memory: Tensor, begin: int) -> Tensor:
        """The tensor of an adapter that begins at a position of the arena."""
        at = begin + self.begin
        return memory[at : at + self.shape.numel() * self.dtype.itemsize].view(self.dtype).view(self.shape)


# Name of a parameter or buffer of a module -> where it lies; "scale" of a DoRA, "down", "up" and "s" of a LoRA.
Parts = Mapping[str, Part | float]


class RoutedForward:
    """Stands on a module as its ``forward``: in a route it gives each row the parameters of its adapter."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.pools = module, 0
        self.before: Callable[..., Any] | None = vars(module).get("forward")

    @classmethod
    def install(cls, module: nn.Module) -> None:
        """Let a module look for routes, for one more pool."""
        if not isinstance(vars(module).get("forward"), cls):
            module.forward = cls(module)
        vars(module)["forward"].pools += 1

    @staticmethod
    def remove(modules: Sequence[nn.Module]) -> None:
        """Undo :meth:`install`, for a pool that is gone."""
        for module in modules:
            forward = vars(module).get("forward")
            if isinstance(forward, RoutedForward):
                forward.pools -= 1
                if not forward.pools:
                    vars(module).pop("forward")
                    vars(module).update({} if forward.before is None else {"forward": forward.before})

    @torch.compiler.disable
    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        route = route_of(self.module)
        if route is None:
            return self.plain(*inputs, **keywords)
        return route.module(self.module, self.plain, inputs, keywords)

    def plain(self, *inputs: Any, **keywords: Any) -> Any:
        """Call the forward that the module had before."""
        if self.before is not None:
            return self.before(*inputs, **keywords)
        return type(self.module).forward(self.module, *inputs, **keywords)


class Own:
    """What the adapters of a route have of their own in one module.

    Args:
        memory: the arena.
        parts: by slot: the parts of an adapter and its first byte, or None if it has none here.
    """

    def __init__(self, memory: Tensor, parts: Sequence[tuple[Parts, int] | None]) -> None:
        self._memory, self._parts = memory, parts
        self._tensors: dict[int, dict[str, Any]] = {}
        self._stacked: dict[str, Tensor | None] = {}
        self._groups: dict[int, tuple[Tensor, list[tuple[int, Tensor]]]] = {}

    def has(self, key: str) -> bool:
        """Tell whether some adapter has a tensor of this name."""
        return any(held is not None and key in held[0] for held in self._parts)

    def tensors(self, slot: int) -> dict[str, Any]:
        """The tensors of an adapter by name, as views of the arena."""
        held = None if slot < 0 else self._parts[slot]
        if held is None:
            return {}
        if slot not in self._tensors:
            parts, begin = held
            self._tensors[slot] = {
                key: part.view(self._memory, begin) if isinstance(part, Part) else part for key, part in parts.items()
            }
        return self._tensors[slot]

    def stacked(self, key: str, otherwise: Tensor | None) -> Tensor | None:
        """[1 + slots, …]: first the module's tensor, then each adapter's; None if no adapter has one."""
        if key not in self._stacked:
            rows = [self.tensors(slot).get(key, otherwise) for slot in range(-1, len(self._parts))]
            first = next(row for row in rows if row is not None) if self.has(key) else None
            made = [torch.zeros_like(first) if row is None else row for row in rows] if first is not None else None
            if made is not None:
                dtype = functools.reduce(torch.promote_types, (row.dtype for row in made))
                made = [row.to(dtype) for row in made]
            self._stacked[key] = None if made is None else torch.stack(made)
        return self._stacked[key]

    def holders(self, device: torch.device) -> Tensor:
        """Bool [1 + slots, 1]: whether an adapter has a part here; first, for the module itself, False."""
        if "" not in self._stacked:
            held = [[False], *([parts is not None] for parts in self._parts)]
            self._stacked[""] = torch.tensor(held, device=device)
        made = self._stacked[""]
        assert made is not None
        return made

    def groups(self, slots: Tensor) -> list[tuple[int, Tensor]]:
        """(slot, the positions of its tokens), for each adapter that has a part here; -1 for all other tokens."""
        if id(slots) not in self._groups:
            here = slots.tolist()
            owners = {slot: slot if held is not None else -1 for slot, held in enumerate(self._parts)} | {-1: -1}
            found: dict[int, list[int]] = {}
            for at, slot in enumerate(here):
                found.setdefault(owners[slot], []).append(at)
            groups = [(slot, torch.tensor(places, device=slots.device)) for slot, places in found.items()]
            self._groups[id(slots)] = slots, groups  # the tensor is kept, and so its id valid
        return self._groups[id(slots)][1]

    def run(
        self,
        module: nn.Module,
        plain: Callable[..., Any],
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
        rows: int | None,
        slots_of: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """Run a module once for each group of rows or tokens, and put the results together.

        Args:
            plain: its forward without a route.
            inputs, keywords: of its forward.
            rows: the rows of a batch; None if names are given by token.
            slots_of: the slot of each token, for an input [..., K] and its number of tokens.
        """
        kind = type(module).__name__
        named: dict[Any, Any] = {**dict(enumerate(inputs)), **keywords}
        key, x = next(((key, t) for key, t in named.items() if isinstance(t, Tensor) and t.dim() > 0), (None, None))
        if x is None:
            raise ValueError(f"a {kind} of which adapters have their own needs a Tensor in a route")
        items: dict[Any, Tensor]
        if isinstance(module, _TOKENWISE) or kind.endswith(_TOKENWISE_NAMES):
            ids = not x.is_floating_point()
            if ids and rows is not None and rows > 1 and len(x) == 1:  # positions that all rows share
                x = x.expand(rows, *x.shape[1:])
            shape = x.shape if ids else x.shape[:-1]
            items = {key: x.reshape(-1) if ids else x.reshape(-1, x.shape[-1])}
            slots = slots_of(x.unsqueeze(-1) if ids else x, shape.numel())
        else:
            if rows is None:
                raise ValueError(
                    f"a {kind} of which adapters have their own must get a row for each name, got {list(x.shape)} and names "
                    "by token"
                )
            shape = x.shape[:1]
            items = {key: t for key, t in named.items() if isinstance(t, Tensor) and t.dim() > 0 and len(t) == len(x)}
            slots = slots_of(x.reshape(len(x), 1, -1), len(x))
        groups = self.groups(slots)
        if len(groups) < 2:
            return self._forward(module, plain, groups[0][0] if groups else -1)(*inputs, **keywords)
        y: Tensor | None = None
        for slot, where in groups:
            given = named | {key: t.index_select(0, where) for key, t in items.items()}
            made = self._forward(module, plain, slot)(
                *(given[at] for at in range(len(inputs))), **{key: given[key] for key in keywords}
            )
            if not isinstance(made, Tensor):
                raise TypeError(
                    f"a {kind} of which adapters have their own must return a Tensor, got {type(made).__name__}"
                )
            if y is None:
                y = made.new_empty(shape.numel(), *made.shape[1:])
            y.index_copy_(0, where, made.to(y.dtype))
        assert y is not None
        return y.view(*shape, *y.shape[1:])

    def _forward(self, module: nn.Module, plain: Callable[..., Any], slot: int) -> Callable[..., Any]:
        """The forward of a module over the tensors of an adapter."""
        tensors = self.tensors(slot)
        if not tensors:
            return plain
        if "token_rows" in tensors:
            index, rows = tensors["token_index"], tensors["token_rows"]
            return lambda x: put_rows(module, x, plain(x), index, rows)
        if isinstance(module, Embedding) and "down" not in tensors:
            return lambda ids: embed(module, tensors["weight"], None, ids)
        if "down" in tensors:
            weight = tensors.get("weight", module.weight)
            update = LowRankUpdate(tensors["down"], tensors["up"], None, tensors["s"])
            if isinstance(module, nn.Embedding):
                return lambda ids: embed(module, weight, update, ids)
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                return lambda x: convolve(module, x, (tensors["down"], tensors["up"], tensors["s"]))
            branch = None if "weight" in tensors else branch_of(module)
            return lambda x: scaled_linear(
                x, weight, update, tensors.get("scale"), tensors.get("bias", module.bias), branch
            )
        made = copy.copy(module)
        vars(made).pop("forward", None)
        for name in ("_parameters", "_buffers"):
            held = vars(module)[name]
            vars(made)[name] = {key: tensors.get(key, tensor) for key, tensor in held.items()}
        return made.forward
