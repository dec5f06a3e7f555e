"""Trained rows of single tokens, in an embedding and in the head that is tied to it: PEFT's ``trainable_token_indices``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .linear import AdaptedLayer
from .names import named_holders, named_or_ending, unwrapped
from .route import check_unpooled

# The name of the rows in the module that holds them.
CHILD = "token_rows"


class TokenRows(nn.Module):
    """Rows that replace the rows of some tokens: W'[i] = rows[j] where i = index[j], else W[i].

    Attributes:
        index: the tokens, int64 [n], rising.
        rows: trained Parameter [n, H], float32.
        disabled: True within lowrank_ops.disabled.
        strength: w of lowrank_ops.set_strength.
    """

    index: Tensor
    adapter = None
    disabled = False
    strength = 1.0

    def __init__(self, index: Tensor, rows: Tensor) -> None:
        super().__init__()
        order = index.argsort()
        self.register_buffer("index", index[order])
        self.rows = nn.Parameter(rows.detach()[order.to(rows.device)].to(torch.float32, copy=True))

    def trained(self) -> list[nn.Parameter]:
        """The rows."""
        return [self.rows]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).pop("disabled", None)  # a copy is outside any context

    def extra_repr(self) -> str:
        return f"{len(self.index)} tokens"


class WithRows:
    """Mixed into the class of an embedding or a head: its output has the rows of some tokens.

    A class of its own, because a compiled graph is not made anew for a module that has got a hook since.
    """

    _plain: type[nn.Module]
    _rows: tuple[TokenRows]  # in a tuple, so that a tied head does not hold them a second time

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[misc]
        tokens = self._rows[0]
        if tokens.disabled:
            return y
        full = put_rows(self, x, y, tokens.index, tokens.rows)
        return full if tokens.strength == 1 else torch.lerp(y, full, tokens.strength)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _remade, (self._plain,), state


_CLASSES: dict[type[nn.Module], Any] = {}


def _with_rows(plain: type[nn.Module]) -> Any:
    if plain not in _CLASSES:
        _CLASSES[plain] = type(plain.__name__, (WithRows, plain), {"_plain": plain, "__module__": plain.__module__})
    return _CLASSES[plain]


def _remade(plain: type[nn.Module]) -> nn.Module:
    made = _with_rows(plain)
    return made.__new__(made)


def put_rows(module: Any, x: Tensor, y: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """The output y of an embedding or a linear layer for x, where its weight has other rows at a rising index."""
    if not isinstance(module, nn.Embedding):
        here = nn.functional.linear(x, rows.to(x.dtype), None if module.bias is None else module.bias[index])
        return y.index_copy(-1, index, here.to(y.dtype))
    at = torch.searchsorted(index, x).clamp(max=len(index) - 1)
    here, scale = nn.functional.embedding(at, rows).to(y.dtype), getattr(module, "embed_scale", None)
    if scale is not None:
        here = here * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
    return torch.where((index[at] == x).unsqueeze(-1), here, y)


def train_tokens(model: nn.Module, tokens: Iterable[int], targets: Iterable[str] | None = None) -> nn.Module:
    """Train the embeddings of some tokens, such as new ones, and leave all others as they are; in place.

    A head that is tied to the embedding uses the same rows. :func:`save_adapter` writes them beside the adapters, as PEFT's
    ``trainable_token_indices``, and :func:`merge` puts them into the weight.

    Args:
        model: its embedding stays as it is; call :func:`adapt` before or after, which freezes the rest.
        tokens: their numbers.
        targets: names of embeddings and heads, or endings of names, each with rows of its own unless tied; None for the
            model's input embedding.

    Returns:
        model.

    Raises:
        ValueError: a number is no token; a target matches nothing; the module is adapted, has such rows already, or is
            routed by a pool.
        TypeError: tokens are not integers; a target is neither an embedding nor a linear layer.
    """
    numbers = list(tokens)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise TypeError(f"tokens must be integers, got {numbers}")
    holders = dict(named_holders(model))
    names = _names(model, holders, targets)
    places = [check_tokens(holders, name, numbers, None) for name in names]
    for module in (m for place in places for m in place):
        check_unpooled(module)
    for place in places:
        attach_rows(place, numbers, _dense(place[0])[torch.tensor(numbers, device="cpu")])
    return model


def _names(model: nn.Module, holders: Mapping[str, nn.Module], targets: Iterable[str] | None) -> list[str]:
    if targets is None:
        find: Any = getattr(unwrapped(model), "get_input_embeddings", None)
        embedding = None if find is None else find()
        name = next((name for name, module in holders.items() if module is embedding), None)
        if name is None:
            raise ValueError(f"the model, a {type(model).__name__}, names no input embedding; say it in targets")
        return [name]
    names: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        found = sorted(named_or_ending(holders, target))
        if not found:
            raise ValueError(f"targets: {target!r} matches no module of the model")
        names += found
    firsts: list[str] = []  # tied modules share the rows of the first
    for name in names:
        if all(holders[name] not in _sharing(holders, holders[first]) for first in firsts):
            firsts.append(name)
    return firsts


def _sharing(holders: Mapping[str, nn.Module], module: nn.Module) -> list[nn.Module]:
    """A module, and those whose weight is tied to it, also where one of them has been quantised since."""
    weight: Any = module.weight
    tied: list[nn.Module] = [module]
    for other in dict.fromkeys(holders.values()):
        its: Any = getattr(other, "weight", None)
        same = isinstance(weight, Tensor) and isinstance(its, Tensor) and its.data_ptr() == weight.data_ptr()
        if isinstance(other, nn.Embedding | nn.Linear) and same and its.shape == weight.shape:
            tied.append(other)
        find = getattr(other, "get_output_embeddings", None)
        if find is not None and getattr(getattr(other, "config", None), "tie_word_embeddings", False):
            pair = [other.get_input_embeddings(), find()]  # type: ignore[operator]
            tied += pair if module in pair and None not in pair else []
    return list(dict.fromkeys(tied))


def check_tokens(
    holders: Mapping[str, nn.Module], name: str, numbers: Sequence[int], rows: Tensor | None
) -> list[nn.Module]:
    """The module of a name and those whose weight is tied to it; raise if it cannot have rows for these tokens."""
    module = holders.get(name)
    if not isinstance(module, nn.Embedding | nn.Linear):
        raise TypeError(f"{name!r} must be an embedding or a linear layer of the model, got {type(module).__name__}")
    V, H = module.weight.shape
    bad = [number for number in numbers if not 0 <= number < V]
    if bad or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"tokens of {name!r} must be different numbers from 0 to {V - 1}, got {list(numbers)[:8]}")
    if rows is not None and tuple(rows.shape) != (len(numbers), H):
        raise ValueError(f"the rows of the tokens of {name!r} must be {[len(numbers), H]}, got {list(rows.shape)}")
    place = _sharing(holders, module)
    for m in place:
        if isinstance(m, AdaptedLayer) and m.adapter is not None:
            raise ValueError(
                f"{name!r}, or what is tied to it, has an adapter and cannot have rows of single tokens too"
            )
        held = rows_of(m)
        if held is not None and (rows is None or held.index.tolist() != sorted(numbers)):
            raise ValueError(f"{name!r} trains the tokens {held.index.tolist()[:8]} already")
    return place


def attach_rows(place: Sequence[nn.Module], numbers: Sequence[int], rows: Tensor) -> None:
    """Give modules that share a weight rows for some tokens, or other values for the rows that they have."""
    index = torch.tensor(list(numbers), device=rows.device)
    if (held := rows_of(place[0])) is not None:
        with torch.no_grad():
            held.rows.copy_(rows[index.argsort()])
        return
    first: Any = place[0]
    made = TokenRows(index, rows).to(first.weight.device)
    first.register_module(CHILD, made)
    for module in place:
        vars(module)["_rows"] = (made,)
        module.__class__ = _with_rows(type(module))


def rows_of(module: nn.Module) -> TokenRows | None:
    """The rows that a module has for single tokens."""
    return module._rows[0] if isinstance(module, WithRows) else None


def merge_rows(model: nn.Module) -> None:
    """Put the rows of single tokens into the weights, which stay tied where they are; all weights are dense."""
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if (held := rows_of(module)) is None:
            continue
        weight: Any = module.weight
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(put_into(weight.detach().clone(), held), requires_grad=False)
        module.register_parameter("weight", made[id(weight)])
        module._modules.pop(CHILD, None)
        vars(module).pop("_rows")
        module.__class__ = type(module)._plain  # type: ignore[attr-defined]


def put_into(weight: Tensor, rows: TokenRows | None) -> Tensor:
    """Write the rows of single tokens into a weight [V, H]."""
    if rows is not None:
        here = torch.lerp(weight[rows.index].float(), rows.rows.detach(), rows.strength)
        weight[rows.index] = (rows.rows.detach() if rows.strength == 1 else here).to(weight.dtype)
    return weight


def _dense(module: Any) -> Tensor:
    weight, branch = module.weight, getattr(module, "branch", None)
    dense: Tensor = weight.detach() if isinstance(weight, Tensor) else weight.dequantize()
    return (dense if branch is None else (dense.float() + branch.delta()).to(dense.dtype)).cpu()
