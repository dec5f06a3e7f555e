"""A directory of a transformers model of which one module at a time is in memory, for calibration block by block."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import dot_natural_key

from ..calibration.blocks import find_blocks
from ..calibration.gather import linear_layers
from .transformers_files import Files
from .transformers_quantize import _build, _Names, _paths, _stamp


class Directory:
    """A model on the meta device, with what lies outside its decoder blocks in memory; :meth:`open` reads a module.

    The output head is outside too, but is read only where it is tied to the embedding.

    Args:
        path: a directory with config.json and safetensors files of dense weights.
        device: where the modules have their numbers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights have 4 bits already, or the blocks are not found.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._paths, self._device = _paths(path), device
        files = Files(self._paths)
        if quantized := files.quantized():
            raise ValueError(
                f"{files.origin(min(quantized))} has 4 bits already; load the model, which then fits more easily, and "
                "give it to lowrank_ops.calibrate"
            )
        files.check_dense()
        self.model: Any = _build(path, buffers=True).eval()
        self._files, self._names = files, _Names(self.model)
        # The model's name of a tensor -> the keys it is made of, each with the pattern of the converter that makes it.
        self._sources: dict[str, list[tuple[str | None, str]]] = {}
        for key in sorted(files.entries, key=dot_natural_key):
            name, pattern = self._names.of(key)
            if name is not None:
                self._sources.setdefault(name, []).append((pattern, key))
        blocks = find_blocks(self.model, linear_layers(self.model))
        head = self.model.get_output_embeddings()
        inner = {part for name in blocks for part in self.model.get_submodule(name).modules()}
        inner |= set() if head is None else set(head.modules())
        outside = [name for name, module in self.model.named_modules() if module not in inner]
        self._fill(f"{name}.{own}" if name else own for name in outside for own in self._held(name))
        self.model.tie_weights()
        for module in self.model.modules():
            for own, buffer in module._buffers.items():
                module._buffers[own] = None if buffer is None else buffer.to(device)

    def origin(self) -> list[Any]:
        return [[path.name, *_stamp(path)] for path in self._paths]

    @contextmanager
    def open(self, name: str) -> Iterator[nn.Module]:
        """Within it a module has its numbers."""
        module: nn.Module = self.model.get_submodule(name)
        names = [f"{path}.{own}" for path, _ in module.named_modules(prefix=name) for own in self._held(path)]
        try:
            self._fill(names)
            yield module
        finally:
            for full in names:
                holder, own = self._holder(full)
                if own in holder._parameters:
                    parameter = holder._parameters[own]
                    assert parameter is not None
                    holder._parameters[own] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _held(self, name: str) -> list[str]:
        """The names of a module's own Parameters without numbers, and of its buffers that are in the files."""
        module = self.model.get_submodule(name)
        meta = [own for own, p in module._parameters.items() if p is not None and p.is_meta]
        return meta + [own for own in module._buffers if (f"{name}.{own}" if name else own) in self._sources]

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        path, _, own = name.rpartition(".")
        return self.model.get_submodule(path), own

    def _fill(self, names: Iterable[str]) -> None:
        """Give tensors of the model their numbers."""
        names = [name for name in names if name not in self._names.tied]
        if missing := [name for name in names if name not in self._sources]:
            raise ValueError(
                f"{self._files} have no tensor {missing[0]!r}, or transformers makes several tensors of one; load the model "
                "and give it to lowrank_ops.calibrate"
            )
        for name in names:
            holder, own = self._holder(name)
            tensor = self._read(name).to(self._device, self._names.state[name].dtype)
            if tensor.shape != self._names.state[name].shape:
                raise ValueError(
                    f"{self._files}: {name!r} is {list(tensor.shape)} and the model, by config.json, needs "
                    f"{list(self._names.state[name].shape)}"
                )
            if own in holder._parameters:
                holder._parameters[own] = nn.Parameter(tensor, requires_grad=False)
            else:
                holder._buffers[own] = tensor

    def _read(self, name: str) -> Tensor:
        sources = self._sources[name]
        (pattern, key), *more = sources
        try:
            if pattern is None:
                assert not more
                return self._tensor(key)
            converter: Any = copy.deepcopy(self._names.converter(pattern))
            for pattern, key in sources:
                converter.add_tensor(name, key, pattern, functools.partial(self._tensor, key))
            made: dict[str, Any] = converter.convert(name, model=self.model, config=self.model.config)
            return made[name][0] if isinstance(made[name], list) else made[name]
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self._files.entries[key].file}: {name!r} cannot be read: {error!r}") from error

    def _tensor(self, key: str) -> Tensor:
        # A file that stays open would keep all pages in memory that were read once.
        with safe_open(self._files.entries[key].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


def block_names(path: Path) -> list[str]:
    """The names of the decoder blocks of the model in a directory."""
    model = _build(path)
    return find_blocks(model, linear_layers(model))
