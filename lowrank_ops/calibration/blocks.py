"""Calibration one decoder block at a time: a block's numbers are in memory only while the batches run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..adapters.config import WeightConfig
from ..adapters.targets import Target, shape_of
from ..formats import Moment, Moments
from .batches import Batch, digest, mask_of, part_with, run, tied_to_head
from .observe import Observer
from .rounded import rounded
from .state import State


class Source(Protocol):
    """A model whose modules have their numbers only while they are open."""

    model: nn.Module

    def open(self, name: str) -> AbstractContextManager[nn.Module]:
        """The module of this name with its numbers."""

    def origin(self) -> list[Any]:
        """JSON that is equal where an earlier call gave the same numbers."""


# Functions of integrations that open the directory of a model on a device; None if their library is missing.
OPENERS: list[Callable[[Path, torch.device], Source | None]] = []


class InMemory:
    """A model that has its numbers already."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "model is on the meta device and holds no numbers; give the directory of its files instead"
            )

    def open(self, name: str) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model.get_submodule(name))

    def origin(self) -> list[Any]:
        return [type(self.model).__name__]


def by_blocks(
    source: Source,
    batches: Sequence[Batch],
    layers: Mapping[str, Target],
    head: str | None,
    sequential: WeightConfig | None,
    folder: Path | None,
    dtype: torch.dtype | None,
    progress: Callable[[str], None],
) -> Moments:
    """The moments of a model's layers, gathered block by block: see :func:`lowrank_ops.calibrate`.

    Args:
        layers: by name, without the head.
        head: the name of the output head, to gather its moments too.
        dtype: of the activations between blocks.
    """
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    blocks = find_blocks(source.model, layers)
    chosen = {} if sequential is None else sequential.choose(source.model)
    choices = {
        "model": source.origin(),
        "layers": {name: list(shape_of(layer)) for name, layer in layers.items()},
        "head": head,
        "batches": digest(batches),
        "sequential": None if sequential is None else sequential.to_dict(),
        "activations": str(dtype),
    }
    state = State(folder, choices)
    if state.done == len(blocks) and (head is None or state.has(head)):
        for name in blocks:
            progress(name)
        return state.finish()
    with torch.no_grad():
        walk = _Walk(source, batches, blocks, state, dtype)
        for number, name in enumerate(blocks):
            if number >= state.done:
                own = {layer: target for layer, target in layers.items() if layer.startswith(f"{name}.")}
                state.keep(name, walk.block(number, own, sequential, {n for n in own if n in chosen}))
                state.complete(number)
            progress(name)
        if head is not None:
            state.keep(head, walk.head(head))
    return state.finish()


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names of the decoder blocks: the children of the outermost list of modules that holds all layers.

    Raises:
        ValueError: no list holds them all; the message names a layer outside, and what to do.
    """
    layers = list(layers)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    within = {name: sum(layer.startswith(f"{name}.") for layer in layers) for name in lists}
    best = max(lists, key=lambda name: (within[name], -len(name)), default=None)
    if best is not None and within[best] == len(layers):
        return [f"{best}.{child}" for child in lists[best]._modules]
    outside = next(layer for layer in layers if best is None or not layer.startswith(f"{best}."))
    where = "any list of blocks" if best is None else f"the blocks {best!r}"
    raise _refusal(model, f"{outside} stands outside {where}")


def _refusal(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot be calibrated block by block: {why}; load it, in 4 bits if it does not fit, and "
        "calibrate it as a whole with lowrank_ops.calibrate(model, batches)"
    )


class _Call(NamedTuple):
    """The arguments of a block without its input, and the place of the input among them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = x
        else:
            kwargs[self.place] = x
        y: Any = block(*args, **kwargs)
        output: Tensor = y[0] if isinstance(y, tuple) else y
        return output


class _ReachedError(Exception):
    """Ends a forward of the model that has told what it is run for."""


