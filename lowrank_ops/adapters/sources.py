"""Where adapters come from: directories, files and state dicts, read into checked parts by the names of a model's layers."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import check_path
from .beside import Beside
from .expert_files import Stacked, read_stacks
from .kinds import LoRA
from .layouts import to_peft
from .names import call_named
from .peft_files import (
    CONFIG,
    OURS,
    TENSORS,
    Contents,
    Loaded,
    checked_config,
    contents_of,
    kind_of,
    loaded_of,
    parse_json,
    read_file,
    read_text,
)
from .state_files import read_state, read_tokens, state_file
from .versions import read_files

# A directory with an adapter, a safetensors file, or tensors.
AdapterSource = str | os.PathLike[str] | Mapping[str, Tensor]
_ENDING = ".safetensors"
_DIFFUSERS = "pytorch_lora_weights" + _ENDING  # the file that diffusers writes to a directory


def files_of(path: Path) -> list[Path]:
    """The files that :func:`read_source` may open for a path."""
    if path.suffix == _ENDING and not path.is_dir():
        return [path, path.parent / CONFIG]
    return [path / CONFIG, path / TENSORS, path / _DIFFUSERS]


def read_source(
    source: AdapterSource, config: Mapping[str, Any] | None, names: Iterable[str]
) -> tuple[dict[str, Any], Contents, dict[str, Any], str]:
    """The checked configuration and tensors of an adapter, layer name -> its record, and where it is, for messages.

    Args:
        source: a directory with PEFT's two files or with diffusers' file, a safetensors file of a layout in
            :data:`.layouts.LAYOUTS`, or its tensors. A file's configuration is in its metadata or beside it.
        config: for tensors: the contents of adapter_config.json; None if the layout needs none.
        names: of the modules of the model that takes the adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is a config for files; a file is damaged, or not of a known layout, or not for this model.
    """
    if isinstance(source, Mapping):
        where = "the state dict"
        tensors, described = to_peft(source, config, {}, names, where)
        checked = checked_config({"peft_type": "LORA", **described}, where)
        return checked, *contents_of(tensors, {}, where), where
    if config is not None:
        raise ValueError("config describes tensors, and files have their own; leave config out")
    check_path("the source of an adapter", source)
    path = Path(source)
    if not (path / CONFIG).exists() and (path / _DIFFUSERS).is_file():
        path = path / _DIFFUSERS
    beside = path.parent / CONFIG
    if path.suffix != _ENDING or path.is_dir():
        return *read_files(path), str(path)
    if path.name == TENSORS and beside.is_file():
        return *read_files(path.parent), str(path.parent)
    raw, metadata = read_file(path)
    config = parse_json(read_text(beside), beside) if beside.is_file() and path.name != _DIFFUSERS else None
    if config is not None:
        config = checked_config(config, str(beside))
    tensors, described = to_peft(raw, config, metadata, names, str(path))
    return checked_config(described, str(path)), *contents_of(tensors, metadata, str(path)), str(path)


def read_adapters(
    source: AdapterSource,
    modules: Iterable[str],
    stacks: Mapping[str, Stacked],
    described: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Loaded], Beside, str]:
    """Layer name -> its adapter, what is there beside the adapters, and where, for messages.

    Args:
        source: as of :func:`read_source`, or a directory with the state of a whole model.
        modules: the names of the modules of the model that takes them.
        stacks: its stacks of experts.
        described: for tensors: the contents of adapter_config.json.
    """
    known = {*modules, *stacks}
    if not isinstance(source, Mapping):
        check_path("the source of an adapter", source)
        state = None if (Path(source) / CONFIG).exists() else state_file(Path(source))
        if state is not None:
            return read_state(state, known), Beside(tokens=read_tokens(state, known)), str(source)
    config, contents, records, where = read_source(source, described, known)
    if config["peft_type"] == OURS and set(records) != set(contents.layers):
        raise ValueError(f"{where} does not say of every layer what kind of adapter it has")
    loaded = all_loaded(config, contents.layers, records, stacks)
    for name, of_layer in loaded.items():
        of_layer.embeds = name in contents.embeddings
    return loaded, Beside.of(contents, config), where


def all_loaded(
    config: dict[str, Any],
    found: dict[str, dict[str, Tensor]],
    records: Mapping[str, Any],
    stacks: Mapping[str, Stacked],
) -> dict[str, Loaded]:
    """The contents of a file by the names that layers have in the model."""
    kinds: dict[str, LoRA] = {}
    if config["peft_type"] != OURS:
        found, kinds = read_stacks(config, found, stacks, functools.partial(kind_of, config))
    return {
        name: Loaded(kinds[name], tensors)
        if name in kinds
        else call_named(name, loaded_of, config, name, tensors, records.get(name))
        for name, tensors in found.items()
    }
