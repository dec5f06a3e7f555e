"""Hooks on the linear layers of a model that gather the moments of their inputs while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..adapters.experts import ExpertsLinear, Stack, stand_in
from ..adapters.layer import AdaptedLayer
from ..adapters.targets import Target, shape_of, target_weight
from ..formats import Moment, QuantizedWeight
from .sums import GradientSum, Sums, moment


@dataclass
class _Shared:
    """Sums of inputs, how many inputs were added, and how many of them each layer with these sums saw."""

    sums: Sums
    added: int = 0
    seen: dict[str, int] = field(default_factory=dict)


class Observer:
    """Gathers the moments of layers while :meth:`attached` is entered and the model runs.

    Args:
        layers: the targets by name, as :func:`lowrank_ops.adapters.targets.find_targets` gives them.
        gradients: also gather dL/dW, in the backward of what ran.

    Attributes:
        mask: bool [B, T], the tokens of the batch that count, or None for all.
    """

    def __init__(self, layers: Mapping[str, Target], gradients: bool = False) -> None:
        self.layers, self.gradients = dict(layers), gradients
        self.mask: Tensor | None = None
        self._shared: dict[str, _Shared] = {}
        self._gradients: dict[str, GradientSum] = {}
        # Input -> its version and its sums, as long as the model holds the tensor.
        self._inputs: Any = WeakIdKeyDictionary()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within it the layers are observed; experts that are Parameters are computed by :class:`lowrank_ops.Experts`."""
        with ExitStack() as stack:
            blocks = {
                layer.block: stand_in(layer.block, {}) for layer in self.layers.values() if isinstance(layer, Stack)
            }
            stack.enter_context(swapped(model, blocks))
            for name, layer in self.layers.items():
                if isinstance(layer, Stack):
                    module: nn.Module = blocks[layer.block].get_submodule(layer.matrix.name)
                else:
                    module = layer
                before = module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                stack.callback(before.remove)
                if self.gradients:
                    after = module.register_forward_hook(self._gradient_hook(name), with_kwargs=True)
                    stack.callback(after.remove)
            yield

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            offsets = args[1].offsets if isinstance(module, ExpertsLinear) else None
            self._see(name, module, x, args)
            if self.gradients and torch.is_grad_enabled() and not x.requires_grad and offsets is None and args:
                return (x.detach().requires_grad_(), *args[1:]), kwargs
            return None

        return hook

    def _see(self, name: str, module: nn.Module, x: Tensor, args: tuple[Any, ...]) -> None:
        experts = shape_of(self.layers[name])[0] if isinstance(module, ExpertsLinear) else 0
        counts = not x.is_inference()  # an inference tensor does not count its changes
        mine, known = self._shared.get(name), self._inputs.get(x) if counts else None
        version = x._version if counts else 0
        if known is not None and (known[0] != version or known[1].sums.count.shape != ((experts,) if experts else ())):
            known = None
        theirs: _Shared | None = None if known is None else known[1]
        if mine is None and theirs is not None and theirs.added == 1:
            mine = theirs  # the first input of both
        elif mine is None:
            mine = _Shared(Sums(x.shape[-1], experts, x.device))
        elif mine is not theirs and len(mine.seen) > 1:
            self._check_alike(name, mine)
            if theirs is not None:  # the input of other layers
                seen = mine.seen.pop(name)
                mine = _Shared(mine.sums.copy(), seen, {name: seen})
        self._shared[name] = mine
        if mine is not theirs:
            mine.sums.add(*self._rows(name, module, x, args))
            mine.added += 1
            if theirs is None and counts:
                self._inputs[x] = version, mine
        mine.seen[name] = mine.seen.get(name, 0) + 1

    def _check_alike(self, name: str, shared: _Shared) -> None:
        """Raise if the layers that share sums saw inputs that this one did not see."""
        if shared.seen.get(name, 0) != shared.added:
            raise ValueError(
                f"{name} and {next(other for other in shared.seen if other != name)} have the same input in one call of "
                "the model and different ones in another; calibrate with batches that run the model alike"
            )

    def _rows(self, name: str, module: nn.Module, x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
        """The rows that count, and the offsets of experts in them."""
        K, mask = x.shape[-1], self.mask
        if isinstance(module, ExpertsLinear):
            offsets, tokens, _ = args[1]
            if mask is None:
                return x, offsets
            if tokens is None:
                raise ValueError(
                    f"{name}: the model does not tell which token a row of its experts is, so padding cannot be left out; "
                    "pack the text into sequences without padding"
                )
            kept = mask.flatten().to(x.device)[tokens]
            before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
            return x[kept], before[offsets.long()]
        if mask is not None:
            leading, tokens_of = ([size for size in shape if size > 1] for shape in (x.shape[:-1], mask.shape))
            if leading[: len(tokens_of)] == tokens_of or leading == [mask.numel()]:
                x = x.reshape(*mask.shape, -1, K)[mask.to(x.device)]
            elif leading[:2] == tokens_of[::-1]:  # time before batch
                x = x.reshape(*mask.T.shape, -1, K)[mask.T.to(x.device)]
        return x.reshape(-1, K), None

    def _gradient_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            if not y.requires_grad:
                return
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            offsets = args[1].offsets if isinstance(module, ExpertsLinear) else None
            if name not in self._gradients:
                self._gradients[name] = GradientSum(shape_of(self.layers[name]), x.device)
            total, (N, K) = self._gradients[name], (y.shape[-1], x.shape[-1])
            y.register_hook(lambda delta: total.add(delta.reshape(-1, N), x.reshape(-1, K), offsets))

        return hook

    def moments(self, batches: int = 1) -> dict[str, Moment]:
        """The moments of all layers; zero, with a count of 0, of a layer that saw nothing. The sums are given up.

        Args:
            batches: by which the sum of gradients is divided.
        """
        means: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        found = {}
        for name, layer in self.layers.items():
            weight = weight_beside(layer)
            *experts, _, K = weight.shape
            shared = self._shared.get(name) or _Shared(Sums(K, experts[0] if experts else 0, torch.device("cpu")))
            self._check_alike(name, shared)
            if id(shared) not in means:
                means[id(shared)] = shared.sums.means()
                self._shared[name] = shared  # so that no other object gets its id
            gradient = self._gradients.pop(name, None)
            total = None if gradient is None else (gradient.total / batches).cpu()
            if self.gradients and total is None:
                total = torch.zeros(tuple(weight.shape), dtype=torch.float32, device="cpu")
            found[name] = moment(means[id(shared)], weight, total)
        return found


def weight_beside(layer: Target) -> QuantizedWeight | Tensor:
    """W [N, K] or [E, N, K] of a target; the merged one of a layer that keeps factors alone."""
    if isinstance(layer, AdaptedLayer) and layer.weight is None:
        return layer.merged_weight()
    return target_weight(layer)


@contextmanager
def swapped(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Within it other modules stand in all places of some, inside ``root``."""
    places = [
        (parent, name, child)
        for parent in [*root.modules(), *(m for new in replacements.values() for m in new.modules())]
        for name, child in parent._modules.items()
        if child in replacements
    ]
    for parent, name, child in places:
        assert child is not None
        parent._modules[name] = replacements[child]
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