class _Walk:
    """The batches on their way through the blocks."""

    def __init__(
        self, source: Source, batches: Sequence[Batch], blocks: Sequence[str], state: State, dtype: torch.dtype | None
    ) -> None:
        self.source, self.batches, self.blocks, self.state, self.dtype = source, batches, blocks, state, dtype
        self.model = source.model
        self.modules = [self.model.get_submodule(name) for name in blocks]
        self.part = part_with(self.model, self.modules)
        self.device = next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))
        # Whether a block returns a tuple that begins with its output.
        self.tuples = self._first_returns_tuple()
        self.calls: list[list[_Call]] = []  # of each batch, of each block
        self.computes = torch.float32  # the dtype of activations in the model
        for number, batch in enumerate(batches):
            self._record(number, batch)

    def _first_returns_tuple(self) -> bool:
        seen: list[Any] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            seen.extend([args, kwargs])
            raise _ReachedError

        with _forwards([(self.modules[0], stop)]), suppress(_ReachedError):
            run(self.part, self.batches[0], self.device)
        if not seen:
            raise _refusal(self.model, f"it does not call {self.blocks[0]}")
        with self.source.open(self.blocks[0]) as block:
            return isinstance(block(*seen[0], **seen[1]), tuple)

    def _record(self, at: int, batch: Batch) -> None:
        """Note how the model calls each block with a batch; the blocks give back their input meanwhile."""
        calls: list[_Call] = []
        passed: list[Tensor] = []

        def recorder(number: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                place: int | str = 0 if args else "hidden_states"
                x = args[0] if args else kwargs.get("hidden_states")
                if number != len(calls) or not isinstance(x, Tensor) or (passed and passed[-1] is not x):
                    raise _refusal(
                        self.model, f"{self.blocks[number]} does not take the output of the block before it alone"
                    )
                if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
                    raise _refusal(self.model, "it keeps a cache although it is told not to")
                if number == 0:
                    self.computes = x.dtype
                    if self.state.done == 0:
                        self._put(0, at, x)
                calls.append(_Call((None, *args[1:]), kwargs, 0) if args else _Call((), kwargs, place))
                passed.append(x.view_as(x))  # another object, so that the next block shows where its input comes from
                kwargs.pop("hidden_states", None)
                return (passed[-1],) if self.tuples else passed[-1]

            return record

        with _forwards([(module, recorder(number)) for number, module in enumerate(self.modules)]):
            run(self.part, batch, self.device)
        if len(calls) != len(self.blocks):
            raise _refusal(self.model, f"it does not call {self.blocks[len(calls)]}")
        self.calls.append(calls)

    def _put(self, block: int, at: int, x: Tensor) -> None:
        self.state.put(block, at, x.detach().to("cpu", self.dtype or x.dtype, copy=True))

    def _get(self, block: int, at: int) -> Tensor:
        return self.state.get(block, at).to(self.device, self.computes)

    def block(
        self, number: int, layers: Mapping[str, Target], config: WeightConfig | None, rounds: set[str]
    ) -> dict[str, Moment]:
        """The moments of a block's layers; its outputs are kept for the next block.

        Args:
            config: by which the layers ``rounds`` are rounded before the outputs are computed, or None.
        """
        observer, name = Observer(layers), self.blocks[number]
        with self.source.open(name) as block:
            with observer.attached(block):
                for at in range(len(self.batches)):
                    observer.mask = mask_of(self.batches[at])
                    y = self.calls[at][number].run(block, self._get(number, at))
                    if config is None:
                        self._put(number + 1, at, y)
            moments = observer.moments()
            if config is not None:
                with rounded(block, config, {n: layers[n] for n in rounds}, moments):
                    for at in range(len(self.batches)):
                        self._put(number + 1, at, self.calls[at][number].run(block, self._get(number, at)))
        return moments

    def head(self, name: str) -> dict[str, Moment]:
        """The moments of the output head, after all blocks."""
        module = self.model.get_submodule(name)
        observer, last = Observer({name: module}), len(self.blocks) - 1

        def passing(number: int, at: int) -> Callable[..., Any]:
            def passed(*args: Any, **kwargs: Any) -> Any:
                x = args[0] if args else kwargs["hidden_states"]
                x = self._get(number + 1, at) if number == last else x
                return (x,) if self.tuples else x

            return passed

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _ReachedError  # the hooks of the head have seen its input

        with observer.attached(self.model):
            for at, batch in enumerate(self.batches):
                observer.mask = mask_of(batch)
                passes = [(block, passing(number, at)) for number, block in enumerate(self.modules)]
                with _forwards([*passes, (module, stop)]), suppress(_ReachedError):
                    run(self.model, batch, self.device)
        with self.source.open(name):
            found = observer.moments()
            return tied_to_head(self.model, name, found[name])


@contextmanager
def _forwards(places: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within it modules compute something else, and keep all attributes that a model reads."""
    before = [(module, vars(module).get("forward")) for module, _ in places]
    for module, forward in places:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
