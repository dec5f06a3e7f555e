"""Adapters from a whole saved model: a directory that save_pretrained or a trainer wrote, or a saved state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .. import cores
from ..files import inside, load_json
from ..formats import MARKS, from_state_dict
from ..functional import LowRankUpdate
from .experts import find_stacks
from .kinds import LoRA
from .linear import AdaptedLayer, branch_of
from .model import layer_over, replace_layers, replacements_of
from .names import call_named, modules_of, named_holders
from .peft_files import ROWS, Loaded, all_finite, read_matrix
from .rounding import Base, keep_base
from .start import RECORD, Start, empty_core, read_entry
from .targets import Target, target_weight
from .tokens import CHILD, attach_rows, check_tokens

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_OWN = ("down", "up", "magnitude", "up_bias", "core", "core_index", "core_offset", "base_down", "base_up")


def state_file(directory: Path) -> Path | None:
    """The file of a whole state in a directory, or the index of several."""
    names = [name + suffix for name in _SINGLE for suffix in ("", _INDEX)]
    return next((directory / name for name in names if (directory / name).is_file()), None)


def read_state(path: Path, modules: Iterable[str]) -> dict[str, Loaded]:
    """The adapters in a saved state: layer name -> kind and tensors.

    The base is read only where the kind has frozen factors, to tell which weight they belong to.

    Args:
        path: a file that :func:`state_file` found.
        modules: the names of the modules of the model that takes the adapters. If the state is of an inner model, its names
            lack a prefix, which is added.
    """
    where, read = open_state(path)
    names = [key.removesuffix("." + RECORD) for key in where if key.endswith("." + RECORD)]
    names = [name for name in names if f"{name}.down" in where or f"{name}.core" in where]
    if not names:
        has = "records no kind of its adapters" if any(key.endswith(".down") for key in where) else "has no adapter"
        raise ValueError(
            f"{path} is the state of a model and {has}; load it with load_state_dict into a model that was adapted alike"
        )
    before = _prefix(names, set(modules))
    groups: dict[str, list[str]] = {name: [] for name in names}
    for key in where:
        layer = next((name for end in _ends(key) if (name := key[:end]) in groups), None)
        if layer is not None:
            groups[layer].append(key)
    return {before + name: call_named(name, _loaded, name, groups[name], read) for name in names}


def read_tokens(path: Path, modules: Iterable[str]) -> dict[str, tuple[list[int], Tensor]]:
    """Name of an embedding or a head -> tokens and the rows that a saved state has for them."""
    where, read = open_state(path)
    end = f".{CHILD}.rows"
    names = [key.removesuffix(end) for key in where if key.endswith(end)]
    before = _prefix(names, set(modules)) if names else ""
    return {before + n: (read(f"{n}.{CHILD}.index").tolist(), read(n + end)) for n in names}


def _loaded(name: str, keys: list[str], read: Callable[[str], Tensor]) -> Loaded:
    entries = {key[len(name) + 1 :]: key for key in keys}
    kind, source = read_entry(name + ".", read(entries[RECORD]))
    own = {part: key for part, key in entries.items() if part.partition(".")[0] in _OWN}
    tensors = {part: read(key) for part, key in own.items()}
    if not all_finite(tensor for tensor in tensors.values() if tensor.is_floating_point()):
        raise ValueError("its adapter must be finite, got NaN or infinity in it")
    if isinstance(kind, LoRA):
        return Loaded(kind, tensors, source)
    if "core" not in tensors:
        raise ValueError("the state lacks its core")
    if (index := tensors.pop("core_index", None)) is not None:
        core = cores.Sparse.from_index(index, tensors["core"], read_matrix(tensors, "down").shape[-2])
        tensors["pairs"] = torch.stack([core.rows, core.cols]).to(torch.int32)
    base = None
    if any("weight" + mark in entries for mark in MARKS.values()):  # the source is W before it was quantised
        weight = {part: read(key) for part, key in entries.items() if part.startswith("weight")}
        branch = None
        if "branch_down" in entries and "branch_up" in entries:
            branch = LowRankUpdate(read(entries["branch_down"]), read(entries["branch_up"]))
        base = Base(from_state_dict(weight, "weight"), branch).key()
    return Loaded(kind, tensors, source, base)


def restore_adapters(model: nn.Module, path: Path) -> None:
    """Give layers the adapters that a whole saved state has, whatever their kind; the model has the base of that state.

    Args:
        path: a file that :func:`state_file` found.
    """
    modules = modules_of(model)
    layers: dict[str, Target] = {**modules, **find_stacks(modules)}
    found = read_state(path, layers)
    made = {name: call_named(name, _restored, layers[name], loaded) for name, loaded in found.items()}
    replace_layers(model, replacements_of({name: layers[name] for name in found}, made))
    holders = dict(named_holders(model))
    for name, (numbers, rows) in read_tokens(path, modules).items():
        attach_rows(check_tokens(holders, name, numbers, rows), numbers, rows)


def _restored(layer: Target, loaded: Loaded) -> AdaptedLayer:
    weight, kind = target_weight(layer), loaded.kind
    tensors = {name: tensor.to(weight.device) for name, tensor in loaded.tensors.items()}
    down = read_matrix(tensors, "down")
    R = down.shape[-2]
    core: cores.Core | None = None
    if (pairs := tensors.get("pairs")) is not None:
        core = cores.Sparse(pairs[0].long(), pairs[1].long(), tensors["core"], R)
    elif not isinstance(kind, LoRA):
        core = cores.with_values(empty_core(kind, R, weight.device), tensors["core"])
    offset, shift = tensors.get("core_offset"), None
    if "base_down" in tensors:
        shift = tensors["base_down"], tensors["base_up"]
    rows: dict[str, Any] = {name: tensors.get(name) for name in ROWS}
    started = Start(None, down, read_matrix(tensors, "up"), core, offset, shift, loaded.source, None, **rows)
    if offset is None:  # else it is the replace form, of which the state has no weight
        base = keep_base(weight, None, branch_of(layer))
        started.weight, started.branch = base.weight, base.branch
    return layer_over(layer, kind, None, started=started)


def _ends(key: str) -> Iterable[int]:
    return (i for i, letter in enumerate(key) if letter == ".")


def _prefix(names: list[str], modules: set[str]) -> str:
    """The prefix that all names have in the model; empty if they have none or several."""
    if all(name in modules for name in names):
        return ""
    ends = [module.removesuffix(names[0]) for module in modules if module.endswith("." + names[0])]
    fitting = [before for before in ends if all(before + name in modules for name in names)]
    return fitting[0] if len(fitting) == 1 else ""


def open_state(path: Path) -> tuple[Mapping[str, Path], Callable[[str], Tensor]]:
    """Key -> file, and a function that reads the tensor of a key."""
    try:
        if path.name.endswith(_INDEX):
            table = load_json(path.read_text())["weight_map"]
            where = {key: inside(path.parent, name, path) for key, name in table.items()}
        else:
            where = dict.fromkeys(_File(path).keys(), path)
        files = {file: _File(file) for file in set(where.values())}
    # torch.load of a damaged file raises errors of any kind.
    except Exception as error:
        raise ValueError(f"{path} is not a whole state of a model: {error}") from error

    def read(key: str) -> Tensor:
        return files[where[key]].read(key)

    return where, read


class _File:
    """One file, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        if path.suffix == ".bin":
            self._tensors: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.read: Callable[[str], Tensor] = self._tensors.__getitem__
        else:
            self._tensors = safe_open(path, framework="pt")
            self.read = self._tensors.get_tensor

    def keys(self) -> Iterable[str]:
        return list(self._tensors.keys())
